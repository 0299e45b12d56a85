"""The Frechet Inception Distance as EDM measures it, in pieces that evaluate.py puts together.

    seeded_inputs                   noise and class labels of the images with given seeds
    inception, inception_features   uint8 RGB images -> 2048 features of TensorFlow's Inception-2015
    FeatureStatistics               their mean and covariance, batch by batch, over all ranks
    read_reference                  mean and covariance of real images: a file, or a folder
    frechet_distance                FID, from two means and covariances

FID is lower for more images and varies with the seeds, so only equal protocols compare. EDM's
(github.com/NVlabs/edm, its README, generate.py and fid.py), which the paper follows:

    seeds       Image k has a random generator of its own, seeded with k (modulo 2^32), on the
                device that samples. From it come first the noise, then the class label, uniform
                over the classes, so classes are not balanced exactly; then a stochastic sampler's
                noise. Neither the batch size nor the number of ranks matters.
    counting    50,000 images; fewer are an error, of more a random subset counts. Thrice, with
                the seeds 0-49999, 50000-99999 and 100000-149999; the least FID is reported.
    rounding    uint8 by x * 127.5 + 128, clamped (rundir.to_uint8), before the features. The
                network itself resizes to 299x299, as TensorFlow 1 did.
    sums        Mean and covariance (denominator N - 1) in float64. Reference statistics are an
                .npz with `mu` and `sigma`, of the training images, all of them.
"""

import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from plumbing.downloads import download, fetch
from plumbing.files import (
    DAMAGE,
    file_hash,
    one_line,
    one_line_errors,
    read_tensors,
    torch_load,
    write_tensors,
)
from plumbing.options import UserError

