"""Train the one-step generator: Algorithm 1 of the paper, for runs of any size.

    python train.py                                          MNIST, minutes on 2 CPU cores
    torchrun --nproc-per-node 7 train.py --dataset imagenet64            on seven GPUs

It needs pairs (python make_pairs.py) and writes runs/DATASET/, whose files plumbing/rundir.py
lists. The result is generator.safetensors; samples_STEP.png shows y_ref, G(z_ref) and G of fresh
noise. Ctrl-C saves and stops, and the same command resumes. The last line it prints:

    wrote runs/mnist/generator.safetensors; look at it with: python sample.py

The random numbers of row i in step k depend on (seed, k, i) alone. Therefore resuming, the number
of ranks and --accumulate change only the rounding. In one process on a CPU, resuming is exact.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dmd_loss import (
    OneStepGenerator,
    all_noise_levels,
    denoising_loss,
    distribution_matching_loss,
    dm_noise_levels,
    l2_distance,
    lpips_distance,
    regression_loss,
)
from plumbing.devices import Ranks, autocast, join_ranks, pick_amp, share, to
from plumbing.files import one_line_errors
from plumbing.optim import Learner, Unfinished, average_decay
from plumbing.options import UserError, run_script
from plumbing.pairs import Pairs, draw_rows, sample_noise
from plumbing.rundir import Log, Signals, claim_folder, load_checkpoint, save_pictures, save_run
from teachers import Teacher, generator_file, load_lpips, load_teacher
from workloads import Workload, get_workload

# The options of this command; workloads.py defines them.
FLAGS = """
    dataset teacher pairs out seed steps batch_size batch_size_ref learning_rate beta1 fake_lr_ratio
    ema lambda_dm lambda_reg distance weighting max_dm_step decoder
    amp device accumulate compile shard_optimizer save_every save_minutes keep
"""


# --------------------------------------------------------------------------------------------------
# The mathematics of a step: Algorithm 1 for one batch


class Batch(NamedTuple):
    """B unpaired and R paired samples; the losses of x use K = B, or B + R with kl_on_pairs."""

    z: Tensor  # (B, C, H, W)
    z_ref: Tensor  # (R, C, H, W)
    y_ref: Tensor  # (R, C, H, W)
    cond: Tensor | None  # of both: (B + R,) labels, or (B + R, 77, 768) text states
    t: Tensor  # (K,) long, for the KL gradient
    noise: Tensor  # (K, C, H, W)
    t_fake: Tensor  # the same for the denoising loss
    noise_fake: Tensor

    @property
    def cond_x(self) -> Tensor | None:
        """The condition of the K samples x."""
        return None if self.cond is None else self.cond[: len(self.t)]


def generator_losses(
    G: Callable, mu_fake: Callable, teacher: Teacher, distance: Callable, config: Workload, b: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Lines 3 to 6 -> x (K, C, H, W), L_KL and L_reg. A loss of weight 0 is not computed."""
    # 2. Generate x = G(z) and x_ref = G(z_ref) in one call.
    both = G(torch.cat([b.z, b.z_ref]), b.cond)
    x, x_ref = both.split([len(b.z), len(b.z_ref)])
    if config.kl_on_pairs:
        x = both  # line 4: x <- concat(x, x_ref)

    # 3. Distribution-matching gradient (Eq. 7) and regression (Eq. 9); step G.
    loss_kl = loss_reg = x.new_zeros(())
    if config.lambda_dm:
        loss_kl = distribution_matching_loss(
            teacher.mu_real, mu_fake, x, b.cond_x, t=b.t, noise=b.noise, weighting=config.weighting
        )
    if config.lambda_reg:
        images, images_ref = (teacher.decode(each, config.decoder) for each in (x_ref, b.y_ref))
        loss_reg = regression_loss(images, images_ref, distance)
    return x, loss_kl, loss_reg


