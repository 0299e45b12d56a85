"""train.py: what a run writes, how it resumes, what its options do, and what it refuses."""

import copy
import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import ALONE, ROOT, files, kill_in_write, pairs_config, scalars, start, tiny_config
from PIL import Image
from safetensors import SafetensorError
from torch.amp import GradScaler

import make_pairs
import plumbing.pairs
import train
from benchmarks import cost
from edm_unet import heun_sample
from plumbing import rundir
from plumbing.files import one_line_errors, read_tensors
from plumbing.optim import Learner
from plumbing.options import UserError
from plumbing.pairs import Pairs, sample_noise
from plumbing.rundir import SCALARS, Log, Signals, save_run
from teachers import load_generator
from workloads import get_workload


def prepare(pairs, out, **options):
    """A Run as train.main prepares it."""
    return start(tiny_config(pairs, out, **options))


def same_run(first, second):
    """Assert that two run folders hold the same checkpoint, generator and log, bit by bit."""
    checkpoints = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (first, second)]
    torch.testing.assert_close(*checkpoints, rtol=0, atol=0)
    (one, about), (two, about_two) = (
        read_tensors(run / "generator.safetensors") for run in (first, second)
    )
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert about == about_two and scalars(first) == scalars(second)


def test_run_folder(finished_run):
    assert set(files(finished_run)) == {
        "config.json", "log.csv", "curves.png", "samples_000000.png", "samples_000002.png",
        "training.gif", "checkpoint.pt", "generator.safetensors",
    }  # fmt: skip
    # In step 1 mu_fake still is the teacher, so that the KL gradient is zero.
    (first_kl, *_), (second_kl, *_) = scalars(finished_run)
    assert first_kl == 0 < second_kl
    G, metadata = load_generator(finished_run / "generator.safetensors")
    assert metadata["step"] == "2" and not any(p.requires_grad for p in G.parameters())
    # The shipped teacher is the default, and need not be named by its path in this copy.
    assert "teacher_sha256" in metadata and str(ROOT) not in str(metadata)
    with Image.open(finished_run / "training.gif") as film:  # every picture in turn
        assert film.n_frames == 2
        for frame, step in enumerate((0, 2)):
            film.seek(frame)
            picture = Image.open(finished_run / f"samples_{step:06d}.png")
            assert picture.size == (2 * (2 + 10 * 30), 2 * (2 + 3 * 30))
            difference = np.asarray(film.convert("L"), float) - np.asarray(picture, float)
            assert np.abs(difference).max() < 3


def test_before_training_the_generator_is_the_teachers_one_step(small, tmp_path):
    run = prepare(small, tmp_path / "run")
    z, cond = torch.randn(3, 1, 28, 28), torch.tensor([1, 5, 9])
    with torch.no_grad():
        expected = heun_sample(run.teacher.mu_real.net, z, cond, steps=1)
        torch.testing.assert_close(run.G.network(z, cond), expected)


def test_training_noise_is_not_the_pairs_noise(small, tmp_path):
    """Section 3.3: the two losses have distinct data streams. And no number is drawn twice."""
    run = prepare(small, tmp_path / "run")
    batches = [train.draw_batch(run, step, range(4), range(4)) for step in range(3)]
    drawn = [noise for b in batches for noise in (b.z, b.noise, b.noise_fake)]
    of_pairs = sample_noise("pairs", 0, range(20), (1, 28, 28))
    others = [sample_noise(*key, range(4), (1, 28, 28)) for key in (("pairs", 1), ("samples", 0))]
    every = torch.cat([*drawn, of_pairs, *others]).flatten(1)
    distance = torch.cdist(every, every) + 100 * torch.eye(3 * 3 * 4 + 20 + 8)
    assert distance.min() > 30  # independent ones are sqrt(2 * 784) = 40 apart
    z_ref = torch.cat([b.z_ref for b in batches]).flatten(1)
    assert (torch.cdist(z_ref, of_pairs.flatten(1)).min(dim=1).values < 1e-3).all()


# --------------------------------------------------------------------------------------------------
# Interrupted runs, and phases (Table 5)

