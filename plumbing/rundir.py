"""What a run leaves on disk: its settings, log, curves, pictures and checkpoints.

    config.json                what decides the result; another run's folder is left alone
    log.csv, curves.png        SCALARS of every step
    samples_STEP.png           the teacher's y_ref, G(z_ref) for the same noise, fresh G(z)
    generator.safetensors      G, with all it takes to build it again
    checkpoint.pt              everything needed to go on; tensors and plain numbers only

Every file is written under another name and renamed, so whatever happens the last one is whole.
"""

import csv
import io
import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from plumbing.devices import Ranks, to
from plumbing.files import (
    atomic_path,
    holds_files,
    read_json,
    save_grid,
    write_bytes,
    write_csv,
    write_json,
    write_tensors,
    write_torch,
)
from plumbing.options import UserError
from plumbing.pairs import Pairs, sample_noise

if TYPE_CHECKING:
    from train import Config, Run

# Options that may differ when a run is resumed: none of them changes its result. (Where the pairs
# lie may change; how they were made may not.)
FREE_OPTIONS = ("device", "pairs", "out", "accumulate", "compile", "checkpointing")
FREE_OPTIONS += ("shard_optimizer", "log_every", "save_every", "keep")

SCALARS = ["loss_kl", "loss_reg", "loss_denoise", "grad_norm_G", "grad_norm_fake"]
SHOWN = [*SCALARS, "images_per_s"]  # of the unpaired stream, over all ranks


def claim_folder(out: Path, config: "Config", teacher: dict[str, str], pairs: Pairs) -> None:
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
    found = read_json(out / "config.json")
    if not (out / "checkpoint.pt").exists() and found != settings:
        # Nothing but our settings: the run never saved, and may start otherwise.
        if "made_pairs" in found and not holds_files(out, but="config.json"):
            return write_json(out / "config.json", settings)
        raise UserError(f"{out} holds other files, and no checkpoint.pt; choose another --out")
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


def load_checkpoint(out: Path, run: "Run") -> tuple[int, list[dict]]:
    """Restore a run's networks and optimisers -> number of steps done, rows of the log.

    Raises:
        UserError: damaged checkpoint.
    """
    path = out / "checkpoint.pt"
    if not path.exists():
        return 0, []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for name, part in run.parts().items():
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


def save_run(out: Path, run: "Run", step: int, log: "Log") -> None:
    """Write log, pictures, generator and checkpoint, each atomically. All ranks must call."""
    log.flush()  # raises on NaN, before anything is overwritten
    state = {name: part.state_dict() for name, part in run.parts().items()} | {"step": step}
    if run.ranks.rank > 0:
        return
    write_csv(out / "log.csv", log.rows)
    draw_curves(out / "curves.png", log.rows)
    draw_samples(out / f"samples_{step:06d}.png", run)
    net, config = run.G_ema.mu.net, run.config
    metadata = {
        "role": "generator",
        "dataset": config.dataset,
        "kwargs": json.dumps(net.config if run.workload.latent else net.kwargs),
        "teacher_sha256": run.teacher.record["sha256"],
        "step": str(step),
    }
    write_tensors(out / "generator.safetensors", net.state_dict(), metadata)
    # Last: what is not in the checkpoint is written again by whoever goes on from it.
    write_torch(out / "checkpoint.pt", state)
    if config.keep > 1:
        keep_copies(out, step, config.keep)
    log.clock = time.perf_counter()  # writing is no training


def keep_copies(out: Path, step: int, keep: int) -> None:
    """Copy this step's checkpoint and generator, named by the step, and forget all but the newest.

    To go back to one of them, copy it over checkpoint.pt.
    """
    for name in ("checkpoint.pt", "generator.safetensors"):
        path = out / name
        with atomic_path(path.with_name(f"{path.stem}_{step:06d}{path.suffix}")) as temporary:
            shutil.copyfile(path, temporary)
        # By age, not by step: who went back to an early copy means to keep what comes after it.
        copies = out.glob(f"{path.stem}_[0-9]*{path.suffix}")
        for old in sorted(copies, key=lambda copy: copy.stat().st_mtime_ns)[:-keep]:
            old.unlink()