def fake_loss(mu_fake: Callable, teacher: Teacher, b: Batch, x: Tensor) -> Tensor:
    """Lines 8 and 9 -> L_denoise of the generated samples x (K, C, H, W), detached."""
    # 4. Denoise the generated samples (Eq. 6): the same x, detached.
    return denoising_loss(
        mu_fake, x, b.cond_x, t=b.t_fake, noise=b.noise_fake, sigma_data=teacher.sigma_data
    )


# --------------------------------------------------------------------------------------------------
# The mechanics of a step: parts of a batch, ranks, half precision


@dataclass
class Run:
    """Everything that a step uses."""

    config: Workload
    ranks: Ranks
    signals: Signals
    teacher: Teacher
    pairs: Pairs
    distance: Callable
    G: Learner
    mu_fake: Learner

    def autocast(self) -> torch.autocast:
        """The context in which the networks are called. The losses stay float32."""
        return autocast(self.ranks.device, self.config.amp)

    def stateful(self) -> dict:
        """The parts whose state a checkpoint holds."""
        average = {"G_ema": self.G.average} if self.config.ema else {}
        return {"G": self.G, "mu_fake": self.mu_fake, **average}


def training_step(run: Run, step: int) -> list[Tensor]:
    """Step k -> its SCALARS. A batch may come in parts: G learns from all, then mu_fake does."""
    config, teacher, G, mu_fake = run.config.at(step), run.teacher, run.G, run.mu_fake
    losses, losses_fake, generated = [], [], []
    for rows, rows_ref in G.parts(split_batch(config, run.ranks), leave=run.signals.stop):
        # 1. Sample z ~ N(0, I) with its condition, and pairs (z_ref, y_ref) ~ D.
        batch = draw_batch(run, step, rows, rows_ref)
        with run.autocast():
            x, loss_kl, loss_reg = generator_losses(
                G.model, mu_fake.model, teacher, run.distance, config, batch
            )
        G.backward(config.lambda_dm * loss_kl + config.lambda_reg * loss_reg)
        losses.append(torch.stack([loss_kl, loss_reg]).detach())
        generated.append((batch, x.detach()))
    norm_G = G.step(step)

    for batch, x in mu_fake.parts(generated if config.lambda_dm else []):
        with run.autocast():
            loss_denoise = fake_loss(mu_fake.model, teacher, batch, x)
        mu_fake.backward(loss_denoise)
        losses_fake.append(loss_denoise.detach())

    # 5. Step mu_fake.
    loss_denoise = norm_fake = torch.zeros_like(norm_G)
    if losses_fake:
        loss_denoise, norm_fake = torch.stack(losses_fake).mean(), mu_fake.step(step)
    return [*torch.stack(losses).mean(0), loss_denoise, norm_G, norm_fake]


def draw_batch(run: Run, step: int, rows: Sequence[int], rows_ref: Sequence[int]) -> Batch:
    """Draw these rows of step k's global batch, each from (seed, k, row) alone."""
    config, teacher, pairs = run.config.at(step), run.teacher, run.pairs
    shape, line_4 = teacher.image_shape, config.kl_on_pairs
    u, noises = draw_rows("unpaired", config.seed, step, rows, (3, *shape))
    of_ref = (3, *shape) if line_4 else (3, 0)  # otherwise paired rows need no noise
    u_ref, noises_ref = draw_rows("paired", config.seed, step, rows_ref, of_ref)
    z_ref, y_ref, cond_ref = pairs.batch((u_ref[:, 0] * len(pairs)).long().tolist())
    if teacher.num_classes:  # uniform class labels
        cond = torch.cat([(u[:, 0] * teacher.num_classes).long(), cond_ref])
    elif pairs.text:  # the prompts of random pairs
        cond = pairs.prompts((u[:, 0] * len(pairs)).long().tolist()) + cond_ref
    else:
        cond = None
    if line_4:
        u, noises = torch.cat([u, u_ref]), torch.cat([noises, noises_ref])
    (_, u, u_fake), (z, noise, noise_fake) = u.unbind(1), noises.unbind(1)
    t, t_fake = dm_noise_levels(u, config.max_dm_step), all_noise_levels(u_fake)
    batch = [z[: len(rows)], z_ref, y_ref, teacher.encode(cond), t, noise, t_fake, noise_fake]
    return Batch(*to(run.ranks.device, *batch))