PHASES = (
    (2, {"num_pairs": 8, "lambda_reg": 0.1}),
    (4, {"num_pairs": 16, "max_dm_step": 500, "weighting": "alg2"}),
    (6, {"batch_size": 2, "batch_size_ref": 2}),
)
PHASED = {"num_pairs": 20, "steps": 6, "accumulate": 2, "phases": PHASES}


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """The folder of a run in phases and parts that nobody interrupts."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train.main(tiny_config(small, out, **PHASED))
    return out


def test_phases_are_the_same_settings_by_hand(small, tmp_path, straight):
    run, logged = prepare(small, tmp_path / "run", **PHASED | {"phases": ()}), []
    prepared = run.config
    for step in range(6):
        run.config = replace(prepared, **PHASES[step // 2][1])
        run.pairs = Pairs(Path(small["pairs"]), "mnist", run.config.num_pairs)
        logged.append([value.item() for value in train.training_step(run, step)])
    torch.testing.assert_close(logged, scalars(straight), rtol=1e-4, atol=0)
    saved = torch.load(straight / "checkpoint.pt", weights_only=True)["G"]["network"]
    torch.testing.assert_close(dict(run.G.network.state_dict()), dict(saved), rtol=0, atol=0)


def stop_at(monkeypatch, *steps):
    """Send SIGTERM when batches for just these steps are drawn, one after the other."""
    original, drawn = train.draw_batch, []

    def told(run, step, *rows):
        drawn.append(step)
        if drawn == [*steps]:
            signal.raise_signal(signal.SIGTERM)
        return original(run, step, *rows)

    monkeypatch.setattr(train, "draw_batch", told)


def test_an_interrupted_run_resumes_exactly(small, tmp_path, straight, monkeypatch, capsys):
    """SIGTERM in the first part of a step in two parts: torchrun waits 30 s, and a step may take as
    long. Nothing of the step remains, and it is drawn again."""
    out = tmp_path / "run"
    stop_at(monkeypatch, 0, 0, 1, 1, 2, 2, 3)
    with pytest.raises(SystemExit) as left:
        train.main(tiny_config(small, out, **PHASED))
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert left.value.code == 0 and state["step"] == 3 and "G_ema" in state
    train.main(tiny_config(small, out, **PHASED))
    same_run(straight, out)
    said = [line for line in capsys.readouterr().out.splitlines() if line[:5] in ("from ", "inter")]
    first, second, third = (values for _, values in PHASES)
    assert said == [
        f"from step 1 on: {first}", f"from step 3 on: {second}",
        "interrupted and saved after step 3; resume with the same command",
        f"from step 4 on: {second}", f"from step 5 on: {third}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "time", "done"), [("checkpoint.pt", 2, 2), ("generator.safetensors", 3, 6)]
)
def test_a_killed_run_resumes_exactly(small, tmp_path, straight, name, time, done):
    """kill -9 in the second checkpoint, when log.csv is newer, and in the last generator."""
    config = tiny_config(small, tmp_path / "run", **PHASED)
    kill_in_write(train.main, config, name, time)
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert state["step"] == done and len(scalars(tmp_path / "run")) == 2 * time
    train.main(config)
    same_run(straight, tmp_path / "run")
    assert files(straight).keys() == files(tmp_path / "run").keys()


@pytest.mark.parametrize("links", [True, False])
def test_the_folder_for_diffusers_with_and_without_links(tmp_path, monkeypatch, links):
    """On a file system without symbolic links it holds a copy, which the next save renews."""
    if not links:
        monkeypatch.setattr(Path, "symlink_to", Mock(side_effect=OSError(95, "not supported")))
    weights = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    for content in (b"first", b"second"):
        (tmp_path / "generator.safetensors").write_bytes(content)
        rundir.save_unet_folder(tmp_path, {"sample_size": 64})
        assert weights.read_bytes() == content and weights.is_symlink() == links
    assert len(files(tmp_path / "unet")) == 2


def test_a_phase_waits_for_its_pairs(small, tmp_path, straight):
    """What was done is saved; with more pairs, made meanwhile, the run resumes."""
    pairs = tmp_path / "pairs"
    how = {"steps": 3, "shard_size": 8, "device": "cpu", "teacher": small["teacher"], "out": pairs}
    config = tiny_config(small | {"pairs": str(pairs)}, tmp_path / "run", **PHASED)
    for count, needed, done in ((8, 16, 2), (16, 20, 4)):
        make_pairs.main(pairs_config(num_pairs=count, **how))
        need = f"holds {count} pairs, but {needed} are needed now; run: python make_pairs.py .*"
        with pytest.raises(UserError, match=f"{need} --num-pairs {needed}"):
            train.main(config)
        assert len(scalars(tmp_path / "run")) == done
    make_pairs.main(pairs_config(num_pairs=20, **how))
    train.main(config)
    same_run(tmp_path / "run", straight)


def test_phases_are_checked_before_anything_is_loaded(small, tmp_path):
    with pytest.raises(UserError, match="must be at most 6, where its last phase ends, not 7"):
        tiny_config(small, tmp_path / "run", **PHASED | {"steps": 7})
    with pytest.raises(UserError, match="--batch-size-ref 2 cannot be split evenly"):
        prepare(small, tmp_path / "run", **PHASED | {"accumulate": 4})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("parts", "said"), [(1, "saved after step 1"), (2, "in the first step")])
def test_a_run_told_to_stop_in_its_first_step(small, tmp_path, monkeypatch, capsys, parts, said):
    """A step in one part is finished and saved; one in several parts leaves nothing."""
    stop_at(monkeypatch, 0)
    with pytest.raises(SystemExit):
        train.main(tiny_config(small, tmp_path, steps=3, accumulate=parts))
    assert f"{said}; resume with" in capsys.readouterr().out
    assert ("checkpoint.pt" in files(tmp_path)) == (parts == 1)
    assert parts == 1 or files(tmp_path).keys() == {"config.json", "samples_000000.png"}


def test_ctrl_c_ends_with_its_own_code(capsys):
    signals = Signals(ALONE)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit) as caught:
        signals.leave(3)
    assert caught.value.code == 130 and "saved after step 3" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):  # a second one does not wait for the step's end
        signal.raise_signal(signal.SIGINT)


def test_a_run_is_saved_by_the_minute(small, tmp_path, monkeypatch):
    """Whatever a step takes: here two fifths of --save-minutes."""
    original = Log.add

    def slow(log, *arguments):
        original(log, *arguments)
        log.saved -= 0.4 * 60 * 5

    monkeypatch.setattr(Log, "add", slow)
    train.main(tiny_config(small, tmp_path / "run", steps=5, save_minutes=5))
    saved = sorted(path.stem for path in (tmp_path / "run").glob("samples_*"))
    assert saved == ["samples_000000", "samples_000003", "samples_000005"]


def test_keep_leaves_the_newest_checkpoints_to_go_back_to(small, tmp_path, monkeypatch):
    """--keep 2. A copy over checkpoint.pt is all it takes to do the steps after it again."""
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

    whole = shutil.copytree(out, tmp_path / "whole")
    shutil.copyfile(out / "checkpoint_000002.pt", out / "checkpoint.pt")
    original, steps = train.training_step, []
    monkeypatch.setattr(train, "training_step", lambda r, k: (steps.append(k), original(r, k))[1])
    for name in ("samples_000009.png", "samples_best.png"):  # a future that is given up; the user's
        (out / name).touch()
    train.main(tiny_config(small, out, steps=3, **options))
    assert steps == [2]  # the third
    assert "samples_000009.png" not in files(out) and "samples_best.png" in files(out)
    (out / "samples_best.png").unlink()
    same_run(whole, out)


def test_what_comes_after_going_back_is_kept(tmp_path):
    """--keep 2: the newest copies are those written last, whatever their steps."""
    row = dict.fromkeys(["step", *SCALARS, "learning_rate", "images_per_s"], "1")
    for age, step in enumerate((800, 900, 500, 600)):
        what = ([row], {"step": step}, ({}, {}), lambda: [torch.zeros(1, 1, 2, 2)])
        save_run(tmp_path, step, *what, film=False, unet_config=None, keep=2)
        for path in tmp_path.glob(f"*_000{step}.*"):
            os.utime(path, (age, age))
    left = sorted(path.stem for path in tmp_path.glob("*_000*") if path.suffix != ".png")
    assert left == [f"{name}_000{k}" for name in ("checkpoint", "generator") for k in (500, 600)]


# --------------------------------------------------------------------------------------------------
# Half precision, and numbers that are not finite


def test_half_precision_computes_the_same(small, tmp_path):
    """The first steps' losses, to 1 %. (loss_kl starts as 0, where rounding is all there is.)"""
    found = {}
    for amp in ("off", "bf16", "fp16"):
        run = prepare(small, tmp_path / amp, amp=amp, learning_rate=4e-4, beta1=0.9)
        found[amp] = torch.stack([torch.stack(train.training_step(run, k)) for k in range(2)])
        assert {p.dtype for p in run.G.network.parameters()} == {torch.float32}
        assert not torch.equal(found[amp], found["off"]) or amp == "off"
        assert torch.backends.cudnn.allow_tf32 == (amp != "off")  # float32 is float32
        torch.testing.assert_close(found[amp][:, 1:3], found["off"][:, 1:3], rtol=1e-2, atol=0)
        torch.testing.assert_close(found[amp][:, 0], found["off"][:, 0], rtol=1e-1, atol=1e-2)


