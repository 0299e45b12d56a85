"""train.py: what a run leaves, how it resumes, what its options do, and what it refuses."""

import copy
import csv
import json
import math
import random
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.error import URLError

import lpips
import numpy as np
import pytest
import torch
from conftest import TINY, files, pairs_config, start, tiny_config
from PIL import Image

import make_pairs
import train
from edm_unet import heun_sample
from plumbing.devices import Ranks
from plumbing.files import read_tensors, write_tensors
from plumbing.optim import Learner, learning_rate
from plumbing.options import UserError
from plumbing.pairs import Pairs, sample_noise
from plumbing.rundir import SCALARS, Log, Signals, keep_copies
from teachers import load_generator, load_teacher
from workloads import WORKLOADS, get_workload

ALONE = Ranks(0, 1, torch.device("cpu"))


def scalars(folder):
    """The logged losses and norms, one list of texts per step."""
    rows = csv.DictReader((folder / "log.csv").read_text().splitlines())
    return [[row[name] for name in SCALARS] for row in rows]


def leaves(state, name=""):
    """The numbers and tensors of nested dicts and lists, by their dotted names."""
    if not isinstance(state, dict | list | tuple):
        return {name: torch.as_tensor(state)} if state is not None else {}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {k: v for key, part in items for k, v in leaves(part, f"{name}.{key}").items()}


def same_run(first, second):
    """Assert that two run folders hold the same checkpoint, generator and log, bit by bit."""
    one, two = (
        leaves(torch.load(folder / "checkpoint.pt", weights_only=True))
        for folder in (first, second)
    )
    assert one.keys() == two.keys() and len(one) > 100
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    (one, about), (two, about_two) = (
        read_tensors(folder / "generator.safetensors") for folder in (first, second)
    )
    assert about == about_two and one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert scalars(first) == scalars(second)


def test_training_noise_is_not_the_pairs_noise(pairs, tmp_path, monkeypatch):
    """Section 3.3: the two losses have distinct data streams. And no number is drawn twice."""
    batches = []
    original = train.draw_batch

    def spy(*arguments):
        batches.append(original(*arguments))
        return batches[-1]

    monkeypatch.setattr(train, "draw_batch", spy)
    train.main(tiny_config(pairs, tmp_path / "run", steps=3))
    drawn = [noise for b in batches for noise in (b.z, b.noise, b.noise_fake)]
    of_pairs = sample_noise("pairs", 0, range(20), (1, 28, 28))
    every = torch.cat([*drawn, of_pairs]).flatten(1)
    assert len(every) == 3 * 3 * 4 + 20
    distance = torch.cdist(every, every) + 100 * torch.eye(len(every))
    assert distance.min() > 30  # independent ones are sqrt(2 * 784) = 40 apart
    z_ref = torch.cat([b.z_ref for b in batches]).flatten(1)
    assert (torch.cdist(z_ref, of_pairs.flatten(1)).min(dim=1).values < 1e-3).all()