def split_batch(config: Workload, ranks: Ranks) -> list[tuple[range, range]]:
    """This rank's rows of the global batch, unpaired and paired, in `accumulate` equal parts.
    Samples that only a loss of weight 0 would use are omitted."""
    parts = ranks.count * config.accumulate
    B = config.batch_size if config.lambda_dm else 0
    R = config.batch_size_ref if config.lambda_reg or config.kl_on_pairs else 0
    if B % parts or R % parts:
        raise UserError(
            f"--batch-size {config.batch_size} and --batch-size-ref {config.batch_size_ref} cannot "
            f"be split evenly over {ranks.count} ranks and {config.accumulate} parts each; choose "
            f"multiples of {parts}"
        )
    mine = range(ranks.rank * config.accumulate, (ranks.rank + 1) * config.accumulate)
    return [(share(B, part, parts), share(R, part, parts)) for part in mine]


# --------------------------------------------------------------------------------------------------
# The run from start to end


def load_inputs(config: Workload, ranks: Ranks) -> tuple[Workload, Teacher, Pairs, Callable]:
    """Load the teacher, the pairs and Eq. 9's distance, and claim the run folder. The guidance is
    that of the pairs, because both losses must use the same scale (Section 3.4)."""
    for step in (0, *(end for end, _ in config.phases)):
        split_batch(config.at(step), ranks)  # raises an error before anything is loaded
    if config.compile:  # so does this
        with one_line_errors("--compile", "cannot be used; install a C++ compiler, or omit it"):
            torch.compile(torch.sin)(torch.ones(8, device=ranks.device))
    first = config.at(0).num_pairs if config.phases else None  # see begin_phase
    pairs = Pairs(Path(config.pairs), config.dataset, first)
    amp = pick_amp(config.amp, ranks.device, config.half)
    config = replace(config, amp=amp, guidance=pairs.meta["guidance"])
    with ranks.first_goes_first():
        teacher, distance = load_teacher(config), l2_distance
        if config.distance == "lpips" and config.lambda_reg:
            if not config.latent and teacher.image_shape[0] not in (1, 3):
                raise UserError("LPIPS needs images of 1 or 3 channels; add --distance l2")
            distance = partial(lpips_distance, load_lpips(ranks.device))
    pairs.check_teacher(teacher.record)
    if ranks.rank == 0:
        meta = {k: v for k, v in pairs.meta.items() if not (config.phases and k == "num_pairs")}
        settings = config.settings() | {"teacher": teacher.record, "made_pairs": meta}
        claim_folder(Path(config.out), "config.json", settings, may_grow=("steps",))
    ranks.barrier()
    return config, teacher, pairs, distance


def prepare(
    ranks: Ranks, config: Workload, teacher: Teacher, pairs: Pairs, distance: Callable
) -> Run:
    """Line 1 of Algorithm 1: G and mu_fake start as copies of the teacher."""
    G, mu_fake = OneStepGenerator(teacher.student()).eval(), teacher.student()
    for network in (G, mu_fake, teacher.mu_real):
        assert not any(module.training for module in network.modules())  # dropout is off
    for network in (G, mu_fake):
        network.to(device=ranks.device, memory_format=torch.channels_last)
    teacher.to(ranks.device, config.amp)
    torch.backends.cudnn.allow_tf32 = config.amp != "off"  # for LPIPS, which is float32
    torch.backends.cudnn.benchmark = True  # shapes stay the same: find the fastest algorithm once
    how = dict(
        warmup=config.warmup, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
        grad_clip=config.grad_clip, fp16=config.amp == "fp16", shard=config.shard_optimizer,
    )  # fmt: skip
    decay = partial(average_decay, share=config.ema) if config.ema else None
    peak, peak_fake = config.learning_rate, config.learning_rate * config.fake_lr_ratio
    learners = (
        Learner(G, ranks, peak, decay=decay, **how),
        Learner(mu_fake, ranks, peak_fake, **how),
    )
    if config.compile:
        torch._dynamo.config.optimize_ddp = False  # fails with checkpointing in older versions
        for denoiser in (G.mu, mu_fake, teacher.mu_real):
            denoiser.compile()
    return Run(config, ranks, Signals(ranks), teacher, pairs, distance, *learners)


