"""What a run leaves on disk, how it goes on from there, and how it is interrupted.

    config.json                what decides the result; another run's folder is left alone
    log.csv, curves.png        SCALARS of every step
    samples_STEP.png           pictures; at the end training.gif, a film of them
    generator.safetensors      G, with all it takes to build it again; of Stable Diffusion also
                               unet/, which diffusers opens
    checkpoint.pt              everything needed to go on; tensors and plain numbers only

Every file is written whole or not at all (files.py).
"""

import csv
import json
import math
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from plumbing.devices import Ranks
from plumbing.drawing import draw_curves, save_grid, write_film
from plumbing.files import (
    atomic_path,
    read_json,
    write_csv,
    write_json,
    write_tensors,
)
from plumbing.options import UserError

SCALARS = ["loss_kl", "loss_reg", "loss_denoise", "grad_norm_G", "grad_norm_fake"]
SHOWN = [*SCALARS, "images_per_s"]
# Steps between looks at the scalars: for the progress line, and whether they are finite.
SHOW_EVERY = 10


def claim_folder(out: Path, name: str, settings: dict, may_grow: tuple[str, ...] = ()) -> None:
    """Write `settings`, all that decides what the folder will hold, to its file `name`; or check
    that what it holds was made with just these (those of `may_grow` may be larger now)."""
    settings = json.loads(json.dumps(settings))
    found = read_json(out / name) if (out / name).exists() else {}
    # A setting that did not exist when the work began has not changed.
    changed = sorted(k for k in settings if found.get(k, settings[k]) != settings[k])
    grown = all(k in may_grow and settings[k] > found[k] for k in changed)
    held = {path.name for path in out.glob("[!.]*")}  # hidden ones are what a killed write left
    if not found.keys() & settings.keys():
        if held:
            raise UserError(f"{out} holds other files; choose another --out")
    elif not grown and held > {name}:
        raise UserError(
            f"what {out} holds was made with another {', '.join(changed)}; "
            "choose another --out or delete the folder"
        )
    write_json(out / name, settings)


def load_checkpoint(out: Path, parts: dict) -> tuple[int, list[dict]]:
    """Restore `parts`, {name: what has load_state_dict} -> steps done, rows of the log."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return 0, []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for name, part in parts.items():
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


def save_run(
    out: Path,
    step: int,
    rows: list[dict],
    state: dict,
    generator: tuple[dict[str, Tensor], dict[str, str]],
    keep: int,
) -> None:
    """Write log, curves, generator (tensors, and what the file says of them) and checkpoint: the
    state that load_checkpoint restores, and "step", the steps done. If `keep` is above 1, that many
    checkpoints stay as copies named by their step."""
    write_csv(out / "log.csv", rows)
    draw_curves(out / "curves.png", rows)
    write_tensors(out / "generator.safetensors", *generator, format="pt")
    # Last: what is not in the checkpoint is written again by whoever goes on from it.
    with atomic_path(out / "checkpoint.pt") as temporary:
        torch.save(state, temporary)
    if keep > 1:
        keep_copies(out, step, keep)


def save_pictures(out: Path, step: int, bands: list[Tensor]) -> None:
    """samples_STEP.png: rows of images, (N, C, H, W) in [-1, 1] each."""
    scale = max(1, 64 // bands[0].shape[-1])
    save_grid(out / f"samples_{step:06d}.png", torch.cat(bands), len(bands[0]), scale)


def save_film(out: Path) -> None:
    """training.gif: all samples_STEP.png in turn, at most 640 pixels wide."""
    frames = []
    for path in sorted(out.glob("samples_*.png")):
        with Image.open(path) as picture:
            picture.thumbnail((640, 640))
            frames.append(picture.convert("L" if picture.mode == "L" else "RGB"))
    write_film(out / "training.gif", frames)


def save_unet_folder(out: Path, config: dict) -> None:
    """unet/: what diffusers' UNet2DConditionModel.from_pretrained opens: the config, under
    diffusers' names, and generator.safetensors, by a link."""
    write_json(out / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **config})
    link = out / "unet" / "diffusion_pytorch_model.safetensors"
    if not link.is_symlink():
        link.symlink_to(Path("..") / "generator.safetensors")


def keep_copies(out: Path, step: int, keep: int) -> None:
    """Copy this step's checkpoint and generator, and forget all copies but the newest."""
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

    Args:
        start, steps: of the run.
        rows: what was logged before.
        fp16: gradients may be infinite now and then, see optim.Learner.step.

    Attributes:
        images: per step, over all ranks: unpaired ones (paired ones, if these are alone).
    """

    images = 0

    def __init__(self, ranks: Ranks, start: int, steps: int, rows: list[dict], fp16: bool):
        self.ranks, self.steps, self.rows, self.fp16 = ranks, steps, rows, fp16
        self.waiting = []
        hidden = ranks.rank > 0
        self.bar = tqdm(total=steps, initial=start, desc="train", mininterval=0.5, disable=hidden)
        self.clock = self.saved = time.perf_counter()

    def add(self, step: int, scalars: list[Tensor], learning_rate: float) -> None:
        """Note step k's SCALARS."""
        self.waiting.append((step, torch.stack(scalars), learning_rate))
        if (step + 1) % SHOW_EVERY == 0 or step + 1 == self.steps:
            self.flush()
        self.bar.update()

    def flush(self) -> list[dict]:
        """Turn what is waiting into rows -> all rows. All ranks must call.

        NaN and infinity end the run here; the last checkpoint is from before that.
        """
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
        self.waiting, self.clock = [], now
        self.bar.set_postfix({name: self.rows[-1][name] for name in SHOWN}, refresh=False)
        return self.rows

    def note_save(self) -> None:
        """Writing is no training: it does not count in images_per_s."""
        self.clock = self.saved = time.perf_counter()

    def minutes_since_save(self) -> float:
        """Minutes, on this rank."""
        return (time.perf_counter() - self.saved) / 60

    def check(self, step: int, scalars: list[float]) -> None:
        """Raise UserError if a scalar is not finite."""
        for name, value in zip(SCALARS, scalars, strict=True):
            if not math.isfinite(value) and not (self.fp16 and name.startswith("grad_norm")):
                raise UserError(
                    f"{name} is {value} at step {step + 1}, what was saved before is intact: "
                    "lower --learning-rate or raise --lambda-reg, with another --out"
                )


class Signals:
    """Ctrl-C and SIGTERM are noted; the loop stops after its current step, or between the step's
    parts. A second Ctrl-C stops at once."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.received: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        """The handler."""
        self.received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(self) -> bool:
        """Whether any rank was told to stop. All ranks must call."""
        return self.ranks.any(bool(self.received))

    def leave(self, step: int) -> None:
        """Say how to go on, and exit: 130 after Ctrl-C, 0 after SIGTERM (a cluster's)."""
        self.ranks.barrier()  # rank 0 has written all there is
        if self.ranks.rank == 0:
            alone = self.ranks.count == 1
            command = shlex.join(["python", *sys.argv]) if alone else "the same command"
            when = f"and saved after step {step}" if step else "in the first step"
            print(f"interrupted {when}; go on with: {command}")
        sys.exit(130 if signal.SIGINT in self.received else 0)