def test_run_folder(finished_run):
    names = set(files(finished_run))
    assert names == {
        "config.json", "log.csv", "curves.png", "samples_000000.png", "samples_000002.png",
        "training.gif", "checkpoint.pt", "generator.safetensors",
    }  # fmt: skip
    rows = list(csv.DictReader((finished_run / "log.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2"]
    # Step 1 has no fake score of its own yet: mu_fake is the teacher, and the KL gradient is zero.
    assert float(rows[0]["loss_kl"]) == 0 < float(rows[1]["loss_kl"])
    picture = Image.open(finished_run / "samples_000002.png")
    assert picture.size == (2 * (2 + 10 * 30), 2 * (2 + 3 * 30))
    G, metadata = load_generator(finished_run / "generator.safetensors")
    assert metadata["step"] == "2" and not any(p.requires_grad for p in G.parameters())


def test_the_film_shows_every_picture_in_turn(finished_run):
    """From before the first step to the end."""
    with Image.open(finished_run / "training.gif") as film:
        assert film.n_frames == 2
        for frame, step in enumerate((0, 2)):
            film.seek(frame)
            picture = Image.open(finished_run / f"samples_{step:06d}.png")
            difference = np.asarray(film.convert("L"), float) - np.asarray(picture, float)
            assert np.abs(difference).max() < 3


def test_before_training_the_generator_is_the_teachers_one_step(tmp_path, pairs):
    """With learning rate 0 the student stays the copy of the teacher that Algorithm 1 starts at."""
    train.main(tiny_config(pairs, tmp_path / "run", steps=1, learning_rate=0.0))
    G, _ = load_generator(tmp_path / "run" / "generator.safetensors")
    mu_real = load_teacher(get_workload()).mu_real
    z, cond = torch.randn(3, 1, 28, 28), torch.tensor([1, 5, 9])
    with torch.no_grad():
        torch.testing.assert_close(G(z, cond), heun_sample(mu_real.net, z, cond, steps=1))


def test_schedules(finished_run):
    rates = [learning_rate(k, peak=1e-3, warmup=10, end=100) for k in (0, 9, 55, 100)]
    assert rates == pytest.approx([1e-4, 1e-3, 5e-4, 0])
    assert learning_rate(10**5, peak=1e-3, warmup=10) == 1e-3

    state = torch.load(finished_run / "checkpoint.pt", weights_only=True)
    rate_G, rate_fake = (
        state[name]["optimizer"]["param_groups"][0]["lr"] for name in ("G", "mu_fake")
    )
    assert rate_fake == WORKLOADS["mnist"].fake_lr_ratio * rate_G > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"ema": 0.9}, {"amp": "fp16"}], ids=str)
def test_resume_is_exact(small, tmp_path, options):
    """Straight on = half, resume, half, bit for bit: networks, optimisers, fp16's loss scale."""
    half = 2
    options = {"save_every": half, **options}
    train.main(tiny_config(small, tmp_path / "straight", steps=2 * half, **options))
    train.main(tiny_config(small, tmp_path / "resumed", steps=half, **options))
    train.main(tiny_config(small, tmp_path / "resumed", steps=2 * half, **options))
    same_run(tmp_path / "straight", tmp_path / "resumed")
    assert len(scalars(tmp_path / "resumed")) == 2 * half
    state = torch.load(tmp_path / "resumed/checkpoint.pt", weights_only=True)
    assert ("G_ema" in state) == (options.get("ema") != 0)
    assert bool(state["G"]["scaler"]) == (options.get("amp") == "fp16")


LONGER = {**TINY, "steps": 6, "save_every": 2}
SAME = {**LONGER, "warmup": 50}  # in this process, where tiny_config would make the warm-up shorter


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """The folder of a run that nobody interrupts."""
    out = tmp_path_factory.mktemp("straight") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.main(tiny_config(small, out, **SAME))
    torch.set_num_threads(threads)
    return out


@pytest.mark.slow
def test_an_interrupted_run_goes_on_exactly(small, tmp_path, straight, one_thread):
    """A cluster's pre-emption: the step is finished and saved, and the same options go on as if
    nothing had been. (Ctrl-C takes the same way.)"""
    out = tmp_path / "run"
    options = {**LONGER, **small, "out": out}
    process = start("train.py", options, until=out / "checkpoint.pt")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 0 and "go on with: python " in said.splitlines()[-1]
    done = int(said.split("after step ")[1].split(";")[0])
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert 2 <= done == state["step"] < 6

    train.main(tiny_config(small, out, **SAME))
    same_run(straight, out)
    assert (straight / "config.json").read_text() == (out / "config.json").read_text()


