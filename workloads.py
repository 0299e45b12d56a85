"""The workloads as one table: Appendix B's numbers, the small MNIST run, and every option once.

    mnist            28x28 digits, with a teacher in assets/; minutes on a CPU (not in the paper)
    cifar10          EDM's CIFAR-10 network, conditional (cifar10-uncond: unconditional)
    imagenet64       EDM's ImageNet-64 network
    edm              any network trained with EDM's code, given as --teacher (not in the paper)
    sd15             Stable Diffusion v1.5, the LAION-Aesthetics 6.25+ run
    sd15-guidance8   the LAION-Aesthetics 6+ run, whose settings changed during training (Table 5)

A row *is* the configuration of a run: make_pairs.py and train.py take the row of --dataset and
replace the values that the command line gives.
"""

import os
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path

from dmd_loss import T_MAX, T_MIN, WEIGHTINGS, T
from plumbing.devices import AMP
from plumbing.edm_files import size_and_kind
from plumbing.options import Options, UserError, option

ASSETS = Path(__file__).parent / "assets"
EDM_REFERENCE = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/"  # statistics of the real images


@dataclass(frozen=True, kw_only=True)
class Workload(Options):
    """One workload of Appendix B. Fields with a help line are command-line options. Those marked
    `free` may have other values when a run is resumed."""

    # What is distilled.
    dataset: str = option(MISSING, "mnist, cifar10(-uncond), imagenet64, edm, sd15(-guidance8)")
    # Arguments of EDMPrecond; {}: those in the teacher's file. sd15: only the latents' shape.
    network: dict = field(metadata={"free": True})
    teacher: str = option(MISSING, "file or address of the teacher; sd15: folder or Hub repository")
    reference: str = option("", None, free=True)  # statistics of the real images, for FID
    seed: int = option(0, "seed of everything drawn at random", least=0, below=2**64)

    # Pairs: the teacher's deterministic ODE solutions.
    pairs: str = option(MISSING, "folder of the pairs", free=True)
    num_pairs: int = option(MISSING, "number of pairs", least=1, free=True)
    solver: str = option("heun", None, free=True)  # or "pndm", for sd15
    solver_steps: int = option(MISSING, "steps of the ODE solver", flag="steps", least=1, free=True)
    guidance: float = option(1.0, "sd15: classifier-free guidance; 1: none", above=0, free=True)
    prompts: str = option(str(ASSETS / "prompts.txt"), "sd15: one per line (.txt, .gz)", free=True)
    solver_amp: str = option("off", "half precision, as for train.py", AMP, flag="amp", free=True)
    solver_batch: int = option(100, "pairs solved at a time", flag="batch_size", least=1, free=True)
    shard_size: int = option(250, "pairs per file", least=1, free=True)

    # Losses.
    weighting: str = option("eq8", "w_t of the KL gradient", tuple(WEIGHTINGS))
    max_dm_step: int = option(T_MAX, "T_max of Eq. 7 (Table 5: 500)", least=T_MIN + 1, most=T)
    kl_on_pairs: bool = option(False, None, free=True)  # line 4: L_KL also uses x_ref
    lambda_dm: float = option(1.0, "weight of the KL loss (0: Table 2's ablation)", least=0)
    lambda_reg: float = option(0.25, "weight of the regression loss", least=0)
    distance: str = option("lpips", "distance of the regression loss", ("l2", "lpips"))
    decoder: str = option("tiny", "sd15: decoder; full takes gigabytes per image", ("tiny", "full"))

    # Optimisation: AdamW on both networks.
    steps: int = option(MISSING, "generator updates", least=1)
    batch_size: int = option(MISSING, "unpaired samples per step, over all ranks", least=1)
    batch_size_ref: int = option(MISSING, "paired samples; they scale with --batch-size", least=1)
    learning_rate: float = option(MISSING, "learning rate of G after the warm-up", least=0)
    weight_decay: float = 0.01
    beta1: float = option(0.9, "beta_1 of AdamW; 0: no momentum", least=0, below=1)
    beta2: float = 0.999
    phases: tuple[tuple[int, dict], ...] = ()  # (end, values that differ until then), see `at`
    warmup: int = 500  # steps, linear
    grad_clip: float = 10.0  # L2 norm of each network's gradient
    amp: str = option("auto", "half precision; auto: bf16 on a GPU (sd15, old GPUs: fp16)", AMP)
    half: str = option("bf16", None, free=True)  # what auto means

    # Not in the paper; off in its workloads.
    fake_lr_ratio: float = option(1.0, "learning rate of mu_fake, as a multiple of G's", least=0)
    ema: float = option(0.0, "share of the run over which G is averaged; 0: off", least=0, most=1)

    # How the run is carried out. Nothing here changes the result beyond rounding.
    out: str = option(MISSING, "run folder", free=True)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...", free=True)
    accumulate: int = option(1, "parts per step: less memory, same batch", least=1, free=True)
    compile: bool = option(False, "torch.compile the networks", free=True)
    shard_optimizer: bool = option(False, "spread AdamW's state over the ranks (ZeRO-1)", free=True)
    save_every: int = option(1000, "steps between checkpoints and pictures", least=1, free=True)
    save_minutes: float = option(30.0, "maximum minutes between checkpoints", above=0, free=True)
    keep: int = option(1, "checkpoints to keep (named by step if several)", least=1, free=True)

    def __post_init__(self):
        super().__post_init__()
        if not self.latent and self.guidance != 1:
            raise UserError(f"--guidance is for sd15, not for {self.dataset}; omit it")
        if self.latent and not 2 <= self.solver_steps < T:
            raise UserError(f"--steps of sd15 must be 2 to {T - 1}, not {self.solver_steps}")
        if self.latent and T % self.solver_steps > T // 10:  # its stride, T // steps, is rounded
            what = f"--steps {self.solver_steps} of sd15 makes PNDM start far below t = {T - 1}"
            raise UserError(f"{what}; choose a divisor of {T}, such as 50, 100 or 250")
        if not (self.lambda_dm or self.lambda_reg):
            raise UserError("nothing to learn with --lambda-dm 0 and --lambda-reg 0; raise one")
        if self.phases and self.steps > (end := self.phases[-1][0]):
            what = f"--steps of {self.dataset} must be at most {end}, where its last phase ends"
            raise UserError(f"{what}, not {self.steps}")

    def at(self, step: int) -> "Workload":
        """The row at step k, counted from 0, because Table 5's phases change some of its values."""
        return replace(self, **next((values for end, values in self.phases if step < end), {}))

    @property
    def latent(self) -> bool:
        """Whether z, x and y are Stable Diffusion's latents and the condition is text."""
        return self.solver == "pndm"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of z, x and y."""
        size = self.network["img_resolution"]
        return (self.network["img_channels"], size, size)


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
            model_channels=16, channel_mult=[1, 1, 4], channel_mult_emb=4, channel_mult_noise=4,
            num_blocks=1, attn_resolutions=[7], dropout=0.0,
        ),
        teacher=str(ASSETS / "mnist_teacher.safetensors"),
        num_pairs=1000, solver_steps=18, distance="l2", lambda_reg=0.5, max_dm_step=600,
        steps=1000, batch_size=16, batch_size_ref=4, learning_rate=6e-4, beta1=0.0,
        fake_lr_ratio=5.0, warmup=50, ema=0.25, save_every=100,
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
    "edm": CIFAR10 | dict(network={}, teacher="", reference=""),
    "sd15": dict(
        network=dict(img_resolution=64, img_channels=4, label_dim=0),  # the condition is text
        teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
        num_pairs=500_000, solver="pndm", solver_steps=50, guidance=3.0, solver_batch=8,
        solver_amp="auto", half="fp16",  # Eq. 11 magnifies the rounding of eps 14.6 times
        weighting="alg2", kl_on_pairs=True, steps=20_000, batch_size=2304, batch_size_ref=1152,
        learning_rate=1e-5,
    ),
}  # fmt: skip

# Table 5: the step at which each row ends, and what differs from row 8 (steps 74,000 to 80,000).
FULL_DECODER = dict(decoder="full", batch_size=1280, batch_size_ref=320)
TABLE_5 = (
    (5_400, dict(num_pairs=2_500_000, lambda_reg=0.1, max_dm_step=T_MAX)),
    (8_600, dict(num_pairs=2_500_000, lambda_reg=0.5, max_dm_step=T_MAX)),
    (21_100, dict(num_pairs=2_500_000, max_dm_step=T_MAX)),
    (56_300, dict(num_pairs=4_000_000, max_dm_step=T_MAX)),
    (60_100, dict(num_pairs=6_000_000, max_dm_step=T_MAX)),
    (68_000, dict(num_pairs=9_000_000, max_dm_step=T_MAX)),
    (74_000, dict(max_dm_step=T_MAX)),
    (80_000, {}),
    (127_000, FULL_DECODER),
    (149_500, FULL_DECODER | dict(lambda_reg=0.75)),
    (162_500, FULL_DECODER | dict(lambda_reg=0.5)),
    (165_000, FULL_DECODER | dict(lambda_reg=0.25)),
)
ROWS["sd15-guidance8"] = ROWS["sd15"] | dict(  # 32 + 16 samples on each of about 80 GPUs
    num_pairs=12_000_000, guidance=8.0, steps=165_000, batch_size=2560, batch_size_ref=1280,
    lambda_reg=1.0, max_dm_step=500, phases=TABLE_5, shard_size=1000,
)  # fmt: skip
WORKLOADS = {
    name: Workload(dataset=name, pairs=f"pairs/{name}", out=f"runs/{name}", **row)
    for name, row in ROWS.items()
}


def get_workload(dataset: str = "mnist", **changed) -> Workload:
    """A row of the table with some values changed (None: not changed), in all its phases. If
    batch_size is changed alone, all batch sizes of the row and its phases change in proportion."""
    if dataset not in WORKLOADS:
        raise UserError(f"unknown dataset {dataset!r}; choose one of {', '.join(WORKLOADS)}")
    row, changed = WORKLOADS[dataset], {k: v for k, v in changed.items() if v is not None}
    if dataset == "edm" and "teacher" in changed:
        size, unconditional = size_and_kind(changed["teacher"])
        small = "cifar10-uncond" if unconditional else "cifar10"
        like, numbers = f"{small}'s", ROWS[small]
        if size >= 64:
            like, numbers = f"imagenet64's (lambda_reg: {like})", numbers | ROWS["imagenet64"]
        of_the_data = ("network", "teacher", "reference")
        row = replace(row, **{k: v for k, v in numbers.items() if k not in of_the_data})
        if os.environ.get("RANK", "0") == "0":
            print(f"edm: options that are not given are {like}")
    fixed, scale = changed.keys(), 1.0
    if "batch_size" in changed and "batch_size_ref" not in changed:
        fixed, scale = fixed - {"batch_size"}, changed["batch_size"] / row.batch_size

    def rest(values: dict) -> dict:
        """A phase's values without those that are given, with the batch sizes in proportion."""
        kept = {name: value for name, value in values.items() if name not in fixed}
        return kept | {k: max(1, round(scale * kept[k])) for k in kept if "batch_size" in k}

    phases = tuple((end, rest(values)) for end, values in row.phases)
    changed = rest({"batch_size_ref": row.batch_size_ref}) | changed
    return replace(row, **{"phases": phases, **changed})
