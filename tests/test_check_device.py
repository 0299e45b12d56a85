"""benchmarks/check_device.py passes a healthy CPU, and names what is broken."""

import re
import signal
from functools import partial
from itertools import islice

import pytest
import torch
from conftest import in_forks, small_network

import edm_unet
from benchmarks import check_device
from dmd_loss import lpips_distance
from plumbing.devices import DTYPES
from plumbing.optim import Learner
from teachers import EDMTeacher

pytestmark = pytest.mark.usefixtures("quick")
NETWORKS, SKIPS = check_device.networks, partial(check_device.loss_scaling, steps=6)
MNIST, SD = (partial(check_device.gradients, datasets=[name]) for name in ("mnist", "sd15"))


@pytest.fixture
def quick(small, monkeypatch):
    """A few networks, a small teacher and a smaller loss scale."""
    golden_networks = check_device.golden_networks
    teacher = EDMTeacher(small_network(), {"name": "small", "sha256": "0"})
    for name, value in {
        "golden_networks": lambda *given: islice(golden_networks(*given), 2),
        "load_teacher": lambda config: teacher,
        "precisions": lambda device: ["off", "bf16"], "SCALE": 2.0**18,
        "resuming": partial(check_device.resuming, teacher=small["teacher"]),
    }.items():  # fmt: skip
        monkeypatch.setattr(check_device, name, value)


def table(check, monkeypatch, capsys) -> tuple[int, dict[str, str], str]:
    """The exit code, the last column by the first, and the last line. A check leaves no setting."""
    check = getattr(check_device, check) if isinstance(check, str) else check
    monkeypatch.setattr(check_device, "CHECKS", [check])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # train.prepare sets it
    handler = signal.getsignal(signal.SIGINT)  # and this
    with pytest.raises(SystemExit) as end:
        check_device.main(check_device.Config(device="cpu"))
    assert not torch.backends.cudnn.benchmark and signal.getsignal(signal.SIGINT) is handler
    lines = capsys.readouterr().out.splitlines()
    rows = [re.fullmatch(r"\| (.*) \| (.*) \| (.*) \|", line) for line in lines[3:]]
    return end.value.code, {row[1]: row[3] for row in rows if row}, lines[-1]


@pytest.mark.parametrize(("check", "some"), [
    (NETWORKS, ["DDPM++, off", "DDPM++, small activations, bf16"]),
    (MNIST, ["gradient of G, mnist, off, --accumulate 2", "gradient of mu_fake, mnist, bf16"]),
    (SKIPS, ["fp16, loss scale of mu_fake", "fp16, change of the weights"]),
    ("resuming", ["a run resumed"]),
])  # fmt: skip
def test_a_healthy_cpu(check, some, monkeypatch, capsys):
    code, rows, last = table(check, monkeypatch, capsys)
    assert code == 0 and "BROKEN" not in str(rows)
    assert re.match(f"all {len(rows)} limits hold", last)
    for name in some:
        assert any(row.startswith(name) for row in rows)


def test_the_small_stable_diffusion(monkeypatch, capsys):
    monkeypatch.setattr(check_device, "precisions", lambda device: ["off"])
    code, rows, _ = table(SD, monkeypatch, capsys)
    assert code == 0 and len(rows) == 2


def test_two_ranks(monkeypatch, capsys):
    monkeypatch.undo()  # the ranks have the whole teacher
    in_forks()  # starts none, but the next will be started as the other tests' are
    monkeypatch.setattr(check_device, "START", "forkserver")
    code, rows, _ = table(check_device.two_ranks, monkeypatch, capsys)
    assert code == 0 and len(rows) == 2


def test_lpips(random_lpips, monkeypatch, capsys):
    monkeypatch.setattr(check_device, "lpips_distance", partial(lpips_distance, size=32))
    code, rows, last = table(check_device.lpips_rows, monkeypatch, capsys)
    assert code == 0 and len(rows) == 3 and last.startswith("all 2 limits hold")


def test_speed(monkeypatch, capsys):
    """Its rows have no limits. What does not fit is no fault."""
    monkeypatch.setattr(
        check_device.step, "measure", lambda *_: {"step": 22, "floor": 22, "GiB": 3}
    )
    code, rows, last = table("speed", monkeypatch, capsys)
    assert code == 0 and len(rows) == 2 and last.startswith("all 0 limits hold")

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(check_device.step, "measure", full)
    code, (row,), _ = table("speed", monkeypatch, capsys)
    assert code == 0 and row.startswith("mnist, off, 8 + 2 images")


def half_is(amp, dtype):
    def patch(monkeypatch):
        monkeypatch.setattr(check_device, "precisions", lambda device: ["off", amp])
        monkeypatch.setitem(DTYPES, amp, dtype)

    return patch


def another_eps(monkeypatch):
    style, defaults = edm_unet.NETWORKS["SongUNet"]
    monkeypatch.setitem(edm_unet.NETWORKS, "SongUNet", (style._replace(eps=1e-5), defaults))


def a_layout_is_misread(monkeypatch):
    """Channels-last images are read as if they were contiguous."""
    pool = torch.nn.functional.avg_pool2d

    def misread(x, size):
        if not x.is_contiguous():
            x = x.permute(0, 2, 3, 1).reshape(x.shape)
        return pool(x, size)

    monkeypatch.setattr(torch.nn.functional, "avg_pool2d", misread)


def parts_are_summed(monkeypatch):
    monkeypatch.setattr(check_device, "precisions", lambda device: ["bf16"])
    monkeypatch.setattr(Learner, "backward", lambda self, loss: self.scaler.scale(loss).backward())


def infinite_steps_are_done(monkeypatch):
    monkeypatch.setattr(torch.amp.GradScaler, "step", lambda self, optimizer: optimizer.step())


def adamws_state_is_lost(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda *_: None)


def nothing_works(monkeypatch):
    monkeypatch.setattr(check_device.train, "prepare", lambda *_: 1 / 0)


@pytest.mark.parametrize(("check", "fault", "broken", "whole"), [
    (NETWORKS, half_is("fp16", torch.bfloat16), "DDPM.*, fp16", "DDPM.*, off"),
    (NETWORKS, half_is("bf16", torch.float32), "DDPM.*, bf16", "DDPM.*, off"),
    (NETWORKS, another_eps, "DDPM.*, small activations, off", None),
    (NETWORKS, a_layout_is_misread, "DDPM.*, off, channels-last", None),
    (MNIST, parts_are_summed, "gradient of G, mnist, bf16, .* 2: norm x (1.9|2.0)", ".*bf16, .* 1"),
    (SKIPS, infinite_steps_are_done, "fp16, change", None),
    (MNIST, nothing_works, "gradients", None),
    ("resuming", adamws_state_is_lost, "a run resumed", None),
])  # fmt: skip
def test_what_is_broken_is_named(check, fault, broken, whole, monkeypatch, capsys):
    fault(monkeypatch)
    code, rows, last = table(check, monkeypatch, capsys)
    assert code == 1 and re.match(f"[1-9][0-9]* of {len(rows)} limits are broken", last)
    found = {name for name, limit in rows.items() if limit.endswith("BROKEN")}
    assert any(re.match(broken, name) for name in found), (found, rows)
    assert whole is None or any(re.match(whole, name) for name in rows.keys() - found)