def test_ctrl_c_ends_with_its_own_code(capsys):
    signals = Signals(ALONE)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit) as caught:
        signals.leave(3)
    assert caught.value.code == 130 and "saved after step 3" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):  # a second one does not wait for the step's end
        signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_a_step_is_left_between_its_parts(small, tmp_path, monkeypatch):
    """SIGTERM while the first of two parts is computed: torchrun waits 30 s, a step may take as
    long. Nothing of the step remains; it is drawn again."""
    options = {"accumulate": 2, "steps": 3, "save_every": 3}
    train.main(tiny_config(small, tmp_path / "straight", **options))
    original, drawn = train.draw_batch, []

    def told(run, step, *rows):
        drawn.append(step)
        if drawn == [0, 0, 1]:
            signal.raise_signal(signal.SIGTERM)
        return original(run, step, *rows)

    monkeypatch.setattr(train, "draw_batch", told)
    with pytest.raises(SystemExit) as left:
        train.main(tiny_config(small, tmp_path / "run", **options))
    assert left.value.code == 0 and drawn == [0, 0, 1]
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 1
    train.main(tiny_config(small, tmp_path / "run", **options))
    same_run(tmp_path / "straight", tmp_path / "run")


def test_a_run_told_to_stop_in_its_first_step_leaves_nothing(small, tmp_path, monkeypatch):
    original = train.draw_batch

    def told(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(train, "draw_batch", told)
    with pytest.raises(SystemExit):
        train.main(tiny_config(small, tmp_path / "run", steps=3, accumulate=2))
    assert set(files(tmp_path / "run")) == {"config.json", "samples_000000.png"}


def test_a_run_is_saved_by_the_minute(small, tmp_path, monkeypatch):
    """Whatever a step takes: here every two fifths of --save-minutes."""
    original = Log.add

    def slow(log, *arguments):
        original(log, *arguments)
        log.saved -= 0.4 * 60 * 5

    monkeypatch.setattr(Log, "add", slow)
    train.main(tiny_config(small, tmp_path / "run", steps=7, save_minutes=5))
    saved = sorted(path.stem for path in (tmp_path / "run").glob("samples_*"))
    assert saved == ["samples_000000", "samples_000003", "samples_000006", "samples_000007"]


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly(small, tmp_path, straight, one_thread):
    """kill -9 at a random moment, in the middle of a step or of a write."""
    out = tmp_path / "run"
    options = {**LONGER, **small, "out": out}
    process = start("train.py", options, until=out / "checkpoint.pt")
    delay = random.Random().uniform(0, 0.6)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"it had ended after {delay} s"
    train.main(tiny_config(small, out, **SAME))
    same_run(straight, out)


@pytest.mark.slow
def test_keep_leaves_the_newest_checkpoints(small, tmp_path):
    """--keep 2: checkpoint.pt and the newest two under the names of their steps, which stay as they
    were when the run goes on."""
    out, options = tmp_path / "run", {"save_every": 1, "keep": 2}
    train.main(tiny_config(small, out, steps=2, **options))
    before = files(out)
    train.main(tiny_config(small, out, steps=3, **options))
    after = files(out)
    for stem, suffix in (("checkpoint", "pt"), ("generator", "safetensors")):
        kept = {name for name in after if name.startswith(stem)}
        numbered = [f"{stem}_{step:06d}.{suffix}" for step in (2, 3)]
        assert kept == {f"{stem}.{suffix}", *numbered}
        assert after[numbered[0]] == before[f"{stem}.{suffix}"] == before[numbered[0]]
        assert after[numbered[1]] == after[f"{stem}.{suffix}"] != before[f"{stem}.{suffix}"]


@pytest.mark.slow
def test_going_back_to_an_older_checkpoint(small, tmp_path):
    """Its copy over checkpoint.pt is all it takes; the steps after it are done again."""
    out, options = tmp_path / "run", {"save_every": 1, "keep": 3}
    train.main(tiny_config(small, out, steps=3, **options))
    whole = shutil.copytree(out, tmp_path / "whole")
    shutil.copyfile(out / "checkpoint_000002.pt", out / "checkpoint.pt")
    steps = []
    original = train.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "training_step", lambda r, k: (steps.append(k), original(r, k))[1])
        train.main(tiny_config(small, out, steps=3, **options))
    assert steps == [2]  # the third
    same_run(whole, out)
    for k in (1, 2, 3):
        state = torch.load(out / f"checkpoint_00000{k}.pt", weights_only=True)
        assert state["step"] == k


