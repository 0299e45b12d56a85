"""minimal.py, and the files that stand alone."""

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from conftest import ROOT, small_network, start
from PIL import Image
from test_edm_files import dumps, edm_network

import train
from benchmarks.reproduce import WRITE_GENERATOR
from edm_unet import EDMPrecond
from teachers import EDMTeacher, load_generator
from workloads import WORKLOADS, get_workload

SOURCE = (ROOT / "minimal.py").read_text(encoding="utf-8")


def run_minimal(folder, monkeypatch, **constants) -> dict:
    """Run minimal.py in a folder, with constants changed as a reader would -> its variables."""
    source = SOURCE
    for name, value in constants.items():
        source, found = re.subn(
            rf"^{name} = .*$", f"{name} = {value!r}", source, flags=re.MULTILINE
        )
        assert found == 1, name
    (folder / "changed.py").write_text(source + WRITE_GENERATOR, encoding="utf-8")
    monkeypatch.chdir(folder)
    return runpy.run_path("changed.py")


def test_its_constants_are_the_default_recipe():
    mnist = WORKLOADS["mnist"]
    found = dict(re.findall(r"^([A-Z_]+) = (\S+)", SOURCE, flags=re.MULTILINE))
    recipe = {"NUM_PAIRS": mnist.num_pairs, "STEPS": mnist.steps, "SEED": mnist.seed}
    recipe |= {"LEARNING_RATE": mnist.learning_rate}
    assert {name: float(found[name]) for name in recipe} == recipe
    assert f"B, R = {mnist.batch_size}, {mnist.batch_size_ref}  #" in SOURCE
    assert f"LAMBDA_REG, T_MAX = {mnist.lambda_reg}, {mnist.max_dm_step}  #" in SOURCE
    assert len(SOURCE.splitlines()) <= 90


