"""Train the one-step generator: Algorithm 1 of the paper.

    python train.py                                          MNIST, about 5 minutes on 2 CPU cores
    torchrun --nproc-per-node 7 train.py --dataset imagenet64            on seven GPUs

Needs pairs (python make_pairs.py). It writes runs/DATASET/: config.json, log.csv, curves.png,
samples_STEP.png (the teacher's y_ref above G(z_ref), then fresh G(z)), checkpoint.pt to resume from
and generator.safetensors, the result. Ctrl-C saves; the same command goes on, as if it had not
been interrupted. The last line it prints:

    wrote runs/mnist/generator.safetensors; look at it with: python sample.py

Read `training_step` first: it is Algorithm 1's loop body. What step k draws for row i of the global
batch is a function of (seed, k, i) alone, so neither resuming nor the number of processes nor
gradient accumulation changes what is computed, beyond rounding; on one CPU process resuming changes
not a bit.
"""

import copy
import math
import pickle
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dmd_loss import (
    WEIGHTINGS,
    OneStepGenerator,
    all_noise_levels,
    denoising_loss,
    distribution_matching_loss,
    dm_noise_levels,
    l2_distance,
    lpips_distance,
    regression_loss,
)
from plumbing.devices import (
    AMP,
    Ranks,
    autocast,
    join_ranks,
    keep_freed_memory,
    pick_amp,
    share,
    to,
)
from plumbing.options import Options, UserError, option, run_script
from plumbing.pairs import Pairs, generator_for
from plumbing.rundir import Log, claim_folder, load_checkpoint, save_run
from teachers import DECODERS, Teacher, load_teacher
from workloads import WORKLOADS, Workload, get_workload


@dataclass
class Config(Options):
    """Options left at None take the dataset's value from workloads.py."""

    dataset: str = option("mnist", f"one of {', '.join(WORKLOADS)}")
    pairs: str | None = option(None, "folder of the pairs (default: pairs/DATASET)")
    out: str | None = option(None, "run folder (default: runs/DATASET)")
    teacher: str | None = option(None, "teacher weights (default: the dataset's own)")
    seed: int = option(0, "what step k draws for row i is a function of (seed, k, i) alone")
    steps: int | None = option(None, "generator updates")
    batch_size: int | None = option(None, "unpaired samples per step, over all ranks")
    batch_size_ref: int | None = option(
        None, "paired samples per step, over all ranks (default: in the dataset's proportion)"
    )
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
        None, "factor by which that weight falls over the run, 1 = constant (not in the paper)"
    )
    distance: str | None = option(None, "distance of the regression loss", ("l2", "lpips"))
    weighting: str | None = option(None, "w_t of the KL gradient", WEIGHTINGS)
    max_dm_step: int = option(980, "T_max of the KL gradient (Table 5 lowers it to 500)")
    decoder: str = option(
        "tiny", "sd15: decoder of the regression's images (full: gigabytes per image)", DECODERS
    )
    tiny_decoder: str | None = option(None, "sd15: folder or repository of it (default: TAESD)")
    grad_clip: float | None = option(None, "largest L2 norm of a gradient")
    amp: str = option(
        "auto",
        "half precision; auto: bf16 on a GPU that has it, fp16 on an older one, off on a CPU",
        AMP,
    )
    # From here on, nothing changes the result beyond rounding.
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    accumulate: int = option(1, "micro-batches per step: less memory, same batch")
    compile: bool = option(False, "torch.compile the networks")
    checkpointing: bool = option(True, "sd15: recompute activations in the backward pass")
    shard_optimizer: bool = option(False, "spread AdamW's state over the ranks (ZeRO-1)")
    log_every: int = option(10, "steps between updates of the progress line")
    save_every: int | None = option(None, "steps between checkpoints, pictures and curves")
    keep: int = option(
        1, "checkpoints to keep; if more than 1, each also as a copy named by its step"
    )


VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's, for LPIPS