def test_what_comes_after_going_back_is_kept(tmp_path):
    """--keep 2: the newest copies are those written last, whatever their steps."""
    for step in (800, 900, 500, 600):
        (tmp_path / "checkpoint.pt").write_text(str(step))
        (tmp_path / "generator.safetensors").write_text(str(step))
        keep_copies(tmp_path, step, 2)
        time.sleep(0.01)
    left = sorted(path.stem for path in tmp_path.glob("*_*"))
    assert left == [f"{name}_000{k}" for name in ("checkpoint", "generator") for k in (500, 600)]


def test_without_regression_line_4_keeps_its_samples():
    """The paired rows of sd15 serve the KL gradient too; those of the EDM datasets do not."""
    for dataset, options, rows in (
        ("sd15", {"lambda_reg": 0.0}, (2304, 1152)), ("mnist", {"lambda_reg": 0.0}, (16, 0)),
        ("sd15", {"lambda_dm": 0.0}, (0, 1152)),
    ):  # fmt: skip
        split = train.split_batch(get_workload(dataset, **options), ALONE)
        assert [tuple(map(len, part)) for part in split] == [rows]


# --------------------------------------------------------------------------------------------------
# Half precision


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_computes_the_same(small, tmp_path, amp):
    """The first steps' losses, to 1 %. (loss_kl starts as 0, where rounding is all there is.)"""
    for name in ("off", amp):
        options = {"steps": 2, "amp": name, "learning_rate": 4e-4, "beta1": 0.9}
        train.main(tiny_config(small, tmp_path / name, **options))
    one, two = (torch.tensor([[float(x) for x in row] for row in scalars(tmp_path / name)])
                for name in ("off", amp))  # fmt: skip
    assert not torch.equal(one, two)
    torch.testing.assert_close(two[:, 1:3], one[:, 1:3], rtol=1e-2, atol=0)
    torch.testing.assert_close(two[:, 0], one[:, 0], rtol=1e-1, atol=1e-2)
    G, _ = load_generator(tmp_path / amp / "generator.safetensors")
    assert {p.dtype for p in G.parameters()} == {torch.float32}


def update_of(amp):
    """A network of one layer, and the Learner that trains it."""
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 1)
    options = {"warmup": 0, "betas": (0.9, 0.999), "weight_decay": 0}
    return network, Learner(network, ALONE, 1e-3, **options, grad_clip=10.0, fp16=amp == "fp16")


def test_an_overflow_under_fp16_skips_the_step():
    """An infinite gradient is no step: weights and AdamW's count stay, the scale is lowered."""
    network, update = update_of("fp16")
    x, before = torch.ones(2, 3), copy.deepcopy(network.state_dict())
    scale = update.scaler.get_scale()
    update.backward(1e36 * network(x).sum())
    assert not update.step(0).isfinite()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(state["step"] == 0 for state in update.optimizer.state.values())
    assert update.scaler.get_scale() == scale / 2

    update.backward(network(x).sum())
    norm = update.step(0)  # of the true gradient, not of the scaled one: |(2, 2, 2, 2)|
    assert norm.item() == pytest.approx(4.0)
    assert not torch.equal(network.weight, before["weight"]) and network.weight.isfinite().all()