def test_its_loop_is_train_pys(tmp_path, monkeypatch):
    """The same draws, taken through train.training_step, give the same average of G; and what
    reproduce.py appends writes it."""
    net = small_network()
    (tmp_path / "net.pkl").write_bytes(dumps({"ema": edm_network(net)}))
    changed = {"TEACHER": "net.pkl", "NUM_PAIRS": 20, "STEPS": 3, "SEED": 5}
    found = run_minimal(tmp_path, monkeypatch, **changed)
    picture = torch.from_numpy(np.array(Image.open("minimal.png"))).permute(2, 0, 1)
    written, _ = load_generator(Path("generator_000003.safetensors"))
    for ours, theirs in zip(written.parameters(), found["average"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    first = found["rows"][0].clamp(-1, 1)
    assert picture.shape == (3, 2 + 3 * 30, 2 + 20 * 30)
    assert ((first + 1) * 127.5 - picture[:, 2:30, 2:30]).abs().max() <= 1

    teacher = EDMTeacher(net, {"name": "small", "sha256": "0"})
    pairs = SimpleNamespace(meta={"guidance": 1.0}, check_teacher=lambda record: None)
    monkeypatch.setattr(train, "load_teacher", lambda config: teacher)
    monkeypatch.setattr(train, "Pairs", lambda *_: pairs)
    options = {"warmup": 0, "device": "cpu", "out": str(tmp_path / "run")}
    run = start(get_workload(**options))

    torch.manual_seed(5)
    z = torch.randn(20, 1, 28, 28)
    y = teacher.solve(z, torch.arange(20) % 10, 18)
    torch.testing.assert_close((found["pairs_z"], found["pairs_y"]), (z, y))

    def draw_batch(run, step, rows, rows_ref):
        draws, (u, u_fake) = torch.randn(3, 16, 1, 28, 28), torch.rand(2, 16)
        cond, k = torch.randint(10, (16,)), torch.randint(20, (4,))
        t, t_fake = (20 + u * 580).long(), (1000 * u_fake).long()
        cond = torch.cat([cond, k % 10])  # pair k has class k mod 10
        return train.Batch(draws[0], z[k], y[k], cond, t, draws[1], t_fake, draws[2])

    monkeypatch.setattr(train, "draw_batch", draw_batch)
    before = torch.cat([p.detach().flatten() for p in run.G.network.parameters()])
    for step in range(3):
        train.training_step(run, step)
    networks = {"average": run.G.average, "G": run.G.network, "mu_fake": run.mu_fake.network}
    for name, network in networks.items():
        theirs, ours = (
            torch.cat([p.detach().flatten() for p in each.parameters()]) - before
            for each in (network, found[name])
        )
        assert (theirs - ours).norm() < 1e-3 * theirs.norm(), name
    run.G.average.load_state_dict(found["average"].state_dict())
    with torch.no_grad():
        bands = torch.cat([y, run.G.average(z, torch.arange(20) % 10)])
    torch.testing.assert_close(found["rows"][:40], bands, rtol=0, atol=1e-5)
    assert len(found["rows"]) == 60 and (found["rows"][40:] - bands[20:]).abs().mean() > 0.1


def test_it_distils_a_network_of_edms(tmp_path, monkeypatch):
    """With the three constants that its comment names, on a small file in that format."""
    torch.manual_seed(0)
    net = EDMPrecond(
        16, 3, label_dim=4, model_type="SongUNet", model_channels=8, channel_mult=[1, 2],
        num_blocks=1, attn_resolutions=[8], augment_dim=9, dropout=0.13,
    ).eval()  # fmt: skip
    (tmp_path / "edm.pkl").write_bytes(dumps({"ema": edm_network(net)}))
    changed = {"TEACHER": "edm.pkl", "LEARNING_RATE": 5e-5, "STEPS": 2}
    found = run_minimal(tmp_path, monkeypatch, NUM_PAIRS=4, **changed)
    moved = [
        (p - q).abs().max()
        for p, q in zip(found["average"].parameters(), net.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 1.5 * 5e-5 * 2
    networks = [found[name] for name in ("G", "mu_fake", "mu_real", "average")]
    assert not any(module.training for network in networks for module in network.modules())
    assert Image.open("minimal.png").mode == "RGB"


def test_the_readme_shows_its_loop():
    start = SOURCE.index("for step in ")
    loop = SOURCE[start : SOURCE.index("\n\n# Rows", start)]
    assert f"```python\n{loop}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")


ALONE = """
import torch
from edm_unet import EDMDenoiser, EDMPrecond, heun_sample
from dmd_loss import OneStepGenerator

net = EDMPrecond(16, 3, 4, "SongUNet", model_channels=8, channel_mult=[1, 2], num_blocks=1).eval()
z, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
x = OneStepGenerator(EDMDenoiser(net))(z, labels)
print(heun_sample(net, z, labels, steps=2).shape, x.shape)
"""


def test_losses_and_networks_stand_alone(tmp_path):
    """Copied into an empty folder, they draw; they bring nothing along but PyTorch."""
    for name in ("dmd_loss.py", "edm_unet.py"):
        shutil.copy(ROOT / name, tmp_path)
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        known = {*sys.stdlib_module_names, "torch", "dmd_loss"}
        assert {name.partition(".")[0] for name in names} <= known
    command = [sys.executable, "-I", "-c", f"import sys; sys.path[:0] = ['.']{ALONE}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("[2, 3, 16, 16]") == 2, done.stderr


LATE = ("sd_loader", "tokenizers", "lpips", "huggingface_hub", "torchvision", "matplotlib")
WATCH = f"""
import json, runpy, sys
import train
print(json.dumps([name for name in {LATE} if name in sys.modules]))
del sys.argv[0]
runpy.run_path("train.py", run_name="__main__")
print(json.dumps([name for name in {LATE} if name in sys.modules]))
"""


def test_mnist_imports_nothing_it_does_not_need(small, tmp_path):
    where = ["--teacher", small["teacher"], "--pairs", small["pairs"], "--out", tmp_path / "run"]
    options = ["--steps", 1, "--batch-size", 2, "--device", "cpu"]
    command = [sys.executable, "-c", WATCH, "train.py", *map(str, where + options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    before, *_, after = done.stdout.splitlines()
    assert json.loads(before) == [] and json.loads(after) == ["torchvision", "matplotlib"], done
