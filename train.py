"""Train the one-step generator: Algorithm 1 of the paper.

    python train.py                       MNIST, about 6 minutes on 2 CPU cores

Needs pairs (python make_pairs.py). It writes runs/DATASET/: config.json, log.csv, curves.png,
samples_STEP.png (the teacher's y_ref above G(z_ref), then fresh G(z)), checkpoint.pt to resume from
and generator.safetensors, the result. Ctrl-C saves; the same command goes on, exactly as if it had
not been interrupted. The last line it prints:

    wrote runs/mnist/generator.safetensors; look at it with: python sample.py
"""

import copy
import csv
import io
import json
import math
import pickle
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from dmd_loss import (
    WEIGHTINGS,
    OneStepGenerator,
    denoising_loss,
    distribution_matching_loss,
    l2_distance,
    lpips_distance,
    regression_loss,
)
from pairs import Pairs
from rundir import (
    UserError,
    generator_for,
    holds_files,
    option,
    pick_device,
    read_json,
    run_script,
    save_grid,
    write_bytes,
    write_csv,
    write_json,
    write_tensors,
    write_torch,
)
from workloads import WORKLOADS, get_workload, load_teacher


@dataclass
class Config:
    """Options left at None take the dataset's value from workloads.py."""

    dataset: str = option("mnist", f"one of {', '.join(WORKLOADS)}")
    pairs: str | None = option(None, "folder of the pairs (default: pairs/DATASET)")
    out: str | None = option(None, "run folder (default: runs/DATASET)")
    teacher: str | None = option(None, "teacher weights (default: the dataset's own)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    seed: int = option(0, "what step k draws is a function of (seed, k) alone")
    steps: int | None = option(None, "generator updates")
    batch_size: int | None = option(None, "unpaired samples per step")
    batch_size_ref: int | None = option(None, "paired samples per step")
    learning_rate: float | None = option(None, "peak learning rate of AdamW, both networks")
    fake_lr_ratio: float | None = option(
        None, "mu_fake's learning rate over G's, 1 = the same (not in the paper)"
    )
    warmup: int | None = option(None, "steps of linear warm-up")
    lr_decay: str | None = option(None, "after the warm-up (not in the paper)", ("none", "cosine"))
    ema: float | None = option(None, "moving average of G's weights, 0 = off (not in the paper)")
    lambda_dm: float = option(
        1.0, "weight of the distribution-matching loss (0: Table 2's ablation)"
    )
    lambda_reg: float | None = option(None, "weight of the regression loss")
    lambda_reg_decay: float | None = option(
        None, "factor by which that weight falls over the run, 1 = constant"
    )
    distance: str | None = option(None, "distance of the regression loss", ("l2", "lpips"))
    weighting: str | None = option(None, "w_t of the KL gradient", WEIGHTINGS)
    grad_clip: float | None = option(None, "largest L2 norm of a gradient")
    log_every: int = option(10, "steps between updates of the progress line")
    save_every: int = option(100, "steps between checkpoints, pictures and curves")


VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's, for LPIPS

# Options that may differ when a run is resumed: none of them changes its result. (Where the pairs
# lie may change; how they were made may not.)
FREE_OPTIONS = ("device", "pairs", "out", "log_every", "save_every")


def resolve(config: Config) -> Config:
    """Fill the options left at None from the dataset's row, and check their ranges."""
    workload = get_workload(config.dataset)
    for field in fields(config):
        from_table = getattr(config, field.name) is None and hasattr(workload, field.name)
        if from_table and field.name != "teacher":
            setattr(config, field.name, getattr(workload, field.name))
    config.pairs = config.pairs or f"pairs/{config.dataset}"
    config.out = config.out or f"runs/{config.dataset}"
    smallest = {"steps": 1, "batch_size": 1, "batch_size_ref": 1, "log_every": 1, "save_every": 1}
    smallest |= {"warmup": 0, "learning_rate": 0, "lambda_reg": 0, "grad_clip": 0, "ema": 0}
    smallest |= {"seed": 0, "fake_lr_ratio": 0, "lambda_dm": 0, "lambda_reg_decay": 1e-6}
    for name, bound in smallest.items():
        if not getattr(config, name) >= bound:
            name, value = name.replace("_", "-"), getattr(config, name)
            raise UserError(f"--{name} must be at least {bound}, not {value}")
    if config.ema >= 1:
        raise UserError(f"--ema must be below 1, not {config.ema}")
    return config


def choose_distance(config: Config, device: torch.device) -> Callable:
    """The distance of Eq. 9.

    Raises:
        UserError: LPIPS without its package, or without VGG's weights.
    """
    if config.distance == "l2":
        return l2_distance
    try:
        from lpips import LPIPS  # slow to import, and not needed for L2

        network = LPIPS(net="vgg", verbose=False)
    except ImportError:
        raise UserError("LPIPS is a package: pip install lpips, or use --distance l2") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(
            f"LPIPS needs VGG-16's weights ({reason}): put {VGG_URL} into "
            f"{torch.hub.get_dir()}/checkpoints, or use --distance l2"
        ) from None
    return partial(lpips_distance, network.eval().requires_grad_(False).to(device))


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up to the peak, then constant as in the paper, or half a cosine down to zero."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.lr_decay == "none":
        return config.learning_rate * warm
    progress = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))


