"""FID against torch-fidelity's own, statistics against numpy's, and every bad input's message."""

import socket

import numpy as np
import pytest
import torch
from conftest import ONE_THREAD
from PIL import Image
from torch import nn

from plumbing import fid
from plumbing.devices import Ranks
from plumbing.options import UserError

ALONE = Ranks(0, 1, torch.device("cpu"))


def read(path, network=None, batch_size=64, size=32):
    """A reference, in one process."""
    return fid.read_reference(path, network, batch_size, ALONE, size)


class Projection(nn.Module):
    """In Inception's place: 2048 random functions of an image's mean colour, float64."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3, fid.FEATURES, generator=generator).double()

    def forward(self, images):
        return ((images.double().mean((2, 3)) / 255) @ self.weight,)


def write_images(folder, count, seed, size=(32, 32), low=0):
    """PNG files of noise, half of them in a subfolder -> uint8 (N, 3, H, W) in sorted order."""
    (folder / "sub").mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(low, 256, (count, *size, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        name = f"{i:02d}.png" if i < count // 2 else f"sub/{i:02d}.png"
        Image.fromarray(image).save(folder / name)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


MU, SIGMA = np.zeros(fid.FEATURES), np.eye(fid.FEATURES)


def test_seeded_inputs_are_edms():
    """An image's noise, then its label, from its own generator, whichever images are beside it."""
    seeds = [5, 2**32 + 5, 0, 7]
    z, labels = fid.seeded_inputs(seeds, (3, 8, 8), 1000, "cpu")
    for i, seed in enumerate((5, 5, 0, 7)):
        generator = torch.Generator("cpu").manual_seed(seed)
        assert torch.equal(z[i], torch.randn([3, 8, 8], generator=generator))
        assert labels[i] == torch.randint(1000, size=[], generator=generator)
    assert labels.dtype == torch.int64 and len(set(labels.tolist())) == 3
    alone, none = fid.seeded_inputs(seeds[3:], (3, 8, 8), 0, "cpu")
    assert none is None and torch.equal(alone, z[3:])


# --------------------------------------------------------------------------------------------------
# Against torch-fidelity


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A file in the format and size of Inception's, in torch hub's folder: random, scaled so that
    features survive."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Net

    class Unloaded(Net):
        def load_state_dict(self, state_dict):
            assert state_dict == {}

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    net = Unloaded("random", ["2048"], feature_extractor_weights_path=folder / "empty.pth")
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    path = folder / "hub" / "checkpoints" / fid.INCEPTION_FILE
    path.parent.mkdir(parents=True)
    torch.save(net.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder))
        patch.setitem(ONE_THREAD, "TORCH_HOME", str(folder))  # of run_on_two_ranks
        yield path


def test_fid_is_torch_fidelitys(random_weights, tmp_path):
    """Two folders of PNG files through both, with the same weights: from the files to the FID."""
    import torch_fidelity

    write_images(tmp_path / "a", 4, seed=1)
    write_images(tmp_path / "b", 4, seed=2, low=128)
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), fid=True, cuda=False, cache=False,
        feature_extractor_weights_path=str(random_weights), samples_find_deep=True,
        save_cpu_ram=True, batch_size=4, verbose=False,
    )["frechet_inception_distance"]  # fmt: skip
    network = fid.inception("cpu")
    found = fid.frechet_distance(
        *read(tmp_path / "a", network, batch_size=3), *read(tmp_path / "b", network, batch_size=3)
    )
    assert expected > 1
    assert found == pytest.approx(expected, rel=1e-6)  # measured: 7e-9


def test_other_and_hostile_weights_are_refused(random_weights, tmp_path, monkeypatch):
    """Also what torch-fidelity's own loader would run."""

    class Hostile:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / fid.INCEPTION_FILE
    path.parent.mkdir(parents=True)

    def fails(word):
        with pytest.raises(UserError, match=word) as raised:
            fid.inception("cpu")
        assert "\n" not in str(raised.value) and str(path) in str(raised.value)

    state = torch.load(random_weights, weights_only=True)
    del state["fc.bias"]
    torch.save(state, path)
    fails("fc.bias")
    torch.save({"fc.bias": Hostile()}, path)
    fails("exec")
    path.write_bytes(random_weights.read_bytes()[:100_000])
    fails("damaged")
    assert not (tmp_path / "ran").exists()


def test_missing_weights_say_which_and_where(monkeypatch, tmp_path):
    """Without a network, and with another file in their place."""

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(UserError) as raised:
        fid.inception("cpu")
    message, path = str(raised.value), tmp_path / "hub" / "checkpoints" / fid.INCEPTION_FILE
    assert fid.INCEPTION_URL in message and f"yourself and put it at {path}" in message
    assert "no route to host" in message
    assert "\n" not in message and "--teacher" not in message and not path.exists()

    path.write_bytes(b"something else")
    with pytest.raises(UserError, match=f"{path} is damaged"):
        fid.inception("cpu")


# --------------------------------------------------------------------------------------------------
# Statistics and the distance