def test_an_overflow_under_fp16_skips_the_step():
    """An infinite gradient is no step: weights and AdamW's count stay, the scale is lowered."""
    torch.manual_seed(0)
    network, x = torch.nn.Linear(3, 1), torch.ones(2, 3)
    options = {"warmup": 0, "betas": (0.9, 0.99), "weight_decay": 0, "grad_clip": 1, "fp16": True}
    learner = Learner(network, ALONE, 1e-3, **options)
    before, scale = copy.deepcopy(network.state_dict()), learner.scaler.get_scale()
    learner.backward(1e36 * network(x).sum())
    assert not learner.step(0).isfinite()
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert all(state["step"] == 0 for state in learner.optimizer.state.values())
    assert learner.scaler.get_scale() == scale / 2

    learner.backward(network(x).sum())
    norm = learner.step(0)  # of the true gradient, not of the scaled one: |(2, 2, 2, 2)|
    assert norm.item() == pytest.approx(4.0)
    moments = [state["exp_avg"].flatten() for state in learner.optimizer.state.values()]
    assert torch.cat(moments).norm().item() == pytest.approx(0.1)  # of the gradient clipped to 1
    assert not torch.equal(network.weight, before["weight"]) and network.weight.isfinite().all()

    resumed = Learner(network, ALONE, 1e-3, **options)
    resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
    torch.testing.assert_close(resumed.state_dict(), learner.state_dict(), rtol=0, atol=0)