def lambda_reg(config: Config, step: int) -> float:
    """The weight of the regression loss, constant or falling geometrically over the run."""
    return config.lambda_reg * config.lambda_reg_decay ** (step / config.steps)


def adamw(network: torch.nn.Module, config: Config, device: torch.device) -> torch.optim.AdamW:
    """Appendix B's optimiser, for G and mu_fake alike; the loop sets the learning rate."""
    workload = get_workload(config.dataset)
    return torch.optim.AdamW(
        network.parameters(),
        betas=workload.betas,
        weight_decay=workload.weight_decay,
        fused=device.type == "cuda",
    )


def update(
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    learning_rate: float,
    grad_clip: float,
) -> Tensor:
    """Backward, clip, step. Returns the gradient's norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return norm


def main(config: Config) -> None:
    """Train, or go on training, and write generator.safetensors."""
    config = resolve(config)
    workload, device = get_workload(config.dataset), pick_device(config.device)
    out = Path(config.out)
    mu_real, teacher = load_teacher(config.dataset, config.teacher)
    pairs = Pairs(Path(config.pairs), config.dataset, teacher)
    distance = choose_distance(config, device)
    claim_folder(out, config, teacher, pairs)

    # 0. G and mu_fake start as the teacher. All run in eval mode: no dropout anywhere.
    mu_real = mu_real.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    run = start_from_teacher(mu_real, config)
    G, mu_fake, G_ema, optimizer_G, optimizer_fake = run.values()
    start, rows = load_checkpoint(out, run, device)

    log, interrupted = Log(config, start, rows), catch_signals()
    for step in range(start, config.steps):
        # 1. Sample z ~ N(0, I) with its condition, and pairs (z_ref, y_ref) ~ D.
        # (The 1 keeps this stream apart from the pairs' noises, which come from (seed, k).)
        generator = generator_for(config.seed, step, 1)
        z = torch.randn(config.batch_size, *workload.image_shape, generator=generator)
        index = torch.randint(len(pairs), (config.batch_size_ref,), generator=generator)
        z_ref, y_ref, cond_ref = pairs.batch(index.tolist())
        cond = draw_condition(workload.num_classes, config.batch_size, generator)
        z, cond, z_ref, y_ref, cond_ref = to(device, z, cond, z_ref, y_ref, cond_ref)

        # 2. Generate x = G(z) and x_ref = G(z_ref) in one call.
        both = None if cond is None else torch.cat([cond, cond_ref])
        x, x_ref = G(torch.cat([z, z_ref]), both).split([len(z), len(z_ref)])

        # 3. Distribution-matching gradient (Eq. 7) and regression (Eq. 9); step G.
        loss_kl, info = distribution_matching_loss(
            mu_real, mu_fake, x, cond, weighting=config.weighting, generator=generator
        )
        loss_reg = regression_loss(x_ref, y_ref, distance)
        loss_G = config.lambda_dm * loss_kl + lambda_reg(config, step) * loss_reg
        lr = learning_rate(config, step)
        norm_G = update(G, optimizer_G, loss_G, lr, config.grad_clip)
        if config.ema:
            update_average(G_ema, G, config.ema, step)

        # 4. Denoise the generated samples (Eq. 6): the same x, detached.
        loss_denoise = denoising_loss(
            mu_fake, x.detach(), cond, sigma_data=workload.sigma_data, generator=generator
        )

        # 5. Step mu_fake.
        lr_fake = config.fake_lr_ratio * lr
        norm_fake = update(mu_fake, optimizer_fake, loss_denoise, lr_fake, config.grad_clip)

        log.add(step, loss_kl, loss_reg, loss_denoise, info["grad_norm"], norm_G, norm_fake)
        if interrupted or step + 1 == config.steps or (step + 1) % config.save_every == 0:
            save_run(out, run, step + 1, log, config, teacher)
            picture = out / f"samples_{step + 1:06d}.png"
            draw_samples(picture, G_ema, z_ref, y_ref, cond_ref, z, cond)
            draw_curves(out / "curves.png", log.rows)
        if interrupted and step + 1 < config.steps:
            leave(interrupted, step + 1)
    print(f"wrote {out / 'generator.safetensors'}; look at it with: python sample.py")


def start_from_teacher(mu_real: torch.nn.Module, config: Config) -> dict:
    """What is trained and checkpointed: G, mu_fake, G's average (G itself if off), optimisers."""
    device = mu_real.sigma.device
    G = OneStepGenerator(copy.deepcopy(mu_real)).requires_grad_(True)
    mu_fake = copy.deepcopy(mu_real).requires_grad_(True)
    return {
        "G": G,
        "mu_fake": mu_fake,
        "G_ema": copy.deepcopy(G).requires_grad_(False) if config.ema else G,
        "optimizer_G": adamw(G, config, device),
        "optimizer_fake": adamw(mu_fake, config, device),
    }


