"""evaluate.py --captions: the protocol's steps by hand, pictures in shares and after an
interruption, FID and CLIP score with stand-ins for the networks."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_sd_commands
import torch
from conftest import fails_in_one_line, run_on_two_ranks
from PIL import Image

import evaluate
from plumbing import captions
from plumbing.devices import Ranks
from plumbing.fid import frechet_distance, mean_and_covariance
from plumbing.options import UserError

CPU = torch.device("cpu")
sd, sd_pairs, sd_run = test_sd_commands.sd, test_sd_commands.sd_pairs, test_sd_commands.sd_run


def constant(folder: Path, colours) -> Path:
    """A folder of images of one colour each, no two of a size."""
    folder.mkdir()
    for k, colour in enumerate(np.asarray(colours, np.uint8)):
        pixels = np.broadcast_to(colour, (40 + k, 50, 3))
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{k:06d}.png")
    return folder


def test_the_central_square_by_lanczos_filter():
    """Of a ramp along the longer side a ramp of half the slope remains; what is outside the central
    square leaves no trace."""
    pixels = np.full((512, 812, 3), 255, np.uint8)
    pixels[:, 150:662] = (np.arange(512) / 2).astype(np.uint8)[None, :, None]
    found = captions.square(pixels)
    assert found.shape == (256, 256, 3) and found.dtype == np.uint8
    expected = np.arange(256) + 0.0  # the mean of (2j) / 2 and (2j + 1) / 2, rounded down before
    assert np.abs(found.astype(float) - expected[None, :, None]).max() <= 1
    tall = captions.square(pixels.transpose(1, 0, 2))
    assert np.array_equal(tall, found.transpose(1, 0, 2))


def test_pictures_are_rounded_down_shared_and_not_drawn_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    drawn = []

    def draw(numbers):
        drawn.extend(numbers)
        values = torch.tensor(numbers) + 0.9  # of 255
        return (values / 127.5 - 1).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 5)

    one, two = tmp_path / "one", tmp_path / "two"
    captions.draw_missing(one, 7, draw, 2, Ranks(0, 1, CPU))
    assert drawn == list(range(7))
    for k in range(7):
        assert (np.asarray(Image.open(captions.picture(one, k))) == k).all()
    drawn.clear()
    for rank in range(2):  # one after the other, so the second sees the first one's
        captions.draw_missing(two, 7, draw, 2, Ranks(rank, 2, CPU))
    assert len(set(drawn)) == len(drawn) and set(drawn) < set(range(7))
    captions.draw_missing(two, 7, draw, 2, Ranks(0, 1, CPU))
    assert sorted(drawn) == list(range(7))
    for k in range(7):
        assert captions.picture(one, k).read_bytes() == captions.picture(two, k).read_bytes()
    too_bright = torch.full((1, 3, 2, 2), 1.5)
    captions.draw_missing(tmp_path / "x", 1, lambda numbers: too_bright, 1, Ranks(0, 1, CPU))
    assert (np.asarray(Image.open(captions.picture(tmp_path / "x", 0))) == 255).all()


def test_fid_of_two_folders_is_clean_fids(tmp_path, monkeypatch):
    """Of images of one colour each, with the colours as features: Frechet's distance of those."""
    fid = pytest.importorskip("cleanfid.fid", reason="clean-fid is an optional package")
    monkeypatch.setattr(fid, "build_feature_extractor", lambda *_, **__: lambda x: x.mean((2, 3)))
    draws = np.random.default_rng(0)
    one, two = draws.integers(0, 256, (2, 12, 3))
    folders = constant(tmp_path / "one", one), constant(tmp_path / "two", two)
    found = captions.folder_fid(*folders, CPU)
    both = [mean_and_covariance(torch.from_numpy(colours)) for colours in (one, two)]
    assert found == pytest.approx(frechet_distance(*both[0], *both[1]), rel=1e-4)


