"""FID against torch-fidelity's own, statistics against numpy's, and every bad input's message."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from plumbing import fid
from plumbing.devices import Ranks
from plumbing.options import UserError

CPU = torch.device("cpu")
MU, SIGMA = np.zeros(fid.FEATURES), np.eye(fid.FEATURES)


def read(path, network=None, batch_size=64, size=32):
    """A reference, in one process."""
    return fid.read_reference(path, network, batch_size, Ranks(0, 1, CPU), size)


def on_ranks(count, work):
    """work(ranks) of each rank -> a list. The ranks are threads of this process, whose sums and
    barriers wait for each other as those of torch.distributed do."""
    meeting, parts = threading.Barrier(count, timeout=60), {}

    class Threads(Ranks):
        def barrier(self):
            meeting.wait()

        def sum(self, x):
            parts[self.rank] = x
            meeting.wait()
            total = sum(parts[rank] for rank in range(count))
            meeting.wait()
            return total

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, [Threads(rank, count, CPU) for rank in range(count)]))


class Projection(nn.Module):
    """In Inception's place: 2048 random functions of an image's mean colour, float64."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3, fid.FEATURES, generator=generator).double()

    def forward(self, images):
        return ((images.double().mean((2, 3)) / 255) @ self.weight,)


@pytest.fixture
def fast(monkeypatch):
    """A small network in Inception's place, and a distance that takes no roots of matrices -> a
    list of the drawn images' (mean, covariance)."""
    drawn = []

    def distance(mean_1, cov_1, mean_2, cov_2):
        drawn.append((mean_1, cov_1))
        return float((mean_1 - mean_2).square().sum())

    monkeypatch.setattr(fid, "inception", lambda device: Projection())
    monkeypatch.setattr(fid, "frechet_distance", distance)
    return drawn