def test_gradients_are_clipped_to_the_norm():
    """With and without fp16's scale. The gradient is looked at, for AdamW would not notice."""
    for amp in ("off", "fp16"):
        network, update = update_of(amp)
        seen = []
        update.optimizer.register_step_pre_hook(
            lambda *_, net=network, seen=seen: seen.append(net.weight.grad.clone())
        )
        update.backward(100 * network(torch.ones(1, 3)).sum())
        assert update.step(0).item() == pytest.approx(200.0)
        torch.testing.assert_close(seen[0], torch.full((1, 3), 5.0), rtol=1e-4, atol=0)
        assert network.weight.grad is None


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stops_the_run(value):
    """Except fp16's gradients, which the scaler takes care of."""
    for amp in ("off", "bf16", "fp16"):
        log = Log(ALONE, 0, 9, [], fp16=amp == "fp16")
        for at, name in enumerate(SCALARS):
            row = [value if i == at else 1.0 for i in range(5)]
            if amp == "fp16" and name in ("grad_norm_G", "grad_norm_fake"):
                log.check(0, row)
                continue
            with pytest.raises(UserError, match=rf"{name} is {value} at step 1"):
                log.check(0, row)


def test_an_infinite_gradient_stops_the_run(small, tmp_path, monkeypatch):
    """The loss is 0, its gradient is not: nothing is saved of what the step made of the weights."""
    monkeypatch.setattr(train, "l2_distance", lambda x, y: 1e37 * (x - x.detach()))
    with pytest.raises(UserError, match=r"grad_norm_G is (nan|inf) at step 1"):
        train.main(tiny_config(small, tmp_path / "run", steps=1))
    assert set(files(tmp_path / "run")) == {"config.json", "samples_000000.png"}


# --------------------------------------------------------------------------------------------------
# The losses that take part


def test_lpips_trains(small, tmp_path, monkeypatch):
    """A step with the real LPIPS on a random VGG; it is no distance of its own weights' making."""
    monkeypatch.setattr(lpips, "LPIPS", partial(lpips.LPIPS, pnet_rand=True))
    config = tiny_config(small, tmp_path / "run", steps=1, distance="lpips", batch_size_ref=1)
    network = train.load_lpips(torch.device("cpu"))
    distance = partial(train.lpips_distance, network)
    x, y = torch.randn(2, 1, 28, 28, requires_grad=True), torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(distance(y, y), torch.zeros(2, 1, 1, 1))
    apart = distance(x, y)
    assert (apart > 0).all()
    apart.sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    monkeypatch.setattr(train, "load_lpips", lambda _: network)  # VGG takes long to make
    train.main(config)
    row = next(csv.DictReader((tmp_path / "run/log.csv").read_text().splitlines()))
    assert float(row["loss_reg"]) > 0


