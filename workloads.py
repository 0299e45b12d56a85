"""The workloads as one table: Appendix B's numbers, the small MNIST run, and every option once.

    mnist        28x28 digits, teacher embedded in assets/, minutes on a CPU (not in the paper)
    cifar10      EDM's CIFAR-10 network, conditional (cifar10-uncond: unconditional)
    imagenet64   EDM's ImageNet-64 network
    sd15         Stable Diffusion v1.5, the LAION-Aesthetics 6.25+ run

A row *is* the configuration of a run: make_pairs.py and train.py take the row of --dataset, with
what the command line changes.
"""

from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path

from dmd_loss import T_MAX, T_MIN, WEIGHTINGS, T
from plumbing.devices import AMP
from plumbing.options import Options, UserError, option

ASSETS = Path(__file__).parent / "assets"
EDM_REFERENCE = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/"  # statistics of the real images


@dataclass(frozen=True, kw_only=True)
class Workload(Options):
    """One column of Appendix B's table. What has a help line is an option of the command line;
    `free` marks what a run may be resumed with, since it does not change the result."""

    # What is distilled.
    dataset: str = option(MISSING, "mnist, cifar10, cifar10-uncond, imagenet64, sd15")
    network: dict = field(metadata={"free": True})  # EDMPrecond's arguments; of sd15 the image's
    teacher: str = option(
        MISSING, "teacher weights: a file or an address; sd15: a folder or a Hub repository"
    )
    reference: str = option("", None, free=True)  # statistics of the real images, for FID
    seed: int = option(
        0, "what step k draws for row i is a function of (seed, k, i)", least=0, below=2**64
    )

    # Pairs: the teacher's deterministic ODE solutions.
    pairs: str = option(MISSING, "folder of the pairs", free=True)
    num_pairs: int = option(MISSING, "number of pairs", least=1, free=True)
    solver: str = option("heun", None, free=True)  # or "pndm", of Stable Diffusion
    solver_steps: int = option(
        MISSING, "steps of the teacher's solver", flag="steps", least=1, free=True
    )
    guidance: float = option(
        1.0, "sd15: scale of classifier-free guidance, 1 = none", above=0, free=True
    )
    prompts: str = option(
        str(ASSETS / "prompts.txt"), "sd15: text file, one prompt a line (.gz too)", free=True
    )
    solver_amp: str = option(
        "off", "half precision of the network, as in train.py", AMP, flag="amp", free=True
    )
    solver_batch: int = option(
        100, "samples solved at a time", flag="batch_size", least=1, free=True
    )
    shard_size: int = option(250, "pairs per file", least=1, free=True)

    # Losses.
    weighting: str = option("eq8", "w_t of the KL gradient", tuple(WEIGHTINGS))
    max_dm_step: int = option(
        T_MAX, "T_max of the KL gradient (Table 5: 500)", least=T_MIN + 1, most=T
    )
    kl_on_pairs: bool = option(False, None, free=True)  # line 4: L_KL takes in paired samples too
    lambda_dm: float = option(
        1.0, "weight of the distribution-matching loss (0: Table 2's ablation)", least=0
    )
    lambda_reg: float = option(0.25, "weight of the regression loss", least=0)
    distance: str = option("lpips", "distance of the regression loss", ("l2", "lpips"))
    decoder: str = option(
        "tiny", "sd15: decoder of images (full: gigabytes per image)", ("tiny", "full")
    )

    # Optimisation: AdamW on both networks.
    steps: int = option(MISSING, "generator updates", least=1)
    batch_size: int = option(MISSING, "unpaired samples per step, over all ranks", least=1)
    batch_size_ref: int = option(
        MISSING, "paired samples per step (alone, --batch-size keeps the proportion)", least=1
    )
    learning_rate: float = option(MISSING, "peak learning rate of both networks", least=0)
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 500  # steps, linear
    grad_clip: float = 10.0  # L2 norm, each network by itself
    amp: str = option(
        "auto", "half precision; auto: on a GPU bf16 (sd15, and older ones: fp16)", AMP
    )
    half: str = option("bf16", None, free=True)  # that of auto

    # Not in the paper, and off in its workloads.
    lr_decay: str = option("none", "of the learning rate after the warm-up", ("none", "cosine"))
    fake_lr_ratio: float = option(1.0, "mu_fake's learning rate over G's", least=0)
    lambda_reg_decay: float = option(
        1.0, "factor by which --lambda-reg falls over the run", above=0
    )
    ema: float = option(0.0, "moving average of G's weights, 0 = off", least=0, below=1)

    # How it is run: nothing here changes the result beyond rounding.
    out: str = option(MISSING, "run folder", free=True)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...", free=True)
    accumulate: int = option(1, "parts of a step: less memory, same batch", least=1, free=True)
    compile: bool = option(False, "torch.compile the networks", free=True)
    shard_optimizer: bool = option(False, "spread AdamW's state over the ranks (ZeRO-1)", free=True)
    save_every: int = option(
        1000, "steps between checkpoints, pictures and curves", least=1, free=True
    )
    save_minutes: float = option(30.0, "minutes between them, at most", above=0, free=True)
    keep: int = option(
        1, "checkpoints to keep; if several, each also as a copy named by its step", least=1,
        free=True,
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if not self.latent and self.guidance != 1:
            raise UserError(f"--guidance is for sd15; {self.dataset} has a teacher without text")
        if self.latent and not 2 <= self.solver_steps < T:
            raise UserError(f"--steps of sd15 must be 2 to {T - 1}, not {self.solver_steps}")
        if not (self.lambda_dm or self.lambda_reg):
            raise UserError("with --lambda-dm 0 and --lambda-reg 0 there is nothing to learn")

    @property
    def latent(self) -> bool:
        """Stable Diffusion: z, x and y are latents, the condition is text."""
        return self.solver == "pndm"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of z, x and y."""
        size = self.network["img_resolution"]
        return (self.network["img_channels"], size, size)

    @property
    def num_classes(self) -> int:
        """0: unconditional, or conditioned on text."""
        return self.network["label_dim"]


CIFAR10_NETWORK = dict(
    model_type="SongUNet", img_resolution=32, img_channels=3, label_dim=10, model_channels=128,
    channel_mult=[2, 2, 2], num_blocks=4, attn_resolutions=[16], dropout=0.13,
)  # fmt: skip
CIFAR10 = dict(
    network=CIFAR10_NETWORK, teacher="edm-cifar10-32x32-cond-vp.pkl",
    reference=f"{EDM_REFERENCE}cifar10-32x32.npz",
    num_pairs=100_000, solver_steps=18, steps=300_000, batch_size=392, batch_size_ref=392,
    learning_rate=5e-5,
)  # fmt: skip

ROWS = {
    "mnist": dict(
        network=dict(
            model_type="SongUNet", img_resolution=28, img_channels=1, label_dim=10,
            model_channels=16, channel_mult=[1, 2, 4], channel_mult_emb=4, channel_mult_noise=4,
            num_blocks=2, attn_resolutions=[7], dropout=0.0,
        ),
        teacher=str(ASSETS / "mnist_teacher.safetensors"),
        num_pairs=2000, solver_steps=18, distance="l2", lambda_reg=1.0, lambda_reg_decay=0.2,
        steps=900, batch_size=32, batch_size_ref=8, learning_rate=4e-4, fake_lr_ratio=4.0,
        warmup=50, lr_decay="cosine", ema=0.98, save_every=100,
    ),
    "cifar10": CIFAR10,
    "cifar10-uncond": CIFAR10 | dict(
        network=CIFAR10_NETWORK | dict(label_dim=0), teacher="edm-cifar10-32x32-uncond-vp.pkl",
        num_pairs=500_000, lambda_reg=0.5,
    ),
    "imagenet64": dict(
        network=dict(
            model_type="DhariwalUNet", img_resolution=64, img_channels=3, label_dim=1000,
            model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3,
            attn_resolutions=[32, 16, 8], dropout=0.1,
        ),
        teacher="edm-imagenet-64x64-cond-adm.pkl",
        reference=f"{EDM_REFERENCE}imagenet-64x64.npz",
        num_pairs=25_000, solver_steps=256, steps=350_000, batch_size=336, batch_size_ref=336,
        learning_rate=2e-6,
    ),
    "sd15": dict(
        network=dict(img_resolution=64, img_channels=4, label_dim=0),  # the condition is text
        teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
        num_pairs=500_000, solver="pndm", solver_steps=50, guidance=3.0, solver_batch=8,
        solver_amp="auto", half="fp16",  # bf16's rounding of eps counts 14.6 times, SDDenoiser
        weighting="alg2", kl_on_pairs=True, steps=20_000, batch_size=2304, batch_size_ref=1152,
        learning_rate=1e-5,
    ),
}  # fmt: skip
WORKLOADS = {
    name: Workload(dataset=name, pairs=f"pairs/{name}", out=f"runs/{name}", **row)
    for name, row in ROWS.items()
}


def get_workload(dataset: str = "mnist", **changed) -> Workload:
    """The table's row, with some of its values changed.

    A batch size alone changes that of the paired samples in proportion.
    """
    if dataset not in WORKLOADS:
        raise UserError(f"unknown dataset {dataset!r}; known: {', '.join(WORKLOADS)}")
    row = WORKLOADS[dataset]
    if "batch_size" in changed and "batch_size_ref" not in changed:
        ratio = row.batch_size_ref / row.batch_size
        changed["batch_size_ref"] = max(1, round(ratio * changed["batch_size"]))
    return replace(row, **changed)