def write_images(folder, count):
    """PNG files of noise, half of them in a subfolder -> uint8 (N, 3, 32, 32) in sorted order."""
    (folder / "sub").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / ("" if i < count // 2 else "sub") / f"{i:02d}.png")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def fails(path, word, **options):
    """Assert that a reference is refused in one line with its name and this word."""
    with pytest.raises(UserError, match=word) as raised:
        read(path, Projection(), **options)
    assert "\n" not in str(raised.value) and path.name in str(raised.value)


class Hostile:
    """Pickles as a call that writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w')",))


def test_the_inputs_of_an_unconditional_network():
    """Noise and labels of a conditional one are in test_evaluate.py."""
    z, none = fid.seeded_inputs([7, 2**32 + 5], (3, 8, 8), 0, "cpu")
    for found, seed in zip(z, (7, 5), strict=True):
        generator = torch.Generator("cpu").manual_seed(seed)
        assert torch.equal(found, torch.randn([3, 8, 8], generator=generator)) and none is None


# --------------------------------------------------------------------------------------------------
# Inception, against torch-fidelity


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A file like Inception's in torch hub's folder: random, scaled so that features survive."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Net

    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(Net, "load_state_dict", lambda *_: None)
        net = Net("random", ["2048"], feature_extractor_weights_path=__file__)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    path = folder / "hub" / "checkpoints" / fid.INCEPTION_FILE
    path.parent.mkdir(parents=True)
    torch.save(net.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder))
        yield path


def test_statistics_of_a_folder_are_torch_fidelitys(random_weights, tmp_path):
    """Of PNG files by both, with the same weights; the distance is compared below."""
    from torch_fidelity.metric_fid import fid_input_id_to_statistics
    from torch_fidelity.utils import create_feature_extractor

    write_images(tmp_path / "a", 4)
    options = {"feature_extractor_weights_path": str(random_weights), "cuda": False}
    extractor = create_feature_extractor("inception-v3-compat", ["2048"], **options)
    expected = fid_input_id_to_statistics(
        1, extractor, "2048", **options, input1=str(tmp_path / "a"), samples_find_deep=True,
        save_cpu_ram=True, batch_size=4, verbose=False, cache=False,
    )  # fmt: skip
    mu, sigma = read(tmp_path / "a", fid.inception("cpu"), batch_size=3)
    assert mu.abs().max() > 0.1 and sigma.abs().max() > 1e-3
    torch.testing.assert_close(mu, torch.from_numpy(expected["mu"]).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sigma, torch.from_numpy(expected["sigma"]), rtol=1e-4, atol=1e-6)


def test_weights_that_are_refused(random_weights, tmp_path, monkeypatch):
    """Missing, of another network, hostile (torch-fidelity's own loader would run that), cut."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=OSError("no route to host")))
    path = tmp_path / "hub" / "checkpoints" / fid.INCEPTION_FILE

    def fails(*words):
        with pytest.raises(UserError) as raised:
            fid.inception("cpu")
        message = str(raised.value)
        assert "\n" not in message and all(word in message for word in [str(path), *words])

    fails(fid.INCEPTION_URL, f"yourself and put it at {path}", "no route to host")
    path.parent.mkdir(parents=True, exist_ok=True)
    state = torch.load(random_weights, weights_only=True)
    del state["fc.bias"]
    torch.save(state, path)
    fails("fc.bias")
    torch.save({"fc.bias": Hostile(tmp_path / "ran")}, path)
    fails("exec")
    assert not (tmp_path / "ran").exists()
    path.write_bytes(random_weights.read_bytes()[:100_000])
    fails("damaged")


def test_an_error_in_building_the_network_is_not_its_files(random_weights, monkeypatch):
    """Such as that of a torch-fidelity with other arguments."""
    name = "torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3"
    monkeypatch.setattr(name, Mock(side_effect=TypeError("unexpected keyword argument")))
    with pytest.raises(TypeError):
        fid.inception("cpu")
    monkeypatch.setattr(name, Mock(side_effect=RuntimeError("DefaultCPUAllocator: memory")))
    with pytest.raises(UserError, match="cannot be read"):
        fid.inception("cpu")


def features_of(count, seed):
    """Features far from zero, as Inception's are, so that cancellation matters."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(7, 7, generator=generator)
    return 10 + torch.randn(count, 7, generator=generator) @ mixing


@pytest.mark.parametrize("count", [50, 5])
def test_frechet_distance_is_torch_fidelitys(count):
    """Of covariances that do not commute, one of which has no full rank if there are 5 images."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    a, b = (fid.mean_and_covariance(features_of(n, seed=n)) for n in (count, 60))
    stats = [dict(mu=mean.numpy(), sigma=covariance.numpy()) for mean, covariance in (a, b)]
    expected = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert fid.frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-8)


# --------------------------------------------------------------------------------------------------
# References


def test_references_from_file_and_folder_agree(tmp_path):
    """A folder's statistics, on one rank or two, and by way of a file, are those of its images."""
    images = write_images(tmp_path / "images", 5)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    expected = fid.mean_and_covariance(Projection()(images)[0])

    def shared(ranks):
        return fid.read_reference(tmp_path / "images", Projection(), 2, ranks, 32)

    mu, sigma = read(tmp_path / "images", Projection(), batch_size=4)
    for found in ((mu, sigma), *on_ranks(2, shared)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    np.savez(tmp_path / "s.npz", mu=mu.numpy(), sigma=sigma.numpy(), other="ignored")
    torch.testing.assert_close(read(tmp_path / "s.npz"), (mu, sigma), rtol=0, atol=0)


def test_bad_references(tmp_path):
    path, hostile = tmp_path / "ref.npz", np.array([Hostile(tmp_path / "ran")] * 3, dtype=object)
    for arrays, word in (
        (dict(mu=MU), "sigma is missing"),
        (dict(sigma=SIGMA), "mu is missing"),
        (dict(mu=MU[:5], sigma=SIGMA), r"mu is \(5,\) instead of \(2048,\)"),
        (dict(mu=MU, sigma=MU), r"sigma is \(2048,\) instead of"),
        (dict(mu=np.array(["a"] * 3), sigma=SIGMA), "is damaged or of another kind"),
        (dict(mu=hostile, sigma=SIGMA[:2]), "is damaged or of another kind"),
    ):
        np.savez(path, **arrays)
        fails(path, word)
    whole = path.read_bytes()
    for data in (b"", b"<html>", whole[: len(whole) // 2], b"\x80\x04cos\nsystem\n."):
        path.write_bytes(data)
        fails(path, "is damaged")
    for array in (MU, hostile):
        np.save(tmp_path / "array.npy", array)
        fails(tmp_path / "array.npy", "is damaged")
    fails(tmp_path / "absent.npz", r"absent\.npz does not exist")
    assert not (tmp_path / "ran").exists()


def test_bad_folders(tmp_path):
    fails(tmp_path, "holds 0 images", size=8)
    picture = Image.new("RGB", (8, 8), (1, 2, 3))
    picture.save(tmp_path / "a.png")
    fails(tmp_path, "holds 1 images", size=8)
    Image.new("RGB", (8, 9)).save(tmp_path / "b.JPG")
    fails(tmp_path, r"b.JPG is \(3, 9, 8\) instead of \(3, 8, 8\)", size=8)
    (tmp_path / "b.JPG").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    fails(tmp_path, "b.JPG is damaged", size=8)
    picture.convert("L").save(tmp_path / "b.JPG")  # grey
    (images,) = fid.read_images(tmp_path, 4, Ranks(0, 1, CPU), 8)
    assert images.shape == (2, 3, 8, 8)
    picture.convert("RGBA").save(tmp_path / "c.png")
    fails(tmp_path, "c.png has mode RGBA", size=8)