def draw_condition(num_classes: int, batch: int, generator: torch.Generator) -> Tensor | None:
    """Uniform class labels (B,), or None for an unconditional network."""
    if num_classes == 0:
        return None
    return torch.randint(num_classes, (batch,), generator=generator)


def to(device: torch.device, *tensors: Tensor | None) -> list[Tensor | None]:
    """Bring tensors to the device, images in channels-last layout."""
    layouts = [
        torch.channels_last if x is not None and x.ndim == 4 else torch.preserve_format
        for x in tensors
    ]
    return [
        None if x is None else x.to(device, memory_format=layout)
        for x, layout in zip(tensors, layouts, strict=True)
    ]


@torch.no_grad()
def update_average(G_ema: torch.nn.Module, G: torch.nn.Module, decay: float, step: int) -> None:
    """Exponential moving average; a short memory at first, so that the start is forgotten."""
    decay = min(decay, (step + 1) / (step + 10))
    for average, weight in zip(G_ema.parameters(), G.parameters(), strict=True):
        average.lerp_(weight, 1 - decay)


# --------------------------------------------------------------------------------------------------
# The run folder

SCALARS = ["loss_kl", "loss_reg", "loss_denoise", "dm_grad", "grad_norm_G", "grad_norm_fake"]
SHOWN = [*SCALARS[:3], *SCALARS[4:], "images_per_s"]


