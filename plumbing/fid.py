"""The Frechet Inception Distance as EDM measures it, in pieces that evaluate.py puts together.

FID is lower for more images and varies with the seeds, so only equal protocols compare. EDM's
(github.com/NVlabs/edm, its README, generate.py and fid.py), which the paper follows:

    seeds       Image k has a random generator of its own, seeded with k (modulo 2^32), on the
                device that samples. From it come first the noise, then the class label, uniform
                over the classes, so classes are not balanced exactly; then a stochastic sampler's
                noise. Neither the batch size nor the number of ranks matters.
    counting    50,000 images, thrice, with the seeds 0-49999, 50000-99999 and 100000-149999; the
                least FID is reported.
    rounding    uint8 by x * 127.5 + 128, clamped (drawing.to_uint8), before the features. The
                network itself resizes to 299x299, as TensorFlow 1 did.
    sums        Mean and covariance (denominator N - 1) in float64. Reference statistics are an
                .npz with `mu` and `sigma`, of the training images, all of them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from plumbing.devices import Ranks
from plumbing.downloads import download
from plumbing.files import one_line_errors, torch_load
from plumbing.options import UserError

FEATURES = 2048
# torch-fidelity's conversion of the original TensorFlow weights.
INCEPTION_HASH = "6726825d"  # the first 8 digits of its SHA-256
INCEPTION_FILE = f"weights-inception-2015-12-05-{INCEPTION_HASH}.pth"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)

# --------------------------------------------------------------------------------------------------
# Seeds and features


def seeded_inputs(
    seeds: Sequence[int], shape: tuple[int, ...], num_classes: int, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """What EDM's generate.py draws for the images with these seeds, on the device that samples:
    z (B, *shape) ~ N(0, I), and labels (B,) long, None where num_classes is 0."""
    noises, labels = [], []
    for seed in seeds:
        generator = torch.Generator(device).manual_seed(seed % 2**32)
        noises.append(torch.randn(shape, generator=generator, device=device))
        if num_classes:
            labels.append(torch.randint(num_classes, (), generator=generator, device=device))
    return torch.stack(noises), torch.stack(labels) if num_classes else None


def inception(device: torch.device | str) -> nn.Module:
    """The network, in eval mode: uint8 (B, 3, H, W) -> one-tuple of features (B, 2048) float32. Its
    weights are in torch hub's folder, by hand or downloaded (among ranks let the first go ahead).
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.exists():
        download(INCEPTION_URL, path, INCEPTION_HASH)
    with one_line_errors(path):
        # The constructor loads with weights_only=False, which runs whatever a file says: only after
        # we have seen that this one says nothing but tensors.
        torch_load(path)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(FEATURES)], feature_extractor_weights_path=str(path)
        )  # strict: missing, surplus and misshapen tensors are a RuntimeError
    return network.eval().requires_grad_(False).to(device)


# --------------------------------------------------------------------------------------------------
# Mean and covariance


@torch.no_grad()
def feature_statistics(
    batches: Iterable[Tensor], network: Callable, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of the features of all ranks' images, float64, on the CPU;
    batches are this rank's, uint8 RGB (B, 3, H, W). Made of sums, whose cancellation float64 bears.
    The network is `inception`'s, D = 2048."""
    count = torch.zeros((), dtype=torch.float64, device=ranks.device)
    total = torch.zeros(FEATURES, dtype=torch.float64, device=ranks.device)
    outer = torch.zeros(FEATURES, FEATURES, dtype=torch.float64, device=ranks.device)
    for images in batches:
        features = network(images.to(ranks.device))[0].double()  # (B, D)
        count += len(features)
        total += features.sum(0)
        outer += features.T @ features
    count, total, outer = (ranks.sum(x).cpu() for x in (count, total, outer))
    mean = total / count
    return mean, (outer - torch.outer(total, mean)) / (count - 1)


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """features (N, D) -> mean (D,), covariance (D, D), float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500), of means
    (D,) and covariances (D, D) in float64.

    The trace of the root of C1 C2 is the sum of the roots of its eigenvalues, which are those of
    the symmetric C1^(1/2) C2 C1^(1/2).
    """
    values, vectors = torch.linalg.eigh(cov_1)
    root_1 = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root_1 @ cov_2 @ root_1)
    trace = cov_1.trace() + cov_2.trace() - 2 * product.clamp(min=0).sqrt().sum()
    return float((mean_1 - mean_2).square().sum() + trace)


# --------------------------------------------------------------------------------------------------
# Reference statistics


def read_reference(
    path: Path, network: Callable, batch_size: int, ranks: Ranks, size: int
) -> tuple[Tensor, Tensor]:
    """Of an .npz with `mu` and `sigma`, as EDM's, or of a folder of images of size x size, that the
    ranks share -> mean (2048,), covariance (2048, 2048), float64, on the CPU."""
    if path.is_dir():
        return feature_statistics(read_images(path, batch_size, ranks, size), network, ranks)
    with one_line_errors(path), np.load(path, allow_pickle=False) as archive:
        tensors = {k: torch.from_numpy(archive[k]) for k in ("mu", "sigma") if k in archive}
    for name, shape in (("mu", (FEATURES,)), ("sigma", (FEATURES, FEATURES))):
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        if found != shape:
            raise UserError(f"{path}: {name} is {found} instead of {shape}; use Inception's")
    return tensors["mu"].double(), tensors["sigma"].double()


def list_images(folder: Path) -> list[Path]:
    """The PNG and JPEG files in a folder and the folders in it."""
    suffixes = (".png", ".jpg", ".jpeg")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    if len(files) < 2:
        raise UserError(f"{folder} holds {len(files)} PNG or JPEG images; FID needs at least 2")
    return files


def read_images(folder: Path, batch_size: int, ranks: Ranks, size: int) -> Iterator[Tensor]:
    """This rank's share of a folder's images, batch by batch: uint8 (B, 3, H, W)."""
    files = list_images(folder)
    share = ranks.share(len(files))
    for start in tqdm(range(0, len(share), batch_size), desc=folder.name, disable=ranks.rank > 0):
        images = {files[k]: read_image(files[k]) for k in share[start : start + batch_size]}
        for path, image in images.items():
            if image.shape != (3, size, size):
                raise UserError(
                    f"{path} is {tuple(image.shape)} instead of {(3, size, size)}: FID depends on "
                    "how images are resized, so bring them to one size deliberately"
                )
        yield torch.stack(list(images.values()))


def read_image(path: Path) -> Tensor:
    """A PNG or JPEG file -> uint8 (3, H, W)."""
    with one_line_errors(path), Image.open(path, formats=("PNG", "JPEG")) as image:
        if image.mode not in ("L", "P", "RGB"):  # 16 bits would be clipped, transparency lost
            raise UserError(f"{path} has mode {image.mode}; convert it to RGB, or remove it")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