FEATURES = 2048
# torch-fidelity's conversion of the original TensorFlow weights. pytorch-fid offers the same bytes
# under the second name: the names end with the file's hash.
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_FILES = (INCEPTION_URL.rpartition("/")[2], "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_HASH = "6726825d"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

# --------------------------------------------------------------------------------------------------
# Seeds


def seeded_inputs(
    seeds: Sequence[int], shape: tuple[int, ...], num_classes: int, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """What EDM's generate.py draws for the images with these seeds, on the device that samples.

    An image's numbers come from a generator of its own, so the others do not matter. A CPU and a
    GPU draw different ones.

    Args:
        shape: of one image, (C, H, W).
        num_classes: 0 for an unconditional network.

    Returns:
        z (B, C, H, W) ~ N(0, I) and labels (B,) long, or None.
    """
    noises, labels = [], []
    for seed in seeds:
        generator = torch.Generator(device).manual_seed(seed % 2**32)
        noises.append(torch.randn(shape, generator=generator, device=device))
        if num_classes:
            labels.append(torch.randint(num_classes, (), generator=generator, device=device))
    return torch.stack(noises), torch.stack(labels) if num_classes else None


# --------------------------------------------------------------------------------------------------
# Features


def inception(weights: str | Path | None, device: torch.device | str) -> nn.Module:
    """The network, in eval mode: uint8 (B, 3, H, W) -> one-tuple of features (B, 2048) float32.

    Args:
        weights: a state dict of torch.save; None for the published one, from torch hub's folder
            or else downloaded into it (by one process: among ranks let the first go ahead).
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError("FID needs torch-fidelity: pip install torch-fidelity") from None
    path = inception_file() if weights is None else Path(weights)
    with one_line_errors(path):
        # The constructor loads with weights_only=False, which runs whatever a file says: only after
        # we have seen that this one says nothing but tensors.
        torch_load(path)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(FEATURES)], feature_extractor_weights_path=str(path)
        )  # strict: missing, surplus and misshapen tensors are a RuntimeError
    return network.eval().requires_grad_(False).to(device)


def inception_file() -> Path:
    """The published weights: where torch-fidelity keeps them, downloaded if they are not there."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    known = [folder / name for name in INCEPTION_FILES]
    path = next((path for path in known if path.exists()), known[0])
    if not path.exists():
        download(INCEPTION_URL, path, INCEPTION_HASH)
    if not file_hash(path).startswith(INCEPTION_HASH):
        raise UserError(f"{path} is not the published file ({INCEPTION_URL}); delete it and rerun")
    return path


@torch.inference_mode()
def inception_features(images: Tensor, network: nn.Module) -> Tensor:
    """uint8 RGB images (B, 3, H, W) of any size -> features (B, 2048), on the network's device."""
    if images.dtype != torch.uint8 or images.dim() != 4:
        shape = tuple(images.shape)
        raise ValueError(f"images must be uint8 (B, 3, H, W), not {images.dtype} {shape}")
    if images.shape[1] != 3:
        raise UserError(
            f"FID is defined for RGB images, but these have {images.shape[1]} channel(s); for "
            "grayscale digits evaluate.py measures FD with a classifier's features"
        )
    return network(images.to(device_of(network)))[0]


def device_of(network: nn.Module) -> torch.device:
    """Where a network's parameters are."""
    return next(network.parameters()).device


# --------------------------------------------------------------------------------------------------
# Mean and covariance


class FeatureStatistics:
    """Count, sum and sum of outer products of features, in float64: all that FID needs of them.

    Sums of parts can be added up, so that 50,000 images need no 50,000x2048 features at once, and
    ranks can share the work. float64 also bears the cancellation in `mean_and_covariance`.

    Args:
        device: where the sums are; with NCCL it must be the rank's GPU.
    """

    def __init__(self, device: torch.device | str = "cpu", size: int = FEATURES):
        self.count = 0
        self.sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.outer = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Count features (B, D) in."""
        features = features.detach().to(self.sum.device, torch.float64)
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def merge(self, other: "FeatureStatistics") -> None:
        """Count in what another one has counted."""
        self.count += other.count
        self.sum += other.sum.to(self.sum.device)
        self.outer += other.outer.to(self.outer.device)

    def all_reduce(self) -> None:
        """Merge all ranks into every rank: once, by all of them. Alone, it does nothing."""
        if dist.is_available() and dist.is_initialized():
            count = torch.tensor(self.count, device=self.sum.device)
            for total in (count, self.sum, self.outer):
                dist.all_reduce(total)
            self.count = int(count)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) with denominator N - 1, float64, on the CPU.

        Raises:
            UserError: fewer than two images.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, not {self.count}")
        total, outer = self.sum.cpu(), self.outer.cpu()
        mean = total / self.count
        return mean, (outer - torch.outer(total, mean)) / (self.count - 1)


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """features (N, D) -> mean (D,), covariance (D, D), float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500).

    The trace of the root of C1 C2 is the sum of the roots of its eigenvalues, which are those of
    the symmetric C1^(1/2) C2 C1^(1/2).

    Args:
        means (D,), covariances (D, D), float64.
    """
    values, vectors = torch.linalg.eigh(cov_1)
    root_1 = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root_1 @ cov_2 @ root_1)
    trace = cov_1.trace() + cov_2.trace() - 2 * product.clamp(min=0).sqrt().sum()
    return float((mean_1 - mean_2).square().sum() + trace)


# --------------------------------------------------------------------------------------------------
# Reference statistics


def read_reference(
    source: str | Path, network: nn.Module | None = None, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Statistics to compare with -> mean (2048,), covariance (2048, 2048), float64, on the CPU.

    Args:
        source: an .npz with `mu` and `sigma` (EDM's fid-refs), a .safetensors file of
            write_statistics, an address of either, or a folder of images.
        network: of `inception`; only a folder needs it.
    """
    path = fetch(str(source))
    if path.is_dir():
        if network is None:
            raise ValueError(f"{path} is a folder, whose statistics need the network")
        return folder_statistics(path, network, batch_size).mean_and_covariance()
    if path.suffix == ".safetensors":
        tensors, _ = read_tensors(path)
    else:
        tensors = read_npz(path)
    return checked_statistics(tensors, path)


def read_npz(path: Path) -> dict[str, Tensor]:
    """`mu` and `sigma` (if they are there) of an .npz. Nothing in the file is executed."""
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {k: torch.from_numpy(archive[k]) for k in ("mu", "sigma") if k in archive}
    except (*DAMAGE, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(one_line(f"{path} is not an .npz of plain arrays ({error})")) from None


def checked_statistics(tensors: dict[str, Tensor], path: Path) -> tuple[Tensor, Tensor]:
    """mu and sigma in float64, if they can be those of Inception's features."""
    for name, shape in (("mu", (FEATURES,)), ("sigma", (FEATURES, FEATURES))):
        if name not in tensors:
            raise UserError(f"{path} holds no {name!r}; FID's references hold mu and sigma")
        value = tensors[name]
        if tuple(value.shape) != shape:
            found = tuple(value.shape)
            raise UserError(f"{path}: {name} is {found} instead of {shape}; use Inception's")
        if not value.dtype.is_floating_point or not value.isfinite().all():
            raise UserError(f"{path}: {name} is not made of finite real numbers; make it again")
    mu, sigma = tensors["mu"].double(), tensors["sigma"].double()
    # Half of a matrix is all that frechet_distance looks at: the other half would not be missed.
    if not torch.allclose(sigma, sigma.T, rtol=0, atol=1e-6 * float(sigma.abs().max())):
        raise UserError(f"{path}: sigma is not symmetric, so it is no covariance; make it again")
    return mu, sigma


def write_statistics(
    path: Path, mu: Tensor, sigma: Tensor, count: int, metadata: dict[str, str] | None = None
) -> None:
    """Write statistics as safetensors, atomically, for read_reference.

    Args:
        mu, sigma: (2048,), (2048, 2048) float64.
        count: of how many images.
        metadata: what else shall be known about them.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: statistics are written as .safetensors; choose such a name")
    checked_statistics({"mu": mu, "sigma": sigma}, path)
    write_tensors(path, {"mu": mu, "sigma": sigma}, {"count": str(count)} | (metadata or {}))


def folder_statistics(folder: Path, network: nn.Module, batch_size: int = 64) -> FeatureStatistics:
    """Statistics of all PNG and JPEG images in a folder and the folders in it, over all ranks."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < 2:
        raise UserError(f"{folder} holds {len(files)} PNG or JPEG images; FID needs at least 2")
    shape = read_image(files[0]).shape
    rank, ranks = 0, 1
    if dist.is_available() and dist.is_initialized():
        rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = files[rank::ranks]

    statistics = FeatureStatistics(device_of(network))
    for start in tqdm(range(0, len(mine), batch_size), desc=folder.name, disable=rank > 0):
        images = []
        for path in mine[start : start + batch_size]:
            images.append(read_image(path))
            if images[-1].shape != shape:
                (_, height, width), (_, h, w) = shape, images[-1].shape
                raise UserError(
                    f"{path} is {w}x{h}, but {files[0]} is {width}x{height}; FID is sensitive to "
                    "resizing, so bring them to one size deliberately"
                )
        statistics.add(inception_features(torch.stack(images), network))
    statistics.all_reduce()
    return statistics


def read_image(path: Path) -> Tensor:
    """A PNG or JPEG file -> uint8 (3, H, W)."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            mode, pixels = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(one_line(f"{path} cannot be read as PNG or JPEG ({error})")) from None
    if mode != "RGB":
        raise UserError(f"{path} is not an RGB image (its mode is {mode}); convert or remove it")
    return torch.from_numpy(pixels).permute(2, 0, 1)