def begin_phase(run: Run, step: int) -> int:
    """Prepare for the settings that hold from this step on -> images per step. Table 5's phases
    need more and more pairs, so the folder of pairs is read again."""
    config = run.config.at(step)
    if config.phases:
        run.pairs = Pairs(Path(config.pairs), config.dataset, config.num_pairs)
        changed = next(values for end, values in config.phases if step < end)
        if run.ranks.rank == 0:
            tqdm.write(f"from step {step + 1} on: {changed or 'the settings of config.json'}")
    return config.batch_size if config.lambda_dm else config.batch_size_ref


@torch.no_grad()
def pictures(run: Run) -> list[Tensor]:
    """Three bands of images: y_ref, G(z_ref) and G of fresh noise. The noise never changes."""
    shape, G = run.teacher.image_shape, run.G.average
    n = min(len(run.pairs), 10 if shape[1] <= 32 else 5)
    z_ref, y_ref, cond = run.pairs.batch(range(n))
    z = sample_noise("pictures", run.config.seed, range(n), shape)
    z, z_ref, y_ref = to(run.ranks.device, z, z_ref, y_ref)
    cond = run.teacher.encode(cond)
    with run.autocast():
        return [run.teacher.decode(x).float() for x in (y_ref, G(z_ref, cond), G(z, cond))]


def save(run: Run, step: int, log: Log) -> None:
    """Write all files of the run. All ranks must call it."""
    rows = log.flush()  # ends the run on NaN before anything is overwritten
    state = {name: part.state_dict() for name, part in run.stateful().items()} | {"step": step}
    if run.ranks.rank == 0:
        config, G = run.config, run.G.average
        generator = generator_file(G, config, run.teacher.record, step)
        save_run(
            Path(config.out), step, rows, state, generator, partial(pictures, run),
            film=step == config.steps, unet_config=G.mu.net.config if config.latent else None,
            keep=config.keep,
        )  # fmt: skip
    log.note_save()


def main(config: Workload) -> None:
    """Train, or resume training, and write generator.safetensors."""
    ranks = join_ranks(config.device)
    run, out = prepare(ranks, *load_inputs(config, ranks)), Path(config.out)
    start, rows = load_checkpoint(out, run.stateful())
    if ranks.sum(torch.tensor(start)).item() != start * ranks.count:
        raise UserError(f"the ranks see different checkpoints; {out} must be on a shared disk")
    log = Log(ranks, start, config.steps, rows, [run.G.scaler, run.mu_fake.scaler])
    if start == 0 and ranks.rank == 0:
        save_pictures(out, 0, partial(pictures, run))
    if start == config.steps and rows:
        save(run, start, log)  # in case the last save was killed after its checkpoint
    begins = {start, *(end for end, _ in config.phases)}
    for step in range(start, config.steps):
        if step in begins:
            log.images = begin_phase(run, step)
        done = step
        with contextlib.suppress(Unfinished):  # stopped between two parts; resuming repeats it
            log.add(step, training_step(run, step), run.G.learning_rate(step))
            done = step + 1
        stop = run.signals.stop()
        late = ranks.any(log.minutes_since_save() > config.save_minutes)
        end = done == config.steps or done in begins  # of the run or of a phase
        due = stop or late or end or done % config.save_every == 0
        if due and done > start:
            save(run, done, log)
        if stop and done < config.steps:
            run.signals.leave(done)
    if ranks.rank == 0:
        prompt = ' --prompt "..."' if run.pairs.text else ""
        print(f"wrote {out / 'generator.safetensors'}; look at it with: python sample.py{prompt}")
    ranks.barrier()  # all leave together


if __name__ == "__main__":
    run_script(main, get_workload, __doc__, FLAGS)
