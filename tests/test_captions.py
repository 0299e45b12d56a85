"""Pictures of captions: the protocol's steps by hand, pictures in shares and after an interruption,
FID and CLIP score with stand-ins for the networks. The command is in test_sd_commands.py."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from plumbing import captions
from plumbing.devices import Ranks
from plumbing.fid import frechet_distance, mean_and_covariance
from plumbing.options import UserError

CPU = torch.device("cpu")


def constant(folder: Path, colours) -> Path:
    """A folder of images of one colour each, no two of the same size."""
    folder.mkdir()
    for k, colour in enumerate(colours):
        Image.new("RGB", (50, 40 + k), tuple(map(int, colour))).save(folder / f"{k:06d}.png")
    return folder


def test_the_central_square_by_lanczos_filter(tmp_path):
    """A ramp becomes one of half the slope. What is outside the square leaves no trace."""
    pixels = np.full((512, 812, 3), 255, np.uint8)
    pixels[:, 150:662] = (np.arange(512) / 2).astype(np.uint8)[None, :, None]
    images = Image.fromarray(pixels), Image.fromarray(pixels.swapaxes(0, 1))
    for name, image in zip(("wide.png", "tall.png"), images, strict=True):
        image.save(tmp_path / name)
    found, tall = (captions.square(tmp_path / name) for name in ("wide.png", "tall.png"))
    assert found.shape == (256, 256, 3) and found.dtype == np.uint8
    expected = np.arange(256) + 0.0  # the mean of (2j) / 2 and (2j + 1) / 2, rounded down before
    assert np.abs(found.astype(float) - expected[None, :, None]).max() <= 1
    assert np.array_equal(tall, found.transpose(1, 0, 2))


def test_pictures_are_rounded_down_shared_and_not_drawn_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    drawn = []

    def draw(numbers):
        drawn.extend(numbers)
        values = torch.tensor([(300 if k == 6 else k) + 0.9 for k in numbers])  # of 255
        return (values / 127.5 - 1).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 5)

    one, two, alone = tmp_path / "one", tmp_path / "two", Ranks(0, 1, CPU)
    captions.draw_missing(one, 7, draw, 2, alone)
    assert drawn == list(range(7))
    for k, pixel in enumerate([0, 1, 2, 3, 4, 5, 255]):
        assert (np.asarray(Image.open(captions.picture(one, k))) == pixel).all()
    drawn.clear()
    for rank in range(2):  # one after the other, so the second sees the first one's
        captions.draw_missing(two, 7, draw, 2, Ranks(rank, 2, CPU))
    assert len(set(drawn)) == len(drawn) and set(drawn) < set(range(7))
    captions.draw_missing(two, 7, draw, 2, alone)
    assert sorted(drawn) == list(range(7))
    for k in range(7):
        assert captions.picture(one, k).read_bytes() == captions.picture(two, k).read_bytes()
    with pytest.raises(NotImplementedError, match="meta"):  # what a GPU says is no full disk
        captions.draw_missing(tmp_path, 1, lambda _: torch.empty(1, 3, 4, 5).to("meta"), 1, alone)


def test_latency_is_the_median_of_fifty(monkeypatch):
    seconds = [9.0] * 3 + [k / 1000 for k in range(50)]
    monkeypatch.setattr(
        "timeit.repeat", lambda draw, number, repeat: draw() * seconds[: number * repeat]
    )
    assert captions.latency(lambda: torch.ones((), dtype=int)) == pytest.approx(24.5)


@pytest.mark.parametrize("package", ["stand-in", "clean-fid"])
def test_fid_of_two_folders(tmp_path, monkeypatch, package):
    """The Frechet distance of features, here of colours. A file that is no image is named."""
    if package == "stand-in":  # what clean-fid 0.1 has, but its distance, which no SciPy suits
        resize = {"clean": lambda pixels: pixels.astype(np.float32)}
        fid = SimpleNamespace(build_resizer=resize.get, compare_folders=None)
        monkeypatch.setitem(sys.modules, "cleanfid.fid", fid)
    else:
        fid = pytest.importorskip("cleanfid.fid", reason="clean-fid is an optional package")

    def build(mode, device, use_dataparallel):
        assert (mode, device, use_dataparallel) == ("clean", CPU, False)
        return lambda x: x.mean((2, 3))

    monkeypatch.setattr(fid, "build_feature_extractor", build, raising=False)
    colours = np.random.default_rng(0).integers(0, 256, (2, 40, 3))
    folders = [constant(tmp_path / name, each) for name, each in zip("ab", colours, strict=True)]
    one, two = (mean_and_covariance(torch.from_numpy(each)) for each in colours)
    found = captions.folder_fid(*folders, CPU)
    assert found == pytest.approx(frechet_distance(*one, *two), rel=1e-4)
    bad = captions.picture(tmp_path / "b", 3)
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(UserError, match=r"b/000003\.png is damaged"):
        captions.folder_fid(*folders, CPU)


def test_clip_score_is_the_mean_cosine(tmp_path, monkeypatch):
    """A model whose features of an image are its mean colour, and of a text three numbers."""
    model = SimpleNamespace(encode_image=lambda x: x.mean((2, 3)), encode_text=torch.Tensor.float)
    model.eval = lambda: model

    def tokenize(given):
        assert given == ["A photo depicts red", "A photo depicts blue", "A photo depicts grey"]
        return torch.tensor([[1, 0, 0], [0, 0, 5], [0, 4, 3]])

    def preprocess(image):
        assert image.size == (256, 256)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    def create(name, weights, device):
        assert (name, weights, device) == (*captions.CLIP, CPU)
        return model, None, preprocess

    open_clip = SimpleNamespace(
        create_model_and_transforms=create, get_tokenizer={captions.CLIP[0]: tokenize}.get
    )
    monkeypatch.setitem(sys.modules, "open_clip", open_clip)
    folder = constant(tmp_path / "images", [[255, 0, 0], [0, 200, 0], [0, 30, 40]])
    found = captions.clip_score(folder, ["red", "blue", "grey"], CPU)
    assert found == pytest.approx((1 + 0 + (30 * 4 + 40 * 3) / 250) / 3, abs=1e-6)
