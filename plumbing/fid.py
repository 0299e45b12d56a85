"""The Frechet Inception Distance by EDM's protocol, in pieces that evaluate.py puts together.

FID depends on the number of images and on the seeds, so it can only be compared under the same
protocol. The paper follows EDM's (README, generate.py and fid.py of github.com/NVlabs/edm):

    seeds       Image k has its own random generator, seeded with k (modulo 2^32), on the device
                that samples. It draws the noise, then the class label, uniform over the classes.
                So neither the batch size nor the number of ranks matters.
    counting    50,000 images, three times: seeds 0-49999, 50000-99999 and 100000-149999. The
                lowest FID is reported.
    rounding    uint8 by x * 127.5 + 128, clamped (drawing.to_uint8). Inception itself resizes to
                299x299, as in TensorFlow 1.
    sums        Mean and covariance (denominator N - 1) are float64. The reference statistics, an
                .npz with `mu` and `sigma`, are those of all training images.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from plumbing.devices import Ranks
from plumbing.downloads import download, in_home
from plumbing.files import one_line_errors, torch_load
from plumbing.options import UserError

Statistics = tuple[Tensor, Tensor]  # mean (D,) and covariance (D, D), float64

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")  # of images on disk, by Pillow's names
FEATURES = 2048
# torch-fidelity's conversion of the original TensorFlow weights.
INCEPTION_HASH = "6726825d"  # the first 8 digits of its SHA-256
INCEPTION_FILE = f"weights-inception-2015-12-05-{INCEPTION_HASH}.pth"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)


def seeded_inputs(
    seeds: Sequence[int], shape: tuple[int, ...], num_classes: int, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """What EDM's generate.py draws for the images with these seeds: z (B, *shape) ~ N(0, I), and
    labels (B,) long, or None if num_classes is 0. `device` is the one that samples."""
    noises, labels = [], []
    for seed in seeds:
        generator = torch.Generator(device).manual_seed(seed % 2**32)
        noises.append(torch.randn(shape, generator=generator, device=device))
        if num_classes:
            labels.append(torch.randint(num_classes, (), generator=generator, device=device))
    return torch.stack(noises), torch.stack(labels) if num_classes else None


def inception(device: torch.device | str) -> nn.Module:
    """The network, in eval mode: uint8 (B, 3, H, W) -> one-tuple of features (B, 2048) float32. Its
    weights are downloaded to torch hub's folder if they are missing (let rank 0 go first)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = in_home(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.exists():
        download(INCEPTION_URL, path, INCEPTION_HASH)
    with one_line_errors(path):
        torch_load(path)  # only tensors? The constructor would run whatever the file says
    how = {"feature_extractor_weights_path": str(path)}
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", [str(FEATURES)], **how)
    except RuntimeError as error:  # other tensors, or no memory
        with one_line_errors(path, "is another network's; delete it"):
            raise error
    return network.eval().requires_grad_(False).to(device)


@torch.no_grad()
def feature_statistics(batches: Iterable[Tensor], network: Callable, ranks: Ranks) -> Statistics:
    """Statistics of the features (D = 2048) of all ranks' images, on the CPU. The sums are float64,
    because they cancel. `batches`: this rank's, uint8 RGB (B, 3, H, W); `network`: inception's."""
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


def mean_and_covariance(features: Tensor) -> Statistics:
    """features (N, D) -> mean (D,), covariance (D, D), float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500), for means
    (D,) and covariances (D, D) in float64. The trace of (C1 C2)^(1/2) is the sum of the roots of
    the eigenvalues of C1 C2, which are those of the symmetric C1^(1/2) C2 C1^(1/2)."""
    values, vectors = torch.linalg.eigh(cov_1)
    root_1 = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root_1 @ cov_2 @ root_1)
    trace = cov_1.trace() + cov_2.trace() - 2 * product.clamp(min=0).sqrt().sum()
    distance = float((mean_1 - mean_2).square().sum() + trace)
    return 0.0 if -1e-6 * float(cov_1.trace() + cov_2.trace()) < distance < 0 else distance


def read_reference(
    path: Path, network: Callable, batch_size: int, ranks: Ranks, size: int
) -> Statistics:
    """Statistics of the real images, on the CPU: read from an .npz with `mu` (2048,) and `sigma`
    (2048, 2048), or computed from a folder of images (size x size), which the ranks share."""
    if path.is_dir():
        return feature_statistics(read_images(path, batch_size, ranks, size), network, ranks)
    with one_line_errors(path), np.load(path, allow_pickle=False) as archive:
        tensors = {k: torch.from_numpy(archive[k]) for k in ("mu", "sigma") if k in archive}
    for name, shape in (("mu", (FEATURES,)), ("sigma", (FEATURES, FEATURES))):
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        if found != shape or not tensors[name].isfinite().all():
            what = f"{path}: {name} is {found} instead of {shape} of finite numbers"
            raise UserError(f"{what}; use Inception's")
    return tensors["mu"].double(), tensors["sigma"].double()


def list_images(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders. All that Pillow knows must be of FORMATS."""
    known = Image.registered_extensions()  # {".jpg": "JPEG", ...}
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known)
    if other := [p for p in files if known[p.suffix.lower()] not in FORMATS]:
        raise UserError(f"{other[0]}: FID reads {', '.join(FORMATS)}; convert or move such files")
    if len(files) < 2:
        raise UserError(f"{folder} holds {len(files)} images; FID needs at least 2")
    return files


def read_images(folder: Path, batch_size: int, ranks: Ranks, size: int) -> Iterator[Tensor]:
    """This rank's share of a folder's images, batch by batch: uint8 (B, 3, H, W)."""
    files = list_images(folder)
    share = ranks.share(len(files))
    for start in tqdm(range(0, len(share), batch_size), desc=folder.name, disable=ranks.rank > 0):
        images = {files[k]: read_image(files[k]) for k in share[start : start + batch_size]}
        for path, image in images.items():
            if image.shape != (3, size, size):
                what = f"{path} is {tuple(image.shape)} instead of {(3, size, size)}"
                raise UserError(f"{what}; resize it yourself, since FID depends on how it is done")
        yield torch.stack(list(images.values()))


def read_image(path: Path) -> Tensor:
    """An image file -> uint8 (3, H, W)."""
    with one_line_errors(path), Image.open(path, formats=FORMATS) as image:
        # 16 bits would be clipped, transparency lost.
        if image.mode not in ("L", "P", "RGB") or image.has_transparency_data:
            raise UserError(f"{path} has mode {image.mode} or transparency; convert it to RGB")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