def test_clip_score_is_the_mean_cosine(tmp_path, monkeypatch):
    """A model whose features of an image are its mean colour, and of a text three numbers."""

    class Model(torch.nn.Module):
        def encode_image(self, images):
            assert images.shape[1:] == (3, 256, 256)
            return images.mean((2, 3))

        def encode_text(self, tokens):
            return tokens.float()

    colours = np.array([[255, 0, 0], [0, 200, 0], [0, 30, 40]])
    texts = ["red", "blue", "grey"]
    said = []

    def tokenize(given):
        said.extend(given)
        return torch.tensor([[1, 0, 0], [0, 0, 5], [0, 4, 3]])

    def preprocess(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    folder = constant(tmp_path / "images", colours)

    def create(name, weights, device):
        assert (name, weights, device) == (*captions.CLIP, CPU)
        return Model(), None, preprocess

    open_clip = SimpleNamespace(
        create_model_and_transforms=create, get_tokenizer={captions.CLIP[0]: tokenize}.get
    )
    monkeypatch.setitem(sys.modules, "open_clip", open_clip)
    found = captions.clip_score(folder, texts, CPU)
    assert said == [f"A photo depicts {text}" for text in texts]
    assert found == pytest.approx((1 + 0 + (30 * 4 + 40 * 3) / 250) / 3, abs=1e-6)


@pytest.fixture
def small(tmp_path, sd, sd_run, monkeypatch):
    """Options for a student and its teacher on five captions, in a folder of our own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "latency", lambda draw: 1.5 if draw().shape[0] == 1 else 0)
    (tmp_path / "captions.txt").write_text("a cat\na dog\n\na hat\nthe cat\nthe dog's hat\n")
    return {
        "checkpoint": str(sd_run), "captions": "captions.txt", "teacher_weights": str(sd),
        "device": "cpu", "batch_size": 2, "steps": 2,
    }  # fmt: skip


def test_pictures_of_captions(small, tmp_path, capsys):
    both = small | {"rows": ("student", "teacher"), "guidance": 2.0, "json": "numbers.json"}
    evaluate.main(evaluate.Config(**both))
    lines = [line for line in capsys.readouterr().out.splitlines() if "ms per image" in line]
    assert lines == [f"{row}: 1.5 ms per image (batch 1) (5 images)" for row in both["rows"]]
    found = json.loads(Path("numbers.json").read_text())
    assert found["teacher"]["evaluations"] == 6 and "guidance 2" in found["teacher"]["source"]
    pictures = {path: path.read_bytes() for path in Path("captions").glob("*/*.png")}
    assert len(set(pictures.values())) == 10
    assert Image.open("captions/teacher.png").size == (5 * 258 + 2, 260)
    assert Image.open("captions/student/000003.png").size == (64, 64)

    # A picture is a function of (seed, k, caption): alone, and after an interruption, the same.
    for path in list(pictures)[::3]:
        path.unlink()
    evaluate.main(evaluate.Config(**both | {"batch_size": 1}))
    for path, before in pictures.items():
        difference = np.asarray(Image.open(path), int) - np.asarray(
            Image.open(io.BytesIO(before)), int
        )
        assert np.abs(difference).max() <= 1  # of another batch size, another rounding
    with pytest.raises(UserError, match="made with another seed;"):
        evaluate.main(evaluate.Config(**both, seed=1))


@pytest.mark.slow
def test_two_ranks_draw_what_one_does(small, tmp_path, sd, sd_run):
    """By command; rank 0 alone measures and prints. One caption a batch: the same rounding."""
    options = ("--checkpoint", sd_run, "--captions", tmp_path / "captions.txt", "--device", "cpu")
    options += ("--teacher-weights", sd, "--batch-size", 1)
    result = run_on_two_ranks("evaluate.py", *options, "--out", tmp_path / "two", "--samples", 5)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ms per image (batch 1) (5 images)") == 1
    evaluate.main(evaluate.Config(**small | {"batch_size": 1, "out": str(tmp_path / "one")}))
    for k in range(5):
        one, two = (
            np.asarray(Image.open(captions.picture(tmp_path / folder / "student", k)), int)
            for folder in ("one", "two")
        )
        assert np.abs(one - two).max() <= 1


def test_mistakes_with_captions(small, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(evaluate, "load_teacher", None)  # all are found before

    def refused(words, **options):
        with pytest.raises(UserError, match=words):
            evaluate.main(evaluate.Config(**small | options))

    refused("holds 5 captions, not 6", samples=6)
    refused("holds 0 PNG or JPEG images", reference="nowhere")
    (tmp_path / "empty").mkdir()
    refused("holds 0 PNG or JPEG images", reference="empty")
    refused("not untrained", rows=("untrained",))
    refused("give a file of --captions", captions=None)
    refused("makes sd15, not cifar10", dataset="cifar10")
    refused("nowhere.txt cannot be read", captions="nowhere.txt")
    mnist = run_here("evaluate.py", "--captions", "captions.txt", "--dataset", "mnist")
    fails_in_one_line(mnist, "--captions is for text-to-image models")
    constant(tmp_path / "real", [[1, 2, 3], [4, 5, 6]])
    for options, package in (
        ({"reference": "real"}, "clean-fid"),
        ({"clip_score": True}, "open_clip"),
    ):
        module = {"clean-fid": "cleanfid", "open_clip": "open_clip"}[package]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, module, None)  # as if it were not there
            refused(f"pip install {package}", **options)
    assert not (tmp_path / "captions").exists()
