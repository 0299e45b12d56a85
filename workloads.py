"""The workloads as one table: the numbers of the paper's Appendix B, and the small MNIST one.

mnist        28x28 digits, teacher embedded in assets/, minutes on a CPU (not in the paper)
cifar10      EDM's CIFAR-10 network, conditional (cifar10-uncond: unconditional)
imagenet64   EDM's ImageNet-64 network
sd15         Stable Diffusion v1.5, the LAION-Aesthetics 6.25+ run
"""

from dataclasses import dataclass
from pathlib import Path

from plumbing.options import UserError

ASSETS = Path(__file__).parent / "assets"
MNIST_GENERATOR = ASSETS / "mnist_generator.safetensors"


@dataclass(frozen=True)
class Workload:
    """One column of Appendix B's table. Options of train.py and make_pairs.py override it."""

    image_shape: tuple[int, int, int]  # (C, H, W) of z, x and y
    num_classes: int  # 0: unconditional
    teacher: str  # a file in assets/, a released file's name, or sd15's Hub repository
    # Pairs: the teacher's deterministic ODE solution.
    num_pairs: int
    solver: str  # "heun" (EDM) or "pndm" (Stable Diffusion)
    solver_steps: int
    guidance: float  # classifier-free guidance of the real score and of the pairs; 1 = none
    # Losses.
    weighting: str  # of the KL gradient, see dmd_loss.gradient_weight
    sigma_data: float | None  # of the denoising loss; None: weight by SNR alone
    distance: str  # of the regression loss: "l2" or "lpips"
    lambda_reg: float
    kl_on_pairs: bool  # Algorithm 1's line 4: the KL gradient takes in the paired samples too
    # Optimisation: AdamW on both networks.
    steps: int
    batch_size: int  # unpaired samples per step, over all GPUs
    batch_size_ref: int  # paired samples per step
    learning_rate: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 500
    grad_clip: float = 10.0
    save_every: int = 1000  # steps between checkpoints, pictures and curves
    # Not in the paper, and off in its workloads.
    lr_decay: str = "none"  # "cosine": from the peak to zero over the run
    fake_lr_ratio: float = 1.0  # mu_fake's learning rate over G's
    lambda_reg_decay: float = 1.0  # factor by which lambda_reg falls over the run
    ema: float = 0.0  # decay of a moving average of G's weights, which is then what is kept

    @property
    def latent(self) -> bool:
        """Stable Diffusion: z, x and y are latents, the condition is text."""
        return self.solver == "pndm"


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
        kl_on_pairs=False,
        steps=900,
        batch_size=32,
        batch_size_ref=8,
        learning_rate=4e-4,
        warmup=50,
        save_every=100,
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
        kl_on_pairs=False,
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
        kl_on_pairs=False,
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
        kl_on_pairs=False,
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
        kl_on_pairs=True,
        steps=20_000,
        batch_size=2304,
        batch_size_ref=1152,
        learning_rate=1e-5,
    ),
}

# The embedded MNIST teacher: a DDPM++ with attention at 7x7, 1.03 M parameters.
MNIST_TEACHER_KWARGS = {
    "img_resolution": 28,
    "img_channels": 1,
    "label_dim": 10,
    "model_type": "SongUNet",
    "model_channels": 16,
    "channel_mult": [1, 2, 4],
    "channel_mult_emb": 4,
    "channel_mult_noise": 4,
    "num_blocks": 2,
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