def claim_folder(out: Path, config: Config, teacher: dict[str, str], pairs: Pairs) -> None:
    """Write config.json, or check that the folder holds this very run.

    Raises:
        UserError: the folder holds something else, which is left alone.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in FREE_OPTIONS}
    settings["teacher"], settings["made_pairs"] = teacher, pairs.meta
    if not (out / "config.json").exists():
        if holds_files(out):
            raise UserError(f"{out} holds other files; choose another --out")
        return write_json(out / "config.json", settings)
    if not (out / "checkpoint.pt").exists():  # the run never saved: it may start otherwise
        return write_json(out / "config.json", settings)
    found = read_json(out / "config.json")
    names = sorted(settings.keys() | found.keys())
    changed = [name for name in names if settings.get(name) != found.get(name)]
    # Without decay, step k does not know how many steps follow: such a run may be prolonged.
    constant = (config.lr_decay, config.lambda_reg_decay) == ("none", 1)
    if changed == ["steps"] and constant and config.steps > found["steps"]:
        write_json(out / "config.json", settings)
    elif changed:
        raise UserError(
            f"{out} holds a run with another {', '.join(changed)}; "
            "choose another --out or delete the folder"
        )


def load_checkpoint(out: Path, run: dict, device: torch.device) -> tuple[int, list[dict]]:
    """Restore a run's networks and optimisers -> number of steps done, rows of the log.

    Raises:
        UserError: damaged checkpoint.
    """
    path = out / "checkpoint.pt"
    if not path.exists():
        return 0, []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in run.items():
            part.load_state_dict(state[name])
        with open(out / "log.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= state["step"]]
    except (OSError, torch.OutOfMemoryError) as error:
        raise UserError(f"{path} cannot be loaded now ({error}); it was left as it is") from None
    except Exception as error:  # torch.load and load_state_dict raise a dozen types
        reason = (str(error) or repr(error)).splitlines()[0][:200]
        raise UserError(
            f"{path} cannot be resumed ({reason}); delete {out} to start over"
        ) from None
    return state["step"], rows


def save_run(out: Path, run: dict, step: int, log: "Log", config: Config, teacher) -> None:
    """Write log.csv, generator.safetensors and checkpoint.pt, each atomically."""
    log.flush()  # raises on NaN, before anything is overwritten
    write_csv(out / "log.csv", log.rows)
    net = run["G_ema"].mu.net
    metadata = {
        "role": "generator",
        "dataset": config.dataset,
        "kwargs": json.dumps(net.kwargs),
        "teacher_sha256": teacher["sha256"],
        "step": str(step),
    }
    write_tensors(out / "generator.safetensors", net.state_dict(), metadata)
    # Last: what is not in the checkpoint is written again by whoever goes on from it.
    state = {name: part.state_dict() for name, part in run.items()}
    write_torch(out / "checkpoint.pt", state | {"step": step})


class Log:
    """The progress line and the rows of log.csv.

    Scalars stay on the device until they are shown, so that a GPU need not wait for the CPU.
    """

    def __init__(self, config: Config, start: int, rows: list[dict]):
        self.config, self.rows, self.waiting = config, rows, []
        self.bar = tqdm(total=config.steps, initial=start, desc="train", mininterval=0.5)
        self.clock = time.perf_counter()

    def add(self, step: int, *scalars: Tensor) -> None:
        """Note one step's SCALARS."""
        self.waiting.append(torch.stack([scalar.detach() for scalar in scalars]))
        self.step = step
        if (step + 1) % self.config.log_every == 0 or step + 1 == self.config.steps:
            self.flush()
        self.bar.update()

    def flush(self) -> None:
        """Turn what is waiting into rows.

        Raises:
            UserError: a scalar is NaN or infinite; the last checkpoint is from before that.
        """
        values = torch.stack(self.waiting).tolist() if self.waiting else []
        now = time.perf_counter()
        rate = len(values) * self.config.batch_size / (now - self.clock)
        for step, scalars in enumerate(values, start=self.step + 1 - len(values)):
            for name, value in zip(SCALARS, scalars, strict=True):
                if not math.isfinite(value):
                    raise UserError(
                        f"{name} is {value} at step {step + 1}; the last checkpoint is intact: "
                        "lower --learning-rate or raise --lambda-reg, with another --out"
                    )
            row = {name: f"{value:.5g}" for name, value in zip(SCALARS, scalars, strict=True)}
            row["learning_rate"] = f"{learning_rate(self.config, step):.4g}"
            self.rows.append({"step": step + 1, **row, "images_per_s": f"{rate:.1f}"})
        self.waiting, self.clock = [], now
        self.bar.set_postfix({name: self.rows[-1][name] for name in SHOWN}, refresh=False)


@torch.no_grad()
def draw_samples(path: Path, G, z_ref, y_ref, cond_ref, z, cond, columns: int = 10) -> None:
    """Three bands of images: the teacher's y_ref, G(z_ref) for the same noise, fresh G(z)."""
    n = min(columns, len(z_ref), len(z))
    x_ref = G(z_ref[:n], None if cond_ref is None else cond_ref[:n])
    x = G(z[:n], None if cond is None else cond[:n])
    save_grid(path, torch.cat([y_ref[:n], x_ref, x]), columns=n, scale=2)


def draw_curves(path: Path, log: list[dict]) -> None:
    """curves.png: every logged scalar against the step."""
    steps = [int(row["step"]) for row in log]
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, name in zip(figure.subplots(2, 3, sharex=True).flat, SCALARS, strict=True):
        values = [float(row[name]) for row in log]
        axis.plot(steps, values, linewidth=0.8)
        axis.set(title=name, yscale="log" if max(values) > 0 else "linear", xlabel="step")
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_bytes(path, buffer.getvalue())


# --------------------------------------------------------------------------------------------------
# Being interrupted


def catch_signals() -> list[int]:
    """Ctrl-C and SIGTERM are noted in the returned list; the loop stops after its current step.

    A second Ctrl-C stops at once.
    """
    received: list[int] = []

    def note(signum, frame):
        received.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return received


def leave(received: list[int], step: int) -> None:
    """Say how to go on, and exit: 130 after Ctrl-C, 0 after SIGTERM (a cluster's pre-emption)."""
    command = shlex.join(["python", *sys.argv])
    print(f"interrupted and saved after step {step}; go on with: {command}")
    sys.exit(130 if signal.SIGINT in received else 0)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