def test_lpips_without_its_weights(pairs, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth into .*empty.* or use --distance l2"):
        train.main(tiny_config(pairs, tmp_path / "run", distance="lpips"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("weight", "losses"),
    [
        ("lambda_dm", ["distribution_matching_loss", "denoising_loss"]),
        ("lambda_reg", ["regression_loss"]),
    ],
)
def test_table_2s_ablations(small, tmp_path, monkeypatch, weight, losses):
    """A loss of weight 0 has no say, and costs nothing: it is not computed, nor are its samples."""

    def never(*_, **__):
        raise AssertionError("computed in vain")

    batches = []
    original = train.draw_batch

    def spy(*arguments):
        batches.append(original(*arguments))
        return batches[-1]

    for name in losses:
        monkeypatch.setattr(train, name, never)
    monkeypatch.setattr(train, "draw_batch", spy)
    train.main(tiny_config(small, tmp_path / "run", steps=2, **{weight: 0.0}))
    counts = {(len(batch.z), len(batch.z_ref)) for batch in batches}
    assert counts == {(0, 4) if weight == "lambda_dm" else (4, 0)}
    changed = [SCALARS[i] for i in range(5) if float(scalars(tmp_path / "run")[1][i])]
    assert changed == (
        ["loss_reg", "grad_norm_G"]
        if weight == "lambda_dm"
        else ["loss_kl", "loss_denoise", "grad_norm_G", "grad_norm_fake"]
    )


@pytest.mark.parametrize("weight", ["lambda_dm", "lambda_reg"])
def test_both_losses_count(small, tmp_path, monkeypatch, weight):
    """The counterpart: with their weights, either one changes the generator."""
    name = {"lambda_dm": "distribution_matching_loss", "lambda_reg": "regression_loss"}[weight]
    original = getattr(train, name)

    def tripled(*arguments, **options):
        return 3 * original(*arguments, **options)

    def generator(out):
        train.main(tiny_config(small, tmp_path / out, steps=2))
        tensors, _ = read_tensors(tmp_path / out / "generator.safetensors")
        return torch.cat([value.flatten() for value in tensors.values()])

    first = generator("once")
    monkeypatch.setattr(train, name, tripled)
    assert not torch.equal(generator("tripled"), first)


def test_lpips_is_not_loaded_in_vain(small, tmp_path, monkeypatch):
    """Without the regression its half gigabyte of VGG is neither downloaded nor kept in memory."""

    def never(**_):
        raise AssertionError("loaded in vain")

    monkeypatch.setattr(lpips, "LPIPS", never)
    options = {"steps": 1, "distance": "lpips", "lambda_reg": 0.0}
    train.main(tiny_config(small, tmp_path / "run", **options))


@pytest.mark.parametrize("weighting", ["alg2", "dreamfusion", "prolificdreamer"])
def test_every_weighting_trains(small, tmp_path, weighting):
    train.main(tiny_config(small, tmp_path / "run", steps=1, weighting=weighting))
    assert json.loads((tmp_path / "run/config.json").read_text())["weighting"] == weighting


def test_a_folder_with_another_run_is_left_alone(finished_run, pairs, tmp_path):
    before = files(finished_run)
    with pytest.raises(UserError, match="another lambda_reg, seed"):
        train.main(tiny_config(pairs, finished_run, steps=2, seed=3, lambda_reg=0.3))
    assert files(finished_run) == before
    for mine in ("thesis.txt", "config.json"):
        folder = tmp_path / mine
        folder.mkdir()
        (folder / mine).write_text("{}")
        with pytest.raises(UserError, match="holds other files"):
            train.main(tiny_config(pairs, folder, steps=1))
        assert files(folder) == {mine: b"{}"}


def test_nan_stops_the_run_and_keeps_the_checkpoint(small, tmp_path, monkeypatch):
    out = tmp_path / "run"
    options = {"save_every": 1}
    train.main(tiny_config(small, out, steps=1, **options))
    before = files(out)
    monkeypatch.setattr(train, "l2_distance", lambda x, y: (x - y) * float("nan"))
    with pytest.raises(UserError, match="loss_reg is nan at step 2"):
        train.main(tiny_config(small, out, steps=2, **options))
    after = files(out)
    assert after["checkpoint.pt"] == before["checkpoint.pt"]
    assert after["generator.safetensors"] == before["generator.safetensors"]


def test_damaged_checkpoint(finished_run, pairs, tmp_path):
    out = shutil.copytree(finished_run, tmp_path / "run")
    data = (out / "checkpoint.pt").read_bytes()
    for size in (len(data) // 2, 0):
        (out / "checkpoint.pt").write_bytes(data[:size])
        with pytest.raises(UserError, match="cannot be resumed"):
            train.main(tiny_config(pairs, out, steps=2))


def test_a_run_that_never_saved_starts_anew(small, tmp_path, monkeypatch):
    """A full disk at the first save (as torch.save tells it): one line. What was written before
    the checkpoint belongs to those settings; of a run that left nothing others may take over."""

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"cannot write .*checkpoint.pt: .*enforce fail"):
            train.main(tiny_config(small, tmp_path / "run", steps=1))
    assert not (tmp_path / "run/checkpoint.pt").exists()
    before = files(tmp_path / "run")
    with pytest.raises(UserError, match="made with another lambda_reg"):
        train.main(tiny_config(small, tmp_path / "run", steps=1, lambda_reg=0.3))
    assert files(tmp_path / "run") == before
    train.main(tiny_config(small, tmp_path / "run", steps=1))
    assert (tmp_path / "run/checkpoint.pt").exists()

    for path in (tmp_path / "run").iterdir():
        if path.name != "config.json":
            path.unlink()
    train.main(tiny_config(small, tmp_path / "run", steps=1, lambda_reg=0.3))
    assert json.loads((tmp_path / "run/config.json").read_text())["lambda_reg"] == 0.3


def test_other_pairs_are_another_run(finished_run, pairs, tmp_path):
    other = shutil.copytree(pairs, tmp_path / "pairs")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"seed": 5}))
    with pytest.raises(UserError, match="another made_pairs"):
        train.main(tiny_config(other, finished_run, steps=2))


