"""Draw pictures with the one-step generator.

    python sample.py                          the last run's generator, or the one that is shipped
    python sample.py --teacher                beside the teacher's many steps from the same noise
    python sample.py --labels 3 --seeds 7-46 --out threes.png

Image s is a function of its seed and its label alone. A CPU is enough for MNIST. The last line it
prints:

    wrote samples.png: 100 images of mnist from runs/mnist/generator.safetensors (step 500)
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edm_unet import heun_sample
from edm_weights import fetch
from pairs import sample_noise
from rundir import UserError, option, pick_device, run_script, save_grid
from workloads import MNIST_GENERATOR, get_workload, load_generator, load_teacher


@dataclass
class Config:
    checkpoint: str | None = option(
        None,
        "a run folder, a generator's file, https://... or hf://owner/repo/file "
        "(default: the last run's, or the shipped one)",
    )
    seeds: str = option("0-99", "seeds of the images: 0-99 or 3,5,8")
    labels: str | None = option(None, "classes, cycled over the images: 7 or 0-9 (default: all)")
    out: str = option("samples.png", "a .png for one grid, or a folder for one file per image")
    columns: int = option(10, "images per row of the grid")
    teacher: bool = option(False, "put the teacher's result above each image, and time both")
    teacher_weights: str | None = option(None, "teacher weights (default: the dataset's own)")
    steps: int | None = option(None, "Heun steps of the teacher (default: the dataset's)")
    batch_size: int = option(100, "images at a time")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")


def parse_numbers(text: str, name: str) -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7].

    Raises:
        UserError: not such a list, or an empty one.
    """
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    except ValueError:
        numbers = []
    if not numbers:
        raise UserError(f"--{name} must be like 0-9 or 3,5,8, not {text!r}")
    return numbers


def find_checkpoint(given: str | None) -> Path:
    """The generator to use: the one given, else the newest run's, else the shipped one."""
    if given:
        folder = Path(given)
        return folder / "generator.safetensors" if folder.is_dir() else fetch(given)
    runs = sorted(Path("runs").glob("*/generator.safetensors"), key=lambda p: p.stat().st_mtime)
    if runs:
        return runs[-1]
    print("no run in runs/: using the shipped MNIST generator")
    return MNIST_GENERATOR


def draw_all(
    draw: Callable, z: Tensor, cond: Tensor | None, batch_size: int
) -> tuple[Tensor, float]:
    """Run draw(z, cond) batch by batch -> images (B, C, H, W) on the CPU, ms per image (median)."""
    images, times = [], []
    draw(z[:1], None if cond is None else cond[:1])  # warm-up, not counted
    for start in range(0, len(z), batch_size):
        rows = slice(start, start + batch_size)
        clock = time.perf_counter()
        images.append(draw(z[rows], None if cond is None else cond[rows]).cpu())
        times.append((time.perf_counter() - clock) / len(images[-1]) * 1000)
    return torch.cat(images), statistics.median(times)


@torch.inference_mode()
def main(config: Config) -> None:
    """Sample, and write the pictures."""
    device, path = pick_device(config.device), find_checkpoint(config.checkpoint)
    if config.columns < 1 or config.batch_size < 1:
        raise UserError("--columns and --batch-size must be at least 1")
    G, metadata = load_generator(path)
    dataset = metadata["dataset"]
    workload = get_workload(dataset)
    G = G.to(device, memory_format=torch.channels_last)

    # Image i: noise from seed i, label i of the cycle.
    seeds = parse_numbers(config.seeds, "seeds")
    z = torch.cat([sample_noise(seed, [0], workload.image_shape) for seed in seeds])
    z = z.to(device, memory_format=torch.channels_last)
    cond = choose_labels(config.labels, workload.num_classes, len(seeds))
    cond = None if cond is None else cond.to(device)
    x, ms_student = draw_all(G, z, cond, config.batch_size)

    y = None
    if config.teacher:
        mu_real, _ = load_teacher(dataset, config.teacher_weights)
        net = mu_real.net.to(device, memory_format=torch.channels_last)
        steps = workload.solver_steps if config.steps is None else config.steps
        if steps < 1:
            raise UserError(f"--steps must be at least 1, not {steps}")
        y, ms_teacher = draw_all(
            lambda z, cond: heun_sample(net, z, cond, steps), z, cond, config.batch_size
        )
        print(
            f"teacher, {2 * steps - 1} evaluations: {ms_teacher:.2f} ms per image; "
            f"student, 1 evaluation: {ms_student:.2f} ms per image; "
            f"{ms_teacher / ms_student:.1f} times faster"
        )
    write_pictures(Path(config.out), x, y, seeds, config.columns)
    print(
        f"wrote {config.out}: {len(x)} images of {dataset} from {path} "
        f"(step {metadata.get('step', '?')})"
        + (", teacher above student" if config.teacher else "")
    )


def choose_labels(labels: str | None, num_classes: int, count: int) -> Tensor | None:
    """The class of each image (count,), or None for an unconditional generator.

    Raises:
        UserError: a label that the generator does not have.
    """
    if num_classes == 0:
        if labels is not None:
            raise UserError("this generator is unconditional; leave --labels away")
        return None
    cycle = list(range(num_classes)) if labels is None else parse_numbers(labels, "labels")
    outside = [label for label in cycle if not 0 <= label < num_classes]
    if outside:
        raise UserError(f"label {outside[0]} is out of range; the classes are 0-{num_classes - 1}")
    return torch.tensor([cycle[i % len(cycle)] for i in range(count)])


def write_pictures(out: Path, x: Tensor, y: Tensor | None, seeds: list[int], columns: int) -> None:
    """One grid (teacher rows above student rows), or one PNG per image, named by its seed."""
    scale = max(1, 64 // x.shape[-1])
    if out.suffix.lower() == ".png":
        bands = []
        for start in range(0, len(x), columns):
            rows = [x[start : start + columns]] if y is None else [
                y[start : start + columns], x[start : start + columns]
            ]  # fmt: skip
            blank = x.new_ones(columns - len(rows[0]), *x.shape[1:])  # fills up the last row
            bands += [torch.cat([row, blank]) for row in rows]
        save_grid(out, torch.cat(bands), columns, scale)
    elif out.suffix:
        raise UserError(f"--out must be a .png or a folder, not {out}")
    else:
        for i, seed in enumerate(seeds):
            pair = x[i : i + 1] if y is None else torch.stack([y[i], x[i]])
            save_grid(out / f"{seed:06d}.png", pair, columns=1, scale=scale, gap=0)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