def resolve(config: Config, ranks: Ranks) -> Config:
    """Fill the options left at None from the dataset's row, and check their ranges.

    Raises:
        UserError: an option out of range, or batches that ranks x accumulate do not divide.
    """
    config, workload = replace(config), get_workload(config.dataset)
    if config.batch_size is not None and config.batch_size_ref is None:
        ratio = workload.batch_size_ref / workload.batch_size
        config.batch_size_ref = max(1, round(ratio * config.batch_size))
    for field in fields(config):
        from_table = getattr(config, field.name) is None and hasattr(workload, field.name)
        if from_table and field.name != "teacher":
            setattr(config, field.name, getattr(workload, field.name))
    config.pairs = config.pairs or f"pairs/{config.dataset}"
    config.out = config.out or f"runs/{config.dataset}"
    config.amp = pick_amp(config.amp, ranks.device)
    smallest = {"steps": 1, "batch_size": 1, "batch_size_ref": 1, "log_every": 1, "save_every": 1}
    smallest |= {"warmup": 0, "lambda_reg": 0, "ema": 0, "seed": 0, "lambda_dm": 0}
    smallest |= {"learning_rate": 0, "fake_lr_ratio": 0, "lambda_reg_decay": 1e-6}
    smallest |= {"accumulate": 1, "keep": 1, "max_dm_step": 21}
    for name, bound in smallest.items():
        if not getattr(config, name) >= bound:
            name, value = name.replace("_", "-"), getattr(config, name)
            raise UserError(f"--{name} must be at least {bound}, not {value}")
    if not config.grad_clip > 0:
        raise UserError(f"--grad-clip must be above 0, not {config.grad_clip}; inf for no clipping")
    if config.ema >= 1:
        raise UserError(f"--ema must be below 1, not {config.ema}")
    if config.max_dm_step > 1000:
        raise UserError(f"--max-dm-step must be at most 1000, not {config.max_dm_step}")
    if not (config.lambda_dm or config.lambda_reg):
        raise UserError("with --lambda-dm 0 and --lambda-reg 0 there is nothing to learn")
    for name in ("batch_size", "batch_size_ref"):
        if getattr(config, name) % (ranks.count * config.accumulate):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(config, name)} cannot be split evenly over "
                f"{ranks.count} ranks and {config.accumulate} micro-batches; choose a multiple"
            )
    return config


def choose_distance(config: Config, device: torch.device) -> Callable:
    """The distance of Eq. 9.

    Raises:
        UserError: LPIPS without its package, or without VGG's weights.
    """
    if config.distance == "l2" or config.lambda_reg == 0:
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


# --------------------------------------------------------------------------------------------------
# Algorithm 1


def training_step(run: "Run", step: int) -> list[Tensor]:
    """Lines 2 to 10 of Algorithm 1 -> the step's SCALARS. The batch may come in parts (gradient
    accumulation): first G learns from all of them, then mu_fake does."""
    config, workload, teacher = run.config, run.workload, run.teacher
    G, mu_real, mu_fake, amp = run.G, teacher.mu_real, run.mu_fake, run.autocast
    lr, parts = learning_rate(config, step), micro_batches(config, run.ranks)
    losses_G, losses_fake, generated = [], [], []
    for i, (rows, rows_ref) in enumerate(parts):
        # 1. Sample z ~ N(0, I) with its condition, and pairs (z_ref, y_ref) ~ D.
        batch = draw_batch(run, step, rows, rows_ref)

        # 2. Generate x = G(z) and x_ref = G(z_ref) in one call.
        G.require_backward_grad_sync = i + 1 == len(parts)  # average over ranks with the last part
        with amp():
            both = G(torch.cat([batch.z, batch.z_ref]), batch.cond)
        x, x_ref = both.split([len(rows), len(rows_ref)])
        if workload.kl_on_pairs:
            x = both  # line 4: x <- concat(x, x_ref)
        cond = None if batch.cond is None else batch.cond[: len(x)]

        # 3. Distribution-matching gradient (Eq. 7) and regression (Eq. 9); step G.
        loss_kl = loss_reg = x.new_zeros(())
        if config.lambda_dm:
            with amp():
                loss_kl, _ = distribution_matching_loss(
                    mu_real, mu_fake, x, cond, t=batch.t, noise=batch.noise,
                    weighting=config.weighting,
                )  # fmt: skip
        if config.lambda_reg:
            with amp():
                images, images_ref = teacher.decode(x_ref), teacher.decode(batch.y_ref)
            loss_reg = regression_loss(images, images_ref, run.distance)
        loss_G = config.lambda_dm * loss_kl + lambda_reg(config, step) * loss_reg
        run.update_G.backward(loss_G / len(parts))
        losses_G.append(torch.stack([loss_kl, loss_reg]).detach())
        generated.append((x.detach(), cond, batch.t_fake, batch.noise_fake))
    norm_G = run.update_G.step(lr)
    if config.ema:
        update_average(run.G_ema, run.update_G.network, config.ema, step)

    for i, (x, cond, t, noise) in enumerate(generated if config.lambda_dm else []):
        # 4. Denoise the generated samples (Eq. 6): the same x, detached.
        mu_fake.require_backward_grad_sync = i + 1 == len(parts)
        with amp():
            loss_denoise = denoising_loss(
                mu_fake, x, cond, t=t, noise=noise, sigma_data=workload.sigma_data
            )
        run.update_fake.backward(loss_denoise / len(parts))
        losses_fake.append(loss_denoise.detach())

    # 5. Step mu_fake.
    loss_denoise = norm_fake = torch.zeros_like(norm_G)
    if losses_fake:
        norm_fake = run.update_fake.step(config.fake_lr_ratio * lr)
        loss_denoise = torch.stack(losses_fake).mean()
    loss_kl, loss_reg = torch.stack(losses_G).mean(0)
    return [loss_kl, loss_reg, loss_denoise, norm_G, norm_fake]