class Log:
    """The progress line and the rows of log.csv: means over the ranks.

    Scalars stay on the device until they are shown, so that a GPU need not wait for the CPU.
    """

    def __init__(self, config: "Config", ranks: Ranks, start: int, rows: list[dict]):
        self.config, self.ranks, self.rows = config, ranks, rows
        self.waiting, self.rates = [], []
        self.bar = tqdm(
            total=config.steps, initial=start, desc="train", mininterval=0.5, disable=ranks.rank > 0
        )
        self.clock = time.perf_counter()

    def add(self, step: int, learning_rate: float, scalars: list[Tensor]) -> None:
        """Note one step's SCALARS."""
        self.waiting.append(torch.stack(scalars))
        self.rates.append(learning_rate)
        self.step = step
        if (step + 1) % self.config.log_every == 0 or step + 1 == self.config.steps:
            self.flush()
        self.bar.update()

    def flush(self) -> None:
        """Turn what is waiting into rows. All ranks must call.

        Raises:
            UserError: a scalar is NaN or infinite; the last checkpoint is from before that.
        """
        values = self.ranks.mean(torch.stack(self.waiting)).tolist() if self.waiting else []
        now = time.perf_counter()
        per_step = self.config.batch_size if self.config.lambda_dm else self.config.batch_size_ref
        rate = len(values) * per_step / (now - self.clock)
        for step, scalars in enumerate(values, start=self.step + 1 - len(values)):
            self.check(step, scalars)
            row = {name: f"{value:.5g}" for name, value in zip(SCALARS, scalars, strict=True)}
            row["learning_rate"] = f"{self.rates[step - self.step - 1]:.4g}"
            self.rows.append({"step": step + 1, **row, "images_per_s": f"{rate:.1f}"})
        self.waiting, self.rates, self.clock = [], [], now
        self.bar.set_postfix({name: self.rows[-1][name] for name in SHOWN}, refresh=False)

    def check(self, step: int, scalars: list[float]) -> None:
        """Raise UserError if a scalar is not finite (fp16's gradients may be, now and then)."""
        for name, value in zip(SCALARS, scalars, strict=True):
            skipped = self.config.amp == "fp16" and name.startswith("grad_norm")
            if not math.isfinite(value) and not skipped:
                raise UserError(
                    f"{name} is {value} at step {step + 1}, what was saved before is intact: "
                    "lower --learning-rate or raise --lambda-reg, with another --out"
                )


@torch.no_grad()
def draw_samples(path: Path, run: "Run") -> None:
    """Three bands of images: the teacher's y_ref, G(z_ref) for the same noise, fresh G(z); the same
    noises and conditions at every step."""
    shape = run.teacher.image_shape
    n = min(len(run.pairs), 10 if shape[1] <= 32 else 5)
    z_ref, y_ref, cond = run.pairs.batch(list(range(n)))
    z = sample_noise(run.config.seed + 1, range(n), shape)
    z, z_ref, y_ref = to(run.ranks.device, z, z_ref, y_ref)
    cond = run.teacher.encode(cond)
    with run.autocast():
        bands = [y_ref, run.G_ema(z_ref, cond), run.G_ema(z, cond)]
        images = [run.teacher.decode(band).float() for band in bands]
    save_grid(path, torch.cat(images), columns=n, scale=max(1, 64 // images[0].shape[-1]))


def draw_curves(path: Path, log: list[dict]) -> None:
    """curves.png: every logged scalar against the step."""
    from matplotlib.figure import Figure  # late, see options.py

    steps = [int(row["step"]) for row in log]
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, name in zip(figure.subplots(2, 3, sharex=True).flat, SHOWN, strict=True):
        values = [float(row[name]) for row in log]
        axis.plot(steps, values, linewidth=0.8)
        axis.set(title=name, yscale="log" if max(values) > 0 else "linear", xlabel="step")
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_bytes(path, buffer.getvalue())
