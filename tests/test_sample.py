"""sample.py: pictures from our generators and from other people's."""

import json

import numpy as np
import pytest
import torch
from conftest import fails_in_one_line, files, run
from PIL import Image

import sample
import teachers
from edm_unet import EDMPrecond
from plumbing.files import read_tensors, write_tensors
from plumbing.options import UserError
from teachers import load_generator
from workloads import ASSETS, WORKLOADS

GENERATOR = ASSETS / "mnist_generator.safetensors"


@pytest.mark.slow
def test_sample_by_command(tmp_path):
    out = tmp_path / "grid.png"
    arguments = ["--checkpoint", GENERATOR, "--seeds", "0-4,9", "--columns", 3, "--out", out]
    result = run("sample.py", *arguments, "--teacher", "--steps", 2)
    assert result.returncode == 0, result.stderr
    times, last = result.stdout.splitlines()
    assert "teacher, 3 evaluations" in times and "times faster" in times
    assert last.startswith(f"wrote {out}: 6 images of mnist from {GENERATOR} (step 1000), teacher")
    assert Image.open(out).size == (2 * (2 + 3 * 30), 2 * (2 + 4 * 30))


def test_an_image_is_a_function_of_its_seed_and_label(tmp_path, monkeypatch, capsys):
    """The shipped generator draws it, because there is no run."""
    monkeypatch.chdir(tmp_path)
    for out, seeds, labels in (("a", "3-6", "1,2,7"), ("b", "5,4", "7,2"), ("c", "5", "4")):
        sample.main(sample.Config(seeds=seeds, labels=labels, out=out, batch_size=2))
        assert "using the shipped MNIST generator" in capsys.readouterr().out
    assert list(files(tmp_path / "a")) == [f"00000{seed}.png" for seed in (3, 4, 5, 6)]
    a, b, c = (np.asarray(Image.open(f"{out}/000005.png"), int) for out in "abc")
    assert a.shape == (56, 56) and np.abs(a - b).max() <= 1  # rounding to uint8
    assert np.abs(a - c).max() > 99  # another label


def test_the_teacher_is_above_the_student(tmp_path):
    bands = torch.linspace(-1, 0.75, 8).reshape(2, 4, 1, 1, 1)  # four images of one pixel each
    sample.write_pictures(tmp_path / "x.png", list(bands), seeds=[0, 1, 2, 3], columns=3)
    pixels = np.asarray(Image.open(tmp_path / "x.png"))[160::192, 160::192]  # 64 + 128 of the gaps
    assert pixels.tolist() == [[0, 32, 64], [128, 159, 191], [96, 255, 255], [223, 255, 255]]


def test_checkpoints_that_cannot_be_used(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(GENERATOR.read_bytes()[:5000])
    tensors, metadata = read_tensors(GENERATOR)
    metadata["kwargs"] = json.dumps(json.loads(metadata["kwargs"]) | {"label_dim": 7})
    write_tensors(tmp_path / "other.safetensors", tensors, metadata)
    for path, words in (
        ("none.safetensors", "does not exist"),
        ("cut.safetensors", "is damaged"),
        ("other.safetensors", "another architecture"),
        (ASSETS / "mnist_teacher.safetensors", "is not a one-step generator"),
        (ASSETS / "mnist_classifier.safetensors", "fits no known network"),
    ):
        with pytest.raises(UserError, match=words):
            sample.main(sample.Config(checkpoint=str(tmp_path / path), out=str(tmp_path / "x.png")))
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("change", [
    {"dataset": ["x"]}, {"dataset": "sd15"}, {"role": None}, {"step": "1\x1b[2J"}, {"step": "1\n2"},
    {"step": 1}, {"sigma": "nan"}, {"sigma": float("nan")}, {"sigma": 10**400}, {"guidance": -1},
    {"guidance": "5"}, {"teacher": "a\nb"}, {"kwargs": "[1]"}, {"kwargs": {}}, {"kwargs": "3"},
])  # fmt: skip
def test_metadata_are_checked(change, tmp_path, run_here):
    tensors, metadata = read_tensors(GENERATOR)
    write_tensors(tmp_path / "G.safetensors", tensors, metadata | change)
    result = run_here("sample.py", "--checkpoint", tmp_path / "G.safetensors")
    fails_in_one_line(result, "G.safetensors")
    assert result.stderr.strip().isprintable()


def test_other_peoples_generators(tmp_path, monkeypatch):
    """The shapes in a bare state dict tell its architecture and dataset. Its sigma is kept."""
    small = WORKLOADS["cifar10"].network | {
        "model_channels": 16, "num_blocks": 1, "channel_mult": [1, 1], "attn_resolutions": [],
    }  # fmt: skip
    monkeypatch.setattr(teachers, "ARCHITECTURES", [small])
    net = EDMPrecond(**small)
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    torch.save({"model_g": state, "model_d": {}}, tmp_path / "model.pt")
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")

    z, cond = torch.randn(2, 3, 32, 32), torch.tensor([3, 8])
    for name, sigma in (("model.pt", 79.56382521581216), ("pytorch_model.bin", 80.0)):
        G, metadata = load_generator(tmp_path / name)
        assert metadata["dataset"] == "cifar10" and G.mu.z_scale == pytest.approx(sigma, rel=1e-6)
        with torch.no_grad():
            expected = net.eval()(sigma * z, sigma, cond)
            torch.testing.assert_close(G(z, cond), expected, rtol=1e-4, atol=1e-4)
        options = {"checkpoint": str(tmp_path / name), "seeds": "0-3"}
        sample.main(sample.Config(**options, out=str(tmp_path / "x.png")))
        assert Image.open(tmp_path / "x.png").mode == "RGB"
