"""The four workloads as one table: the numbers of the paper's Appendix B, and the small MNIST one.

    mnist        28x28 digits, teacher embedded in assets/, minutes on a CPU (not in the paper)
    cifar10      EDM's CIFAR-10 network, conditional (cifar10-uncond: unconditional)
    imagenet64   EDM's ImageNet-64 network
    sd15         Stable Diffusion v1.5, the LAION-Aesthetics 6.25+ run

Below the table: what turns a row and a file into a teacher or a generator.
"""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmd_loss import OneStepGenerator
from edm_unet import SIGMA_MAX, EDMDenoiser, EDMPrecond
from edm_weights import fetch, load_edm, load_edm_with_metadata
from rundir import UserError

ASSETS = Path(__file__).parent / "assets"
MNIST_GENERATOR = ASSETS / "mnist_generator.safetensors"


@dataclass(frozen=True)
class Workload:
    """One column of Appendix B's table. Options of train.py and make_pairs.py override it."""

    image_shape: tuple[int, int, int]  # (C, H, W) of z, x and y
    num_classes: int  # 0: unconditional
    teacher: str  # a file in assets/, or the released file's name
    # Pairs: the teacher's deterministic ODE solution.
    num_pairs: int
    solver: str
    solver_steps: int
    guidance: float  # classifier-free guidance of the real score and of the pairs; 1 = none
    # Losses.
    weighting: str  # of the KL gradient, see dmd_loss.gradient_weight
    sigma_data: float | None  # of the denoising loss; None: weight by SNR alone
    distance: str  # of the regression loss: "l2" or "lpips"
    lambda_reg: float
    # Optimisation: AdamW on both networks.
    steps: int
    batch_size: int  # unpaired samples per step, over all GPUs
    batch_size_ref: int  # paired samples per step
    learning_rate: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 500
    grad_clip: float = 10.0
    # Not in the paper, and off in its workloads.
    lr_decay: str = "none"  # "cosine": from the peak to zero over the run
    fake_lr_ratio: float = 1.0  # mu_fake's learning rate over G's
    lambda_reg_decay: float = 1.0  # factor by which lambda_reg falls over the run
    ema: float = 0.0  # decay of a moving average of G's weights, which is then what is kept


WORKLOADS = {
    "mnist": Workload(
        image_shape=(1, 28, 28),
        num_classes=10,
        teacher="mnist_teacher.safetensors",
        num_pairs=2000,
        solver="heun",
        solver_steps=18,
        guidance=1.0,
        weighting="eq8",
        sigma_data=0.5,
        distance="l2",
        lambda_reg=1.0,
        steps=900,
        batch_size=32,
        batch_size_ref=32,
        learning_rate=4e-4,
        warmup=50,
        lr_decay="cosine",
        fake_lr_ratio=4.0,
        lambda_reg_decay=0.2,
        ema=0.98,
    ),
    "cifar10": Workload(
        image_shape=(3, 32, 32),
        num_classes=10,
        teacher="edm-cifar10-32x32-cond-vp.pkl",
        num_pairs=100_000,
        solver="heun",
        solver_steps=18,
        guidance=1.0,
        weighting="eq8",
        sigma_data=0.5,
        distance="lpips",
        lambda_reg=0.25,
        steps=300_000,
        batch_size=392,
        batch_size_ref=392,
        learning_rate=5e-5,
    ),
    "cifar10-uncond": Workload(
        image_shape=(3, 32, 32),
        num_classes=0,
        teacher="edm-cifar10-32x32-uncond-vp.pkl",
        num_pairs=500_000,
        solver="heun",
        solver_steps=18,
        guidance=1.0,
        weighting="eq8",
        sigma_data=0.5,
        distance="lpips",
        lambda_reg=0.5,
        steps=300_000,
        batch_size=392,
        batch_size_ref=392,
        learning_rate=5e-5,
    ),
    "imagenet64": Workload(
        image_shape=(3, 64, 64),
        num_classes=1000,
        teacher="edm-imagenet-64x64-cond-adm.pkl",
        num_pairs=25_000,
        solver="heun",
        solver_steps=256,
        guidance=1.0,
        weighting="eq8",
        sigma_data=0.5,
        distance="lpips",
        lambda_reg=0.25,
        steps=350_000,
        batch_size=336,
        batch_size_ref=336,
        learning_rate=2e-6,
    ),
    "sd15": Workload(
        image_shape=(4, 64, 64),
        num_classes=0,  # the condition is text
        teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
        num_pairs=500_000,
        solver="pndm",
        solver_steps=50,
        guidance=3.0,
        weighting="alg2",
        sigma_data=None,
        distance="lpips",
        lambda_reg=0.25,
        steps=20_000,
        batch_size=2304,
        batch_size_ref=1152,
        learning_rate=1e-5,
    ),
}