def features_of(count, size=7, seed=0):
    """Features far from zero, as Inception's are, so that cancellation matters."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator)
    return 10 + torch.randn(count, size, generator=generator) @ mixing


def test_parts_add_up_to_the_statistics_of_numpy(monkeypatch):
    """Batch by batch, and at once."""
    monkeypatch.setattr(fid, "FEATURES", 7)
    features = features_of(50)
    mean = features.double().mean(0)
    covariance = torch.from_numpy(np.cov(features.double().numpy(), rowvar=False))
    for found in (
        fid.feature_statistics(features.split(8), lambda batch: (batch,), ALONE),
        fid.mean_and_covariance(features),
    ):
        torch.testing.assert_close(found, (mean, covariance), rtol=1e-11, atol=1e-11)


def rank_of_two(rank, folder, images):
    """One of two processes: share a folder of images, then note what this rank got."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    ranks = Ranks(rank, 2, torch.device("cpu"))
    mu, sigma = fid.read_reference(images, Projection(), 2, ranks, 32)
    torch.save((mu, sigma), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_share_a_folder(tmp_path):
    """5 images on 2 ranks: both get what one process gets."""
    write_images(tmp_path / "images", 5, seed=3)
    torch.multiprocessing.spawn(rank_of_two, (tmp_path, tmp_path / "images"), nprocs=2)
    expected = read(tmp_path / "images", Projection())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_frechet_distance_against_closed_forms():
    """Equal: 0. Shifted: the shift squared. Commuting: |m1 - m2|^2 + |std_1 - std_2|^2."""
    mean, covariance = fid.mean_and_covariance(features_of(50))
    assert fid.frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)
    found = fid.frechet_distance(mean, covariance, mean + 2, covariance)
    assert found == pytest.approx(4 * 7)
    turn, _ = torch.linalg.qr(covariance)
    s1, s2 = torch.rand(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = fid.frechet_distance(mean, turn * s1**2 @ turn.T, mean, turn * s2**2 @ turn.T)
    assert found == pytest.approx(float((s1 - s2).square().sum()))


def test_frechet_distance_against_scipy():
    """Covariances that do not commute: the root of their product by a Schur decomposition."""
    linalg = pytest.importorskip("scipy.linalg")
    (m1, c1), (m2, c2) = (fid.mean_and_covariance(features_of(50, seed=s)) for s in (5, 6))
    root = linalg.sqrtm((c1 @ c2).numpy())
    expected = float((m1 - m2).square().sum() + c1.trace() + c2.trace()) - 2 * np.trace(root).real
    assert fid.frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-9)


# --------------------------------------------------------------------------------------------------
# References


def test_references_from_file_and_folder_agree(tmp_path):
    """A folder's statistics, and by way of a file, are those of the images themselves."""
    images = write_images(tmp_path / "images", 6, seed=7)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    mu, sigma = read(tmp_path / "images", Projection(), batch_size=4)
    expected = fid.mean_and_covariance(Projection()(images)[0])
    torch.testing.assert_close((mu, sigma), expected, rtol=1e-9, atol=1e-9)

    np.savez(tmp_path / "s.npz", mu=mu.numpy(), sigma=sigma.numpy(), other="ignored")
    torch.testing.assert_close(read(tmp_path / "s.npz"), (mu, sigma), rtol=0, atol=0)


@pytest.mark.parametrize(
    "arrays, word",
    [
        (dict(mu=MU), "sigma is missing"),
        (dict(sigma=SIGMA), "mu is missing"),
        (dict(mu=MU[:5], sigma=SIGMA), r"mu is \(5,\) instead of \(2048,\)"),
        (dict(mu=MU, sigma=MU), r"sigma is \(2048,\) instead of"),
        (dict(mu=np.array(["a"] * 3), sigma=SIGMA), "is damaged or of another kind"),
    ],
)
def test_bad_references(arrays, word, tmp_path):
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(UserError, match=word) as raised:
        read(tmp_path / "ref.npz")
    assert "\n" not in str(raised.value) and "ref.npz" in str(raised.value)


def test_damaged_and_hostile_references(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    hostile = np.array([Hostile()] * 3, dtype=object)
    np.savez(tmp_path / "objects.npz", mu=hostile, sigma=SIGMA[:2])
    whole = (tmp_path / "objects.npz").read_bytes()
    np.save(tmp_path / "array.npy", MU)
    np.save(tmp_path / "object.npy", hostile)
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "page.npz").write_bytes(b"<html>not found</html>")
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pickle.npz").write_bytes(b"\x80\x04cos\nsystem\n.")
    (tmp_path / "s.safetensors").write_bytes(b"short")
    for name in (
        "objects.npz", "array.npy", "object.npy", "empty.npz", "page.npz", "short.npz",
        "pickle.npz", "s.safetensors",
    ):  # fmt: skip
        with pytest.raises(UserError, match="is damaged") as raised:
            read(tmp_path / name)
        assert "\n" not in str(raised.value) and name in str(raised.value)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match=r"absent\.npz does not exist"):
        read(tmp_path / "absent.npz")


def test_bad_folders(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()

    def fails(word):
        with pytest.raises(UserError, match=word) as raised:
            read(folder, Projection(), size=8)
        assert "\n" not in str(raised.value)

    fails("holds 0 PNG or JPEG")
    picture = Image.new("RGB", (8, 8), (1, 2, 3))
    picture.save(folder / "a.png")
    fails("holds 1 PNG or JPEG")
    Image.new("RGB", (8, 9)).save(folder / "b.JPG")
    fails(r"b.JPG is \(3, 9, 8\) instead of \(3, 8, 8\)")
    (folder / "b.JPG").write_bytes((folder / "a.png").read_bytes()[:40])
    fails("b.JPG is damaged")
    picture.convert("L").save(folder / "b.JPG")  # grey
    assert [images.shape for images in fid.read_images(folder, 4, ALONE, 8)] == [(2, 3, 8, 8)]
    picture.convert("RGBA").save(folder / "c.png")
    fails("c.png has mode RGBA")