def test_fp16_that_skips_every_step_ends_the_run(small, tmp_path, monkeypatch):
    """A finite loss with a NaN gradient: every step is skipped, and halves the loss scale."""
    monkeypatch.setattr(train, "l2_distance", lambda x, y: (x - x.detach()).abs().sqrt())
    options = {"steps": 40, "save_every": 10, "batch_size": 1, "batch_size_ref": 1}
    config = tiny_config(small, tmp_path / "run", amp="fp16", **options)
    with pytest.raises(UserError, match=r"loss scale is 0\.\d+ at step 20; .* --amp bf16"):
        train.main(config)
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert state["step"] == 10 and state["G"]["scaler"]["scale"] == 2**6


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stops_the_run(value):
    """Except fp16's gradients, which the scaler takes care of."""
    for at, name in enumerate(SCALARS):
        row = [value if i == at else 1.0 for i in range(5)]
        with pytest.raises(UserError, match=rf"{name} is {value} at step 1"):
            Log(ALONE, 0, 9, [], [GradScaler("cpu", enabled=name.startswith("loss"))]).check(0, row)
        if name.startswith("grad_norm"):
            Log(ALONE, 0, 9, [], [GradScaler("cpu")]).check(0, row)


@pytest.mark.parametrize(("distance", "message"), [
    (lambda x, y: (x - y) * math.nan, "loss_reg is nan at step 3"),
    # The loss is 0, its gradient is not.
    (lambda x, y: 1e37 * (x - x.detach()), r"grad_norm_G is (nan|inf) at step 3"),
])  # fmt: skip
def test_nan_stops_the_run(finished_run, pairs, tmp_path, monkeypatch, distance, message):
    """And what was saved stays."""
    out = shutil.copytree(finished_run, tmp_path / "run")
    monkeypatch.setattr(train, "l2_distance", distance)
    with pytest.raises(UserError, match=message):
        train.main(tiny_config(pairs, out, steps=3))
    after, before = files(out), files(finished_run)
    assert {name for name in before if after[name] != before[name]} <= {"config.json"}
    assert after.keys() == before.keys()