# The embedded MNIST teacher: a DDPM++ with attention at 7x7, 0.94 M parameters.
MNIST_TEACHER_KWARGS = {
    "img_resolution": 28,
    "img_channels": 1,
    "label_dim": 10,
    "model_type": "SongUNet",
    "model_channels": 16,
    "channel_mult": [1, 2, 4],
    "channel_mult_emb": 16,  # a wide embedding: it carries the class
    "channel_mult_noise": 4,
    "num_blocks": 1,
    "attn_resolutions": [7],
    "dropout": 0.0,
}


def get_workload(dataset: str) -> Workload:
    """The table's row.

    Raises:
        UserError: no such row.
    """
    if dataset not in WORKLOADS:
        raise UserError(f"unknown dataset {dataset!r}; known: {', '.join(WORKLOADS)}")
    return WORKLOADS[dataset]


def file_hash(path: Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256: says whether two files are the same."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def load_teacher(dataset: str, source: str | None) -> tuple[EDMDenoiser, dict[str, str]]:
    """mu_real of a workload, and what a run records about it: {"name", "sha256"}.

    Args:
        dataset: a row of WORKLOADS.
        source: the weights, a file or an address that edm_weights.fetch knows; None for the
            workload's own, which is downloaded if it is not embedded.

    Raises:
        UserError: missing or unreadable file, or a network for other images.
    """
    workload = get_workload(dataset)
    if workload.solver != "heun":
        raise UserError(f"the networks of {dataset} are not built yet; choose another --dataset")
    embedded = ASSETS / workload.teacher
    file = embedded if source is None and embedded.exists() else fetch(source or workload.teacher)
    net = load_edm(file)
    check_fits(dataset, net, file)
    return EDMDenoiser(net), {"name": file.name, "sha256": file_hash(file)}


def load_generator(source: str | Path) -> tuple[OneStepGenerator, dict[str, str]]:
    """G_theta from a run's generator.safetensors, and the file's metadata (its dataset, step, ...).

    Also from others' EDM checkpoints (see edm_weights.read_edm_state): their dataset is told by the
    network's shape.

    Args:
        source: a file, or an address that edm_weights.fetch knows.

    Raises:
        UserError: missing or unreadable file, or one that holds no generator.
    """
    path = fetch(str(source))
    net, metadata = load_edm_with_metadata(path)
    if "kwargs" not in metadata:  # not a file of ours
        metadata = {"role": "generator", "dataset": dataset_of(net)} | metadata
    if metadata.get("role") != "generator" or metadata.get("dataset") not in WORKLOADS:
        raise UserError(f"{path} is not a one-step generator; use a generator.safetensors of a run")
    check_fits(metadata["dataset"], net, path)
    return OneStepGenerator(EDMDenoiser(net, metadata.get("sigma", SIGMA_MAX))), metadata


def dataset_of(net: EDMPrecond) -> str | None:
    """The workload for whose images and classes a network is made, None if there is none."""
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    fitting = ((w.image_shape, w.num_classes) == (shape, net.label_dim) for w in WORKLOADS.values())
    return next((name for name, fits in zip(WORKLOADS, fitting, strict=True) if fits), None)


def check_fits(dataset: str, net: EDMPrecond, path: Path) -> None:
    """Raise UserError unless the network takes the dataset's images and labels."""
    if dataset_of(net) != dataset:
        workload = get_workload(dataset)
        shape = (net.img_channels, net.img_resolution, net.img_resolution)
        raise UserError(
            f"{path} is a network for images {shape} with {net.label_dim} classes, but {dataset} "
            f"has {workload.image_shape} with {workload.num_classes}; choose the right file"
        )


def load_mnist(folder: str, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST through torchvision -> images (N, 1, 28, 28) float32 in [-1, 1], labels (N,) long.

    Raises:
        UserError: not in the folder and not to be had from the network, or damaged.
    """
    try:
        from torchvision.datasets import MNIST  # only needed to retrain what assets/ holds
    except ImportError:
        raise UserError("MNIST is read through torchvision: pip install torchvision") from None
    try:
        data = MNIST(folder, train=train, download=True)
    except (OSError, RuntimeError, ValueError, gzip.BadGzipFile) as error:
        raise UserError(
            f"MNIST is neither complete in {folder!r} nor downloadable ({error}); put its four "
            f"files into {folder}/MNIST/raw"
        ) from None
    return data.data[:, None].float() / 127.5 - 1, torch.as_tensor(data.targets)
