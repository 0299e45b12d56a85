"""sample.py: pictures from our generators and from those of others."""

import json

import numpy as np
import pytest
import torch
from conftest import files, run
from PIL import Image

import sample
import teachers
from edm_unet import EDMPrecond
from plumbing import edm_files
from plumbing.files import read_tensors, write_tensors
from plumbing.options import UserError
from teachers import load_generator
from workloads import ASSETS, WORKLOADS


@pytest.mark.slow
def test_sample_by_command(finished_run, tmp_path):
    out = tmp_path / "grid.png"
    arguments = ["--checkpoint", finished_run, "--seeds", "0-4,9", "--columns", 3, "--out", out]
    result = run("sample.py", *arguments, "--teacher", "--steps", 2)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "teacher, 3 evaluations" in lines[0] and "times faster" in lines[0]
    assert lines[-1].startswith(f"wrote {out}: 6 images of mnist from {finished_run}")
    assert Image.open(out).size == (2 * (2 + 3 * 30), 2 * (2 + 4 * 30))


def test_without_a_run_the_shipped_generator_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample.main(sample.Config(seeds="0-3", labels="7", out="digits"))
    assert "using the shipped MNIST generator" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "digits").iterdir()} == {
        f"{seed:06d}.png" for seed in range(4)
    }
    assert Image.open("digits/000002.png").size == (56, 56)


def test_an_image_is_a_function_of_its_seed_and_label(tmp_path, finished_run):
    def pictures(name, seeds, batch_size):
        options = {"checkpoint": str(finished_run), "seeds": seeds, "batch_size": batch_size}
        sample.main(sample.Config(**options, labels="4", out=str(tmp_path / name)))
        return files(tmp_path / name)

    together, apart = pictures("a", "3-6", 4), pictures("b", "5", 1)
    one, two = (np.asarray(Image.open(tmp_path / name / "000005.png"), int) for name in ("a", "b"))
    assert set(together) > set(apart)
    assert np.abs(one - two).max() <= 1  # rounding to uint8


def test_checkpoints_that_cannot_be_used(tmp_path, finished_run):
    def start(path):
        sample.main(sample.Config(checkpoint=str(path), out=str(tmp_path / "x.png")))

    with pytest.raises(UserError, match="does not exist"):
        start(tmp_path / "none.safetensors")

    good = finished_run / "generator.safetensors"
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(good.read_bytes()[:5000])
    with pytest.raises(UserError, match="is damaged"):
        start(truncated)

    html = tmp_path / "page.safetensors"
    html.write_text("<html>not found</html>" * 100)
    with pytest.raises(UserError, match="is a web page, not weights"):
        start(html)

    with pytest.raises(UserError, match="is not a one-step generator"):
        start(ASSETS / "mnist_teacher.safetensors")
    with pytest.raises(UserError, match="fits no known network"):
        start(ASSETS / "mnist_classifier.safetensors")

    # Another architecture: the recorded arguments do not fit the tensors.
    tensors, metadata = read_tensors(good)
    name = "model.map_layer0.weight"
    other = tmp_path / "other.safetensors"
    write_tensors(other, tensors | {name: torch.zeros(3, 3)}, metadata)
    with pytest.raises(UserError, match=f"1 misshapen \\({name}"):
        start(other)
    write_tensors(other, {k: v for k, v in tensors.items() if k != name}, metadata)
    with pytest.raises(UserError, match=f"1 missing \\({name}"):
        start(other)
    write_tensors(other, tensors | {"extra": torch.zeros(3)}, metadata)
    with pytest.raises(UserError, match="1 surplus \\(extra"):
        start(other)
    kwargs = json.dumps(json.loads(metadata["kwargs"]) | {"label_dim": 7})
    write_tensors(other, tensors, metadata | {"kwargs": kwargs})
    with pytest.raises(UserError, match="another architecture"):
        start(other)
    assert not (tmp_path / "x.png").exists()


def test_generators_of_others(tmp_path, monkeypatch):
    """A bare state dict: its architecture and dataset are told by its shapes, its sigma is kept."""
    small = WORKLOADS["cifar10"].network | {
        "model_channels": 16, "num_blocks": 1, "channel_mult": [1, 1], "attn_resolutions": [],
    }  # fmt: skip
    monkeypatch.setattr(teachers, "ARCHITECTURES", [small])
    net = EDMPrecond(**small)
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    torch.save({"model_g": state, "model_d": {}}, tmp_path / "model.pt")
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")

    z, cond = torch.randn(2, 3, 32, 32), torch.tensor([3, 8])
    for name, sigma in (("model.pt", edm_files.MODEL_G_SIGMA), ("pytorch_model.bin", 80.0)):
        G, metadata = load_generator(tmp_path / name)
        assert metadata["dataset"] == "cifar10"
        with torch.no_grad():
            expected = net.eval()(sigma * z, sigma, cond)
            torch.testing.assert_close(G(z, cond), expected, rtol=1e-4, atol=1e-4)
    assert abs(edm_files.MODEL_G_SIGMA - 79.56) < 0.005

    out = tmp_path / "x.png"
    sample.main(sample.Config(checkpoint=str(tmp_path / "model.pt"), seeds="0-3", out=str(out)))
    assert Image.open(out).mode == "RGB"