# --------------------------------------------------------------------------------------------------
# The losses that take part


def test_lpips_trains(small, tmp_path, monkeypatch, random_lpips):
    """At a smaller size: it is 0 for equal images only. G learns from it, the VGG does not."""
    monkeypatch.setattr(train, "lpips_distance", partial(train.lpips_distance, size=64))
    run = prepare(small, tmp_path / "run", distance="lpips", lambda_dm=0.0)
    x, y = torch.randn(2, 1, 1, 28, 28)
    apart, same = run.distance(torch.cat([x, y]), torch.cat([y, y]))
    assert apart > 0 and same == 0
    _, loss_reg, _, norm_G, _ = train.training_step(run, 0)
    assert loss_reg > 0 and norm_G > 0
    (network,) = run.distance.args
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_lpips_without_its_weights(small, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=URLError("no network")))
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda layer: None)  # takes a second
    words = r"empty.*vgg16-397923af\.pth cannot be .* or use --distance l2"
    with pytest.raises(UserError, match=words):
        prepare(small, tmp_path / "run", distance="lpips")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("weight", "losses", "expected"), [
    ("lambda_dm", ["distribution_matching_loss", "denoising_loss"], [1, 3]),
    ("lambda_reg", ["regression_loss", "load_lpips"], [0, 2, 3, 4]),
])  # fmt: skip
def test_table_2s_ablations(small, tmp_path, monkeypatch, weight, losses, expected):
    """A loss of weight 0 is not computed; nor is LPIPS, half a gigabyte of VGG, loaded for it."""
    for name in losses:
        monkeypatch.setattr(train, name, None)
    distance = "lpips" if weight == "lambda_reg" else "l2"
    run = prepare(small, tmp_path / "run", distance=distance, **{weight: 0.0})
    train.training_step(run, 0)
    found = train.training_step(run, 1)  # in the first step mu_fake is the teacher
    assert [i for i in range(5) if found[i] != 0] == expected


# --------------------------------------------------------------------------------------------------
# What is refused


def test_a_folder_with_another_run_is_left_alone(finished_run, pairs, tmp_path):
    before = files(finished_run)
    with pytest.raises(UserError, match="another lambda_reg, seed;"):
        train.main(tiny_config(pairs, finished_run, steps=2, seed=3, lambda_reg=0.3))
    other = shutil.copytree(pairs, tmp_path / "pairs")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"seed": 5}))
    with pytest.raises(UserError, match="another made_pairs;"):
        train.main(tiny_config(other, finished_run, steps=2))
    assert files(finished_run) == before


@pytest.mark.parametrize("fraction", [0, 0.5])
def test_damaged_checkpoint(finished_run, pairs, tmp_path, fraction):
    out = shutil.copytree(finished_run, tmp_path / "run")
    os.truncate(out / "checkpoint.pt", int(fraction * os.path.getsize(out / "checkpoint.pt")))
    with pytest.raises(UserError, match=r"checkpoint\.pt cannot be resumed"):
        train.main(tiny_config(pairs, out, steps=2))


def test_a_fault_of_the_machine_is_not_called_damage(finished_run, pairs, monkeypatch):
    for error in (
        MemoryError("9 bytes"),
        OSError(12, "Cannot allocate memory"),
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: Too many open files (os error 24)"),
        RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"),  # torch's words
    ):
        match = rf"^shard cannot be read \(.*{re.escape(str(error))}"
        with pytest.raises(UserError, match=match), one_line_errors(Path("shard")):
            raise error
    shard = pairs / "shard_00000.safetensors"
    with pytest.raises(UserError, match=r"cannot be opened now$"), one_line_errors(shard):
        raise FileNotFoundError(f"No such file or directory: {shard}")  # safetensors: no descriptor
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
    with pytest.raises(UserError, match=r"checkpoint\.pt cannot be read \(.*unable to mmap"):
        train.main(tiny_config(pairs, finished_run, steps=2))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of maps")