class Update:
    """How one of the two networks learns: AdamW (Appendix B), clipping, fp16's loss scale.

    Args:
        network: what is trained, bare (not in DistributedDataParallel).
    """

    def __init__(self, network: nn.Module, config: Config, ranks: Ranks):
        workload, kind = get_workload(config.dataset), torch.optim.AdamW
        options = {
            "betas": workload.betas,
            "weight_decay": workload.weight_decay,
            "fused": True,
        }
        self.sharded = config.shard_optimizer and ranks.count > 1
        if self.sharded:
            # ZeRO-1: G and mu_fake fit on a GPU whole, what doubles their memory is AdamW's state.
            # Unlike FSDP it leaves the networks, and so their checkpoints, as they are.
            from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import

            kind, options = ZeroRedundancyOptimizer, {"optimizer_class": kind, **options}
        self.network, self.grad_clip, self.rank = network, config.grad_clip, ranks.rank
        self.optimizer = kind(network.parameters(), **options)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.amp == "fp16")

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient to what is there since the last step."""
        self.scaler.scale(loss).backward()

    def step(self, learning_rate: float) -> Tensor:
        """Clip and step. Returns the gradient's norm before clipping.

        (With fp16 it may be infinite: then the scaler leaves this step out and lowers its scale.)
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict:
        """Network, optimiser and scale, the same for any number of ranks. All ranks must call."""
        optimizer = {}
        if self.sharded:
            self.optimizer.consolidate_state_dict(to=0)
        if self.rank == 0:
            optimizer = self.optimizer.state_dict()
        states = {"network": self.network.state_dict(), "optimizer": optimizer}
        return states | {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.sharded:  # it puts "step" on the CPU (PyTorch issue 124133), and all there is twice
            self.optimizer.state.clear()
            for parameter, values in self.optimizer.optim.state.items():
                values["step"] = values["step"].to(parameter.device)
        self.scaler.load_state_dict(state["scaler"])


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


@torch.no_grad()
def update_average(G_ema: nn.Module, G: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average; a short memory at first, so that the start is forgotten."""
    decay = min(decay, (step + 1) / (step + 10))
    for average, weight in zip(G_ema.parameters(), G.parameters(), strict=True):
        average.lerp_(weight, 1 - decay)


# --------------------------------------------------------------------------------------------------
# What a step draws


class Batch(NamedTuple):
    """One part of a step's samples, on the device. B unpaired, R paired, K = B or B + R in L_KL."""

    z: Tensor  # (B, C, H, W)
    z_ref: Tensor  # (R, C, H, W)
    y_ref: Tensor  # (R, C, H, W)
    cond: Tensor | None  # of both: (B + R,) labels, or (B + R, 77, 768) text states
    t: Tensor  # (K,) long, and (K, C, H, W): of the KL gradient
    noise: Tensor
    t_fake: Tensor  # the same of the denoising loss
    noise_fake: Tensor


def micro_batches(config: Config, ranks: Ranks) -> list[tuple[range, range]]:
    """This rank's rows of the global batch, unpaired and paired, in `accumulate` equal parts.

    What only serves a loss of weight 0 is left out: without regression there are no paired rows,
    unless Algorithm 1's line 4 takes them into the KL gradient.
    """
    B = config.batch_size if config.lambda_dm else 0
    line_4 = get_workload(config.dataset).kl_on_pairs and config.lambda_dm
    R = config.batch_size_ref if config.lambda_reg or line_4 else 0
    parts = ranks.count * config.accumulate
    mine = range(ranks.rank * config.accumulate, (ranks.rank + 1) * config.accumulate)
    return [(share(B, part, parts), share(R, part, parts)) for part in mine]


def draw_batch(run: "Run", step: int, rows: Sequence[int], rows_ref: Sequence[int]) -> Batch:
    """Draw rows of step k's global batch: each a function of (seed, k, row) alone."""
    config, teacher, pairs, T = run.config, run.teacher, run.pairs, len(run.teacher.mu_real.sigma)
    shape, line_4 = teacher.image_shape, run.workload.kl_on_pairs
    u, noises = draw_rows(config.seed, step, rows, (3, *shape))
    rows_ref = [config.batch_size + row for row in rows_ref]
    u_ref, noises_ref = draw_rows(config.seed, step, rows_ref, (3, *shape) if line_4 else (3, 0))
    z_ref, y_ref, cond_ref = pairs.batch((u_ref[:, 0] * len(pairs)).long().tolist())
    cond = draw_condition(u[:, 0], run.workload, pairs)
    if line_4:
        u, noises = torch.cat([u, u_ref]), torch.cat([noises, noises_ref])
    cond = teacher.encode(join(cond, cond_ref))
    batch = [
        noises[: len(rows), 0], z_ref, y_ref, cond,
        dm_noise_levels(u[:, 1], T, config.max_dm_step), noises[:, 1],
        all_noise_levels(u[:, 2], T), noises[:, 2],
    ]  # fmt: skip
    return Batch(*to(run.ranks.device, *batch))


def draw_rows(
    seed: int, step: int, rows: Sequence[int], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """For every row: three numbers uniform in [0, 1), and normal ones -> (B, 3), (B, *shape)."""
    u, normal = torch.empty(len(rows), 3, dtype=torch.float64), torch.empty(len(rows), *shape)
    for i, row in enumerate(rows):
        generator = generator_for(seed, step, row + 1)  # (seed, k, 0) is the noise of pair k
        torch.rand(3, dtype=torch.float64, generator=generator, out=u[i])
        torch.randn(shape, generator=generator, out=normal[i])
    return u, normal


def draw_condition(u: Tensor, workload: Workload, pairs: Pairs) -> Tensor | list[str] | None:
    """Uniform class labels (B,), or prompts of the pairs, or None; u (B,) uniform in [0, 1)."""
    if workload.num_classes:
        return (u * workload.num_classes).long()
    if pairs.prompts:
        return [pairs.prompts[k] for k in (u * len(pairs.prompts)).long().tolist()]
    return None


def join(cond: Tensor | list[str] | None, cond_ref: Tensor | list[str] | None):
    """The conditions of both streams one after the other: labels, prompts, or None."""
    if isinstance(cond, list):
        return cond + cond_ref
    return None if cond is None else torch.cat([cond, cond_ref])


# --------------------------------------------------------------------------------------------------
# Start to end


class Parallel(DistributedDataParallel):
    """DistributedDataParallel that shows what its module has, such as a denoiser's noise table."""

    def __init__(self, module: nn.Module):
        super().__init__(module, gradient_as_bucket_view=True)
        self.broadcast_buffers = False  # the noise table never changes

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


@dataclass
class Run:
    """What takes part in a step. G and mu_fake are as one calls them: on several ranks, Parallel
    around the networks that update_G and update_fake hold."""

    config: Config
    workload: Workload
    ranks: Ranks
    teacher: Teacher
    pairs: Pairs
    distance: Callable
    G: nn.Module
    mu_fake: nn.Module
    G_ema: nn.Module  # the moving average of G; G itself if that is off
    update_G: Update
    update_fake: Update

    def autocast(self) -> torch.autocast:
        """The context in which the networks are called."""
        return autocast(self.ranks.device, self.config.amp)

    def parts(self) -> dict:
        """What a checkpoint holds."""
        average = {"G_ema": self.G_ema} if self.config.ema else {}
        return {"G": self.update_G, "mu_fake": self.update_fake, **average}


def prepare(config: Config, ranks: Ranks) -> Run:
    """Line 1 of Algorithm 1: G and mu_fake start as copies of the teacher.

    All networks are in eval mode and stay there: no dropout anywhere.

    Raises:
        UserError: no pairs, or another teacher's; missing weights; a folder with another run.
    """
    pairs = Pairs(Path(config.pairs), config.dataset)
    with ranks.first_goes_first():
        teacher = load_teacher(
            config.dataset, config.teacher, guidance=pairs.meta["guidance"],
            decoder=config.decoder, tiny_source=config.tiny_decoder,
        )  # fmt: skip
        distance = choose_distance(config, ranks.device)
    pairs.check_teacher(teacher.record)
    if ranks.rank == 0:
        claim_folder(Path(config.out), config, teacher.record, pairs)
    ranks.barrier()

    if ranks.device.type == "cpu":
        keep_freed_memory()
    on_device = {"device": ranks.device, "memory_format": torch.channels_last}
    G, mu_fake = OneStepGenerator(teacher.student()).to(**on_device), teacher.student()
    mu_fake = mu_fake.to(**on_device)
    G_ema = copy.deepcopy(G).requires_grad_(False) if config.ema else G
    updates = Update(G, config, ranks), Update(mu_fake, config, ranks)
    teacher.to(ranks.device, config.amp)
    for denoiser in (G.mu, mu_fake):
        if hasattr(denoiser.net, "gradient_checkpointing"):
            denoiser.net.gradient_checkpointing = config.checkpointing
    if config.compile:
        torch._dynamo.config.optimize_ddp = False  # older versions: not with checkpointing
        for denoiser in (G.mu, mu_fake, teacher.mu_real):
            denoiser.compile()
    if ranks.count > 1:
        G, mu_fake = Parallel(G), Parallel(mu_fake)
    workload = get_workload(config.dataset)
    return Run(config, workload, ranks, teacher, pairs, distance, G, mu_fake, G_ema, *updates)


def main(config: Config) -> None:
    """Train, or go on training, and write generator.safetensors."""
    ranks = join_ranks(config.device)
    config = resolve(config, ranks)
    run, out = prepare(config, ranks), Path(config.out)
    start, rows = load_checkpoint(out, run)
    # On the CPU: a GPU's x / 7 may be off by a bit.
    mean_start = ranks.mean(torch.tensor(start, dtype=torch.float64))
    if ranks.any(start != mean_start.item()):
        raise UserError(f"the ranks see different checkpoints; {out} must be on a shared disk")
    log, signals = Log(config, ranks, start, rows), catch_signals()
    for step in range(start, config.steps):
        log.add(step, learning_rate(config, step), training_step(run, step))
        interrupted = ranks.any(bool(signals))
        done = step + 1
        if interrupted or done == config.steps or done % config.save_every == 0:
            save_run(out, run, done, log)
        if interrupted and done < config.steps:
            leave(signals, done, ranks)
    if ranks.rank == 0:
        prompt = ' --prompt "..."' if run.pairs.prompts else ""
        print(f"wrote {out / 'generator.safetensors'}; look at it with: python sample.py{prompt}")


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


def leave(received: list[int], step: int, ranks: Ranks) -> None:
    """Say how to go on, and exit: 130 after Ctrl-C, 0 after SIGTERM (a cluster's pre-emption)."""
    if ranks.rank == 0:
        command = shlex.join(["python", *sys.argv]) if ranks.count == 1 else "the same command"
        print(f"interrupted and saved after step {step}; go on with: {command}")
    sys.exit(130 if signal.SIGINT in received else 0)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
