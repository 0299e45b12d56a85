"""train_teacher.py and train_classifier.py on a few made-up digits: what they write, and how the
former resumes."""

import shutil
import struct
from functools import partial

import pytest
import torch

from assets import train_classifier, train_teacher
from assets.mnist import load_mnist
from edm_unet import EDMPrecond, heun_sample
from plumbing import digits
from plumbing.options import UserError
from plumbing.pairs import generator
from teachers import load_teacher
from workloads import WORKLOADS, get_workload

LAST = 2**64 - 1  # the largest seed


@pytest.fixture(autouse=True, scope="module")
def quick_pictures():
    """Pictures from two steps of the solver: what they show does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_teacher, "heun_sample", partial(heun_sample, steps=2))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """MNIST's four files with 20 random images each."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "t10k"):
        pixels = torch.randint(256, (20, 28, 28), dtype=torch.uint8, generator=generator)
        images = struct.pack(">4i", 0x803, 20, 28, 28) + pixels.numpy().tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">2i", 0x801, 20) + bytes(range(10)) * 2
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return folder


def config(data, out, **options):
    quick = {"steps": 2, "batch_size": 4, "save_every": 1, "device": "cpu", "seed": LAST}
    return train_teacher.Config(data=str(data), out=str(out), **quick | options)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """Two steps."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    train_teacher.main(config(data, out))
    return out


def test_the_loss_is_edms():
    """Being off by 0.1 costs 0.01 lambda(sigma); ln sigma and the noise are normal."""
    images, labels = torch.randn(4000, 1, 1, 2), torch.arange(4000) % 10

    def net(x, sigma, class_labels):
        net.given = x, sigma, class_labels
        return images + 0.1

    net.sigma_data = 0.7
    loss = train_teacher.edm_loss(net, images, labels, -1.0, 0.6, generator("assets", 0, 0))
    x, sigma, given = net.given
    assert given is labels
    torch.testing.assert_close(loss, 0.01 * (sigma**-2 + 0.7**-2).mean(), rtol=1e-4, atol=0)
    # All independent, between images as well as between the pixels of one.
    drawn = torch.cat([(sigma.log() + 1) / 0.6, (x - images) / sigma, images], dim=3).flatten(1)
    torch.testing.assert_close(drawn.mean(0), torch.zeros(5), rtol=0, atol=0.08)  # 5 errors
    torch.testing.assert_close(drawn.T.cov(), torch.eye(5), rtol=0, atol=0.12)


def test_it_writes_a_teacher(straight):
    assert {path.name for path in straight.glob("[!.]*")} == {
        "checkpoint.pt", "config.json", "log.csv", "samples_000001.png", "samples_000002.png",
        "teacher.safetensors",
    }  # fmt: skip
    net = load_teacher(get_workload(teacher=str(straight / "teacher.safetensors"))).mu_real.net
    assert net.kwargs == EDMPrecond(**WORKLOADS["mnist"].network).kwargs
    assert all(value.isfinite().all() for value in net.state_dict().values())


@pytest.mark.slow
def test_it_resumes_exactly(straight, data, tmp_path, monkeypatch):
    """Interrupted in its second step, it resumes after the first."""
    first, out = iter([train_teacher.edm_loss]), tmp_path / "run"

    def interrupted(*arguments):
        for loss in first:
            return loss(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_teacher, "edm_loss", interrupted)
        train_teacher.main(config(data, out))
    assert not (out / "teacher.safetensors").exists()
    train_teacher.main(config(data, out))
    for name in ("teacher.safetensors", "log.csv", "samples_000002.png"):
        assert (out / name).read_bytes() == (straight / name).read_bytes(), name


def test_mistakes(straight, data, tmp_path):
    """Another run's folder, a checkpoint that is none of ours."""
    before = (straight / "teacher.safetensors").read_bytes()
    with pytest.raises(UserError, match="made with another seed;"):
        train_teacher.main(config(data, straight, seed=1))
    assert (straight / "teacher.safetensors").read_bytes() == before
    run = shutil.copytree(straight, tmp_path / "copy")
    torch.save({"step": 3}, run / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint\.pt cannot be resumed"):
        train_teacher.main(config(data, run))


@pytest.mark.parametrize("script", [train_teacher, train_classifier])
@pytest.mark.parametrize(("seed", "word"), [(-1, "at least 0"), (LAST + 1, f"below {LAST + 1}")])
def test_seeds_that_are_refused(script, seed, word):
    with pytest.raises(UserError, match=f"^--seed must be {word}, not {seed}$"):
        script.Config(seed=seed)


@pytest.mark.parametrize("architecture", ["convolutions", "lenet"])
def test_a_judge_is_a_folder_of_two_files(architecture, data, tmp_path):
    """It is read as what it is, and finds the images that it was measured with at no distance."""
    how = {"data": str(data), "device": "cpu", "epochs": 1, "batch_size": 4, "seed": LAST}
    options = {**how, "out": str(tmp_path), "architecture": architecture}
    train_classifier.main(train_classifier.Config(**options))
    images, labels = load_mnist(str(data), train=False)
    found = digits.measure(images, labels, torch.device("cpu"), tmp_path)
    assert found["fd"] == pytest.approx(0, abs=1e-6)
    assert found["diversity"] == pytest.approx(1) and found["samples"] == 20
    net = digits.load_classifier(torch.device("cpu"), tmp_path)
    pools = any(isinstance(module, torch.nn.MaxPool2d) for module in net.modules())
    assert pools == (architecture == "lenet")