@pytest.mark.parametrize(
    ("option", "message"),
    [({"steps": 0}, "--steps"), ({"ema": 1.5}, "--ema"), ({"lambda_reg": -1.0}, "--lambda-reg"),
     ({"learning_rate": float("nan")}, "--learning-rate"),
     ({"seed": -1}, "--seed"),
     ({"accumulate": 0}, "--accumulate"), ({"keep": 0}, "--keep"),
     ({"max_dm_step": 20}, "--max-dm-step"), ({"max_dm_step": 1001}, "--max-dm-step"),
     ({"lambda_dm": 0.0, "lambda_reg": 0.0}, "nothing to learn")],
)  # fmt: skip
def test_options_out_of_range(small, tmp_path, option, message):
    with pytest.raises(UserError, match=message):
        train.main(tiny_config(small, tmp_path / "run", **option))
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# Pairs that do not fit


def test_pairs_that_cannot_be_used(pairs, tmp_path):
    def start(folder, **options):
        train.main(tiny_config(folder, tmp_path / "run", steps=1, **options))

    with pytest.raises(UserError, match=r"no pairs in .*make_pairs\.py"):
        start(tmp_path / "nowhere")

    folder = shutil.copytree(pairs, tmp_path / "missing")
    (folder / "shard_00002.safetensors").unlink()
    with pytest.raises(UserError, match="1 of 3 shards miss"):
        start(folder)

    folder = shutil.copytree(pairs, tmp_path / "truncated")
    path = folder / "shard_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"shard_00001.* is damaged"):
        start(folder)

    folder = shutil.copytree(pairs, tmp_path / "short")
    tensors, metadata = read_tensors(folder / "shard_00000.safetensors")
    short = {name: value[:5] for name, value in tensors.items()}
    write_tensors(folder / "shard_00000.safetensors", short, metadata)
    with pytest.raises(UserError, match="does not hold 8 pairs"):
        start(folder)

    meta = json.loads((pairs / "meta.json").read_text())
    for name, change, message in (
        ("dataset", {"dataset": "cifar10"}, "holds pairs of cifar10, not of mnist"),
        ("teacher", {"teacher": {"name": "x", "sha256": "0"}}, "made with another teacher than"),
        ("foreign", {"dataset": None}, r"holds pairs of None.*make_pairs\.py"),
    ):
        folder = shutil.copytree(pairs, tmp_path / name)
        (folder / "meta.json").write_text(json.dumps(meta | change))
        with pytest.raises(UserError, match=message):
            start(folder)

    (folder / "meta.json").write_text('{"dataset": "mn')
    with pytest.raises(UserError, match="is damaged"):
        start(folder)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# Phases (Table 5)