def test_few_shards_and_no_checkpoint_are_mapped(small, tmp_path, monkeypatch):
    """65,530 maps are all that a process may have, and Windows replaces no file that is mapped."""
    monkeypatch.setattr(plumbing.pairs, "OPEN_SHARDS", 2)
    out, folder = tmp_path / "run", shutil.copytree(small["pairs"], tmp_path / "pairs")
    options = small | {"pairs": str(folder)}
    train.main(tiny_config(options, out, steps=1))
    run = prepare(options, out, steps=1)
    assert rundir.load_checkpoint(out, run.stateful())[0] == 1
    z, y, cond = run.pairs.batch(range(20))  # of three shards
    mapped = Path("/proc/self/maps").read_text()
    assert mapped.count(f"{folder}/") == 2 * cost.MAPS and f"{out}/checkpoint.pt" not in mapped
    opened = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert sum(str(folder) in path for path in opened) == 2 * cost.DESCRIPTORS
    assert len(z) == len(y) == len(cond) == 20


def test_a_save_that_fails(small, tmp_path, monkeypatch):
    """A run that never saved starts anew. Pictures are written after all else."""
    out, full = (
        tmp_path / "run",
        RuntimeError("[enforce fail at inline_container.cc:664]"),
    )  # torch's
    for module, name, error, match in (
        (torch, "save", full, r"cannot write .*checkpoint.pt: is the disk full.*enforce fail"),
        (rundir, "draw_curves", UserError("cannot be drawn"), "cannot be drawn"),
    ):
        assert not (out / "checkpoint.pt").exists()
        with monkeypatch.context() as patch, pytest.raises(UserError, match=match):
            patch.setattr(module, name, Mock(side_effect=error))
            train.main(tiny_config(small, out, steps=1))
    assert load_generator(out / "generator.safetensors")[1]["step"] == "1"
    train.main(tiny_config(small, out, steps=1))
    assert "samples_000001.png" in files(out) and len(scalars(out)) == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [({"steps": 0}, "--steps"), ({"ema": 1.5}, "--ema"), ({"lambda_reg": -1.0}, "--lambda-reg"),
     ({"learning_rate": math.nan}, "--learning-rate"), ({"seed": -1}, "--seed"),
     ({"accumulate": 0}, "--accumulate"), ({"keep": 0}, "--keep"),
     ({"max_dm_step": 20}, "--max-dm-step"), ({"max_dm_step": 1001}, "--max-dm-step"),
     ({"lambda_dm": 0.0, "lambda_reg": 0.0}, "nothing to learn")],
)  # fmt: skip
def test_options_out_of_range(option, message):
    with pytest.raises(UserError, match=message):
        get_workload(**option)


@pytest.mark.parametrize(("name", "change", "message"), [
    ("shard_00000.safetensors", None, r"1 of 3 shards are missing in .*make_pairs\.py"),
    ("shard_00000.safetensors", lambda data: data[:-1000], r"shard_00000.* is damaged"),
    ("meta.json", None, r"no pairs in .*make_pairs\.py"),
    ("meta.json", lambda data: b"{}", "no pairs in"),
    ("meta.json", lambda data: data[:20], r"meta\.json is damaged"),
    ("meta.json", lambda data: b"[1]", r"meta\.json is damaged or of another kind"),
    ("meta.json", lambda data: data.replace(b": 20", b': "20"'), "num_pairs cannot be '20';"),
    ("meta.json", lambda data: data.replace(b'size": 8', b'size": -8'), "shard_size cannot be"),
    ("meta.json", lambda data: data.replace(b'seed": 0', b'seed": "x"'), "seed cannot be 'x';"),
    ("meta.json", lambda data: data.replace(b'"guidance": ', b'"guidance": -'), "guidance cannot"),
    ("meta.json", lambda data: data.replace(b'size": 8', b'size": 10'), "2 of 2 .* too short; run"),
    ("meta.json", lambda data: data.replace(b"mnist", b"cifar10"), "of cifar10, not of mnist;"),
    ("meta.json", lambda data: data.replace(b'256": "', b'256": "0'), "with another teacher"),
])  # fmt: skip
def test_pairs_that_cannot_be_used(small, tmp_path, name, change, message):
    folder = shutil.copytree(small["pairs"], tmp_path / "pairs")
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if change:
        (folder / name).write_bytes(change(data))
    with pytest.raises(UserError, match=message):
        prepare(small | {"pairs": str(folder)}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
