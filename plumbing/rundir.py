"""What a run writes to disk, how it resumes, and how it is interrupted.

config.json                the settings that decide the result (see claim_folder)
log.csv, curves.png        SCALARS of every step
samples_STEP.png           pictures; at the end also training.gif, a film of them
generator.safetensors      G, with everything needed to build it; for Stable Diffusion also
                           unet/, a folder that diffusers opens
checkpoint.pt              everything needed to resume: only tensors and plain numbers
"""

import contextlib
import csv
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from plumbing import files
from plumbing.devices import Ranks
from plumbing.drawing import draw_curves, only_to_look_at, save_grid, write_film
from plumbing.options import UserError

SCALARS = ["loss_kl", "loss_reg", "loss_denoise", "grad_norm_G", "grad_norm_fake"]
SHOW_EVERY = 10  # steps after which the scalars are read, checked and shown
locks: list[int] = []  # open files, whose locks this process holds until it ends


def claim_folder(out: Path, name: str, settings: dict, may_grow: tuple[str, ...] = ()) -> None:
    """Write `settings`, which decide everything that the folder will hold, to its file `name`.
    Raise UserError if the folder holds files that are not ours or were made with other settings, or
    if another process is working in it. Only settings in `may_grow` may be larger than before."""
    settings = json.loads(json.dumps(settings))
    found = files.read_json(out / name) if (out / name).exists() else {}
    changed = sorted(
        k
        for k, new in settings.items()
        if (old := found.get(k, new)) != new  # one that an older file lacks counts as unchanged
        and not (k in may_grow and type(old) is type(new) and old < new)
    )
    held = {path.name for path in out.glob("[!.]*")}  # a killed process leaves hidden files
    if not found.keys() & settings.keys():
        if held:
            raise UserError(f"{out} holds other files; choose another --out")
    elif changed and held > {name}:
        what = f"the files in {out} were made with another {', '.join(changed)}"
        raise UserError(f"{what}; give the same, choose another --out or delete the folder")
    # Lock the folder until this process ends. (Windows and some file systems have no locks.)
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        out.mkdir(parents=True, exist_ok=True)
        locks.append(os.open(out / ".lock", os.O_RDWR | os.O_CREAT))
        try:
            fcntl.lockf(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = f"another process is working in {out}; wait for it or choose another --out"
            raise UserError(why) from None
    files.sweep(out)
    files.write_json(out / name, settings)


def load_checkpoint(out: Path, parts: dict) -> tuple[int, list[dict]]:
    """Restore the state of `parts`, {name: object with load_state_dict}, from checkpoint.pt.
    Returns the number of steps done and the rows of the log: 0 and [] without a checkpoint. If an
    earlier checkpoint was put back, later pictures are deleted."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return 0, []
    with files.one_line_errors(path, f"cannot be resumed; delete {out} to start over"):
        state = files.torch_load(path)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        with open(out / "log.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= state["step"]]
    for picture in out.glob("samples_*.png"):
        if re.fullmatch(r"samples_\d{6,}", picture.stem) and int(picture.stem[8:]) > state["step"]:
            picture.unlink(missing_ok=True)  # another rank may have been faster
    return state["step"], rows


def save_run(
    out: Path, step: int, rows: list[dict], state: dict, generator: tuple[dict, dict],
    draw: Callable[[], list[Tensor]], *, film: bool, unet_config: dict | None, keep: int,
) -> None:  # fmt: skip
    """Write all files of a run: first what it needs to resume and what it is for.

    Args:
        rows: those of the log; state: the checkpoint, "step" and all that load_checkpoint restores.
        generator: its tensors and metadata.
        draw: makes the bands of save_pictures; film: also write the film.
        unet_config: for Stable Diffusion, see save_unet_folder.
        keep: number of the newest checkpoints and generators that stay. If it is more than 1, they
            are copies named by their step.
    """
    files.write_csv(out / "log.csv", rows)
    torch.serialization.set_crc32_options(False)  # slow, and not read in a file that is mapped
    with files.atomic_path(out / "checkpoint.pt") as temporary:
        torch.save(state, temporary)
    files.write_tensors(out / "generator.safetensors", *generator, format="pt")
    for path in (out / "checkpoint.pt", out / "generator.safetensors") if keep > 1 else ():
        with files.atomic_path(path.with_stem(f"{path.stem}_{step:06d}")) as temporary:
            shutil.copyfile(path, temporary)
        # By age, not by step: a run that resumes from an early copy must keep what it writes next.
        copies = sorted(out.glob(f"{path.stem}_[0-9]*{path.suffix}"), key=os.path.getmtime)
        for old in copies[:-keep]:
            old.unlink()
    if unet_config:
        save_unet_folder(out, unet_config)
    draw_curves(out / "curves.png", rows)
    save_pictures(out, step, draw)
    if film:
        save_film(out)


def save_pictures(out: Path, step: int, draw: Callable[[], list[Tensor]]) -> None:
    """Write samples_STEP.png: one row of images per band, (N, C, H, W) in [-1, 1] each."""
    with only_to_look_at(f"samples_{step:06d}.png"):
        bands = draw()
        scale = max(1, 64 // bands[0].shape[-1])
        save_grid(out / f"samples_{step:06d}.png", torch.cat(bands), len(bands[0]), scale)


@only_to_look_at("training.gif")
def save_film(out: Path) -> None:
    """Write training.gif: every samples_STEP.png in turn, at most 640 pixels wide or high."""
    frames = []
    for path in sorted(out.glob("samples_[0-9]*.png"), key=lambda p: (len(p.name), p)):
        with Image.open(path) as picture:
            picture.thumbnail((640, 640))
            frames.append(picture.copy())
    write_film(out / "training.gif", frames)


@only_to_look_at("unet/")
def save_unet_folder(out: Path, config: dict) -> None:
    """Write unet/ for diffusers' UNet2DConditionModel.from_pretrained: the config under diffusers'
    names, and generator.safetensors as a link or, on a file system without links, as a copy."""
    files.write_json(
        out / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **config}
    )
    with files.atomic_path(out / "unet" / "diffusion_pytorch_model.safetensors") as temporary:
        try:
            temporary.symlink_to(Path("..") / "generator.safetensors")
        except OSError:
            shutil.copyfile(out / "generator.safetensors", temporary)


class Log:
    """The progress line and the rows of log.csv, which are means over the ranks.

    Scalars stay on the device until they are shown, so that a GPU need not wait for the CPU.

    Args:
        start, steps: the first step of this process and the number of steps of the run.
        rows: those logged before.
        scalers: of the networks; with enabled ones (fp16), Learner.step skips infinite gradients.
    """

    def __init__(self, ranks: Ranks, start: int, steps: int, rows: list[dict], scalers: list):
        self.ranks, self.steps, self.rows, self.scalers = ranks, steps, rows, scalers
        self.waiting, self.images = [], 0  # images per step over all ranks; the loop sets it
        how = {"desc": "train", "mininterval": 0.5, "disable": ranks.rank > 0}
        self.bar = tqdm(total=steps, initial=start, **how)
        self.note_save()

    def add(self, step: int, scalars: list[Tensor], learning_rate: float) -> None:
        """Log the SCALARS of step k."""
        self.waiting.append((step, torch.stack(scalars), learning_rate))
        if (step + 1) % SHOW_EVERY == 0 or step + 1 == self.steps:
            self.flush()
        self.bar.update()

    def flush(self) -> list[dict]:
        """Turn the waiting scalars into rows, and return all rows. All ranks must call it. NaN and
        infinity end the run here, before the last checkpoint is overwritten."""
        if not self.waiting:
            return self.rows
        steps, scalars, rates = zip(*self.waiting, strict=True)
        means = (self.ranks.sum(torch.stack(scalars)) / self.ranks.count).tolist()
        now = time.perf_counter()
        images_per_s = f"{len(steps) * self.images / (now - self.clock):.1f}"
        for step, values, rate in zip(steps, means, rates, strict=True):
            self.check(step, values)
            row = {name: f"{value:.5g}" for name, value in zip(SCALARS, values, strict=True)}
            row |= {"learning_rate": f"{rate:.4g}", "images_per_s": images_per_s}
            self.rows.append({"step": step + 1, **row})
        scale = min(scaler.get_scale() for scaler in self.scalers)  # 1 without fp16
        if scale < 1:  # every step that is skipped halves it
            what = f"fp16's loss scale is {scale:g} at step {steps[-1] + 1}; the last checkpoint is"
            raise UserError(f"{what} intact; start again with --amp bf16 and another --out")
        self.waiting, self.clock = [], now
        self.bar.set_postfix(row, refresh=False)
        return self.rows

    def note_save(self) -> None:
        """Restart the clocks, so that images_per_s leaves out the time that saving takes."""
        self.clock = self.saved = time.perf_counter()

    def minutes_since_save(self) -> float:
        """Minutes since the last save, by this rank's clock."""
        return (time.perf_counter() - self.saved) / 60

    def check(self, step: int, scalars: list[float]) -> None:
        """Raise UserError if a scalar is not finite."""
        fp16 = self.scalers[0].is_enabled()
        for name, value in zip(SCALARS, scalars, strict=True):
            if not math.isfinite(value) and not (fp16 and name.startswith("grad_norm")):
                raise UserError(
                    f"{name} is {value} at step {step + 1}; the last checkpoint is intact; start "
                    "again with a lower --learning-rate or higher --lambda-reg and another --out"
                )


class Signals:
    """Notes Ctrl-C and SIGTERM. The loop then stops after the current step or between two of its
    parts. A second Ctrl-C stops at once."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.received: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        """Handle a signal."""
        self.received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(self) -> bool:
        """Whether any rank received a signal. All ranks must call it."""
        return self.ranks.any(bool(self.received))

    def leave(self, step: int) -> None:
        """Say how to resume, and exit: with code 130 after Ctrl-C, 0 after SIGTERM."""
        self.ranks.barrier()  # rank 0 has written everything
        if self.ranks.rank == 0:
            when = f"and saved after step {step}" if step else "in the first step"
            print(f"interrupted {when}; resume with the same command")
        sys.exit(130 if signal.SIGINT in self.received else 0)