PHASES = (
    (2, {"num_pairs": 8, "lambda_reg": 0.1}),
    (4, {"num_pairs": 16, "max_dm_step": 500, "weighting": "alg2"}),
    (6, {"batch_size": 2, "batch_size_ref": 1}),
)


def test_phases_are_the_same_settings_by_hand(small, tmp_path, capsys, monkeypatch, one_thread):
    """Three phases, straight and interrupted within the second, and every step by hand."""
    plain = tiny_config(small, tmp_path / "by-hand", num_pairs=20, steps=6)
    run, norms = train.prepare(plain, ALONE), []
    prepared = run.config
    for step in range(6):
        changed = next(values for end, values in PHASES if step < end)
        run.config = replace(prepared, **changed)
        run.pairs = Pairs(Path(plain.pairs), "mnist", run.config.num_pairs)
        norms.append(train.training_step(run, step)[3])

    straight = tiny_config(small, tmp_path / "straight", num_pairs=20, steps=6, phases=PHASES)
    train.main(straight)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("from step")]
    assert said == [
        "from step 1 on: {'num_pairs': 8, 'lambda_reg': 0.1}",
        "from step 3 on: {'num_pairs': 16, 'max_dm_step': 500, 'weighting': 'alg2'}",
        "from step 5 on: {'batch_size': 2, 'batch_size_ref': 1}",
    ]
    logged = [float(row[SCALARS.index("grad_norm_G")]) for row in scalars(tmp_path / "straight")]
    assert logged == pytest.approx([float(norm) for norm in norms], rel=1e-4)
    saved = torch.load(tmp_path / "straight" / "checkpoint.pt", weights_only=True)
    for name, value in run.G.network.state_dict().items():
        assert torch.equal(value, saved["G"]["network"][name]), name

    halfway = replace(straight, out=str(tmp_path / "halfway"))
    original = train.training_step

    def stopped(run, step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(run, step)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "training_step", stopped)
        train.main(halfway)
    assert len(scalars(tmp_path / "halfway")) == 3
    train.main(halfway)
    same_run(tmp_path / "straight", tmp_path / "halfway")


def test_a_phase_waits_for_its_pairs(small, tmp_path):
    """What was done is saved; with more pairs, made meanwhile, the run goes on."""
    pairs = tmp_path / "pairs"
    how = {"steps": 3, "shard_size": 8, "device": "cpu", "teacher": small["teacher"], "out": pairs}
    make_pairs.main(pairs_config(num_pairs=8, **how))
    config = tiny_config(
        small | {"pairs": str(pairs)}, tmp_path / "run", num_pairs=20, steps=6, phases=PHASES
    )
    need = r"holds 8 pairs, but 16 are needed now; run: python make_pairs.py .*--num-pairs 16"
    for _ in range(2):
        with pytest.raises(UserError, match=need):
            train.main(config)
        assert len(scalars(tmp_path / "run")) == 2
    first = (pairs / "shard_00000.safetensors").read_bytes()
    make_pairs.main(pairs_config(num_pairs=16, **how))
    assert (pairs / "shard_00000.safetensors").read_bytes() == first
    with pytest.raises(UserError, match="--num-pairs 20"):
        train.main(config)
    make_pairs.main(pairs_config(num_pairs=20, **how))
    train.main(config)
    enough = tiny_config(small, tmp_path / "enough", num_pairs=20, steps=6, phases=PHASES)
    train.main(enough)
    same_run(tmp_path / "run", tmp_path / "enough")


def test_phases_are_checked_before_anything_is_loaded(small, tmp_path):
    with pytest.raises(UserError, match="must be at most 6, where its last phase ends, not 7"):
        tiny_config(small, tmp_path / "run", steps=7, phases=PHASES)
    config = tiny_config(small, tmp_path / "run", steps=6, phases=PHASES, accumulate=2)
    with pytest.raises(UserError, match="--batch-size-ref 1 cannot be split evenly"):
        train.main(config)
    assert not (tmp_path / "run").exists()
