"""--dataset edm: a network of one's own, through every script. (Fine-tunes of Stable Diffusion are
--dataset sd15, see test_sd_commands.py.)"""

import json
from pathlib import Path

import pytest
import test_fid
import torch
from conftest import fails_in_one_line, pairs_config, tiny_config
from PIL import Image

import evaluate
import make_pairs
import sample
import train
from edm_unet import EDMPrecond
from plumbing.drawing import save_grid
from plumbing.files import read_tensors, write_tensors
from plumbing.options import UserError
from teachers import load_generator
from workloads import ROWS, WORKLOADS, get_workload

fast = test_fid.fast  # a fixture: no Inception, and no roots of matrices


def own_network(path, resolution, classes):
    """A small network of random weights in a file of ours -> its path."""
    torch.manual_seed(0)
    net = EDMPrecond(
        resolution, 3, classes, model_type="SongUNet", model_channels=8,
        channel_mult=[1, 2], num_blocks=1, attn_resolutions=[],
    )  # fmt: skip
    write_tensors(path, net.state_dict(), {"kwargs": json.dumps(net.kwargs)})
    return str(path)


@pytest.mark.parametrize("resolution, classes", [(16, 3), (24, 0)])
def test_through_every_script(resolution, classes, tmp_path, monkeypatch, fast, capsys):
    monkeypatch.chdir(tmp_path)
    teacher = own_network(tmp_path / "mine.safetensors", resolution, classes)
    how = {"dataset": "edm", "teacher": teacher, "device": "cpu"}
    make_pairs.main(pairs_config(num_pairs=6, steps=2, shard_size=4, out="pairs", **how))
    said = capsys.readouterr().out
    assert f"options that are not given are cifar10{'' if classes else '-uncond'}'s\n" in said
    y = read_tensors(tmp_path / "pairs/shard_00000.safetensors")[0]
    assert y["y"].shape == (4, 3, resolution, resolution) and ("cond" in y) == bool(classes)
    train.main(tiny_config({"pairs": "pairs"}, "runs/mine", **how, distance="l2", steps=2))

    G, metadata = load_generator(tmp_path / "runs/mine/generator.safetensors")
    assert metadata["dataset"] == "edm" and G.mu.net.image_shape == (3, resolution, resolution)
    sample.main(sample.Config(seeds="0-3", out="x.png", device="cpu"))  # the newest run
    assert Image.open("x.png").width > 4 * resolution
    beside = {"teacher": True, "steps": 2}  # the one that the generator's file names
    sample.main(sample.Config(seeds="0-3", out="y.png", device="cpu", **beside))

    for size, folder in ((resolution, "real"), (9, "other")):
        for k, image in enumerate(2 * torch.rand(2, 3, size, size) - 1):
            save_grid(tmp_path / folder / f"{k}.png", image[None], columns=1, gap=0)
    figures = {"samples": 4, "batch_size": 2, "device": "cpu"}
    options = {"reference": "real", "rows": ("student", "teacher"), "steps": 2}
    evaluate.main(evaluate.Config(**figures, **options))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if ": FID " in line] == ["student", "teacher"]
    with pytest.raises(UserError, match=r"\(3, 9, 9\) instead of \(3, "):
        evaluate.main(evaluate.Config(**figures, reference="other"))
    with pytest.raises(UserError, match="give the real images: --reference"):
        evaluate.main(evaluate.Config(**figures))

    (tmp_path / "mine.safetensors").unlink()  # the generator does without it
    sample.main(sample.Config(seeds="0-3", out="z.png", device="cpu"))
    assert Path("z.png").read_bytes() == Path("x.png").read_bytes()
    with pytest.raises(UserError, match=r"mine\.safetensors, is not there; give --teacher-weights"):
        sample.main(sample.Config(seeds="0-3", out="z.png", device="cpu", **beside))


def test_the_numbers_to_start_from(tmp_path, capsys):
    """Those of this size; EDM's own are known by name. CIFAR-10's weight of the regression."""
    cases = {
        own_network(tmp_path / f"{size}_{classes}.safetensors", size, classes): (like, weight)
        for size, classes, like, weight in (
            (16, 2, "cifar10", 0.25), (64, 2, "imagenet64", 0.25), (96, 2, "imagenet64", 0.25),
            (16, 0, "cifar10-uncond", 0.5), (96, 0, "imagenet64", 0.5),
        )
    }  # fmt: skip
    numbers = ROWS["cifar10-uncond"].keys() - {"network", "teacher", "reference"}
    cases["edm-ffhq-64x64-uncond-vp.pkl"] = ("imagenet64", 0.5)
    cases["edm-cifar10-32x32-uncond-vp.pkl"] = ("cifar10-uncond", 0.5)
    for teacher, (like, weight) in cases.items():
        row = get_workload("edm", teacher=teacher, batch_size=10)
        expected = get_workload(like, batch_size=10, lambda_reg=weight)
        assert all(getattr(row, name) == getattr(expected, name) for name in numbers)
        said = "imagenet64's (lambda_reg: cifar10" if like == "imagenet64" else f"{like}'s"
        assert f"options that are not given are {said}" in capsys.readouterr().out
        assert (row.dataset, row.out, row.teacher) == ("edm", "runs/edm", teacher)
    assert WORKLOADS["edm"].distance == "lpips"


def test_mistakes(tmp_path, run_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(3)}, "bare.pt")
    three = own_network(tmp_path / "three.safetensors", 16, 3)
    four = own_network(tmp_path / "four.safetensors", 16, 4)
    for options, words in (
        (["edm"], ["--teacher FILE"]),
        (["edm", "--teacher", "mine.pkl"], ["mine.pkl is not a file"]),
        (["edm", "--teacher", "bare.pt"], ["does not say which network it belongs to"]),
        (["cifar10", "--teacher", three], ["3x16x16 images of 3 classes", "--dataset edm"]),
    ):
        result = run_here("make_pairs.py", "--out", "more", "--dataset", *options)
        fails_in_one_line(result, *words)
    how = {"num_pairs": 2, "steps": 1, "out": "pairs", "device": "cpu"}
    make_pairs.main(pairs_config(dataset="edm", teacher=three, **how))
    config = tiny_config({"pairs": "pairs"}, "run", dataset="edm", teacher=four, distance="l2")
    with pytest.raises(UserError, match="made with another teacher than four"):
        train.main(config)
    assert not (tmp_path / "run").exists() and not (tmp_path / "more").exists()
