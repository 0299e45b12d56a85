"""Draw pictures with the one-step generator.

    python sample.py                          the last run's generator, or the one that is shipped
    python sample.py --teacher                beside the teacher's many steps from the same noise
    python sample.py --labels 3 --seeds 7-46 --out threes.png
    python sample.py --checkpoint runs/sd15 --prompt "a red bicycle" "a lighthouse" --seeds 0-3

Image s is a function of its seed and its label or prompt alone; its noise occurs in no training. A
CPU is enough for MNIST. The times that --teacher prints are those from what a user gives to what he
sees: text to image, where there is text, so that Stable Diffusion's text encoder and decoder count,
both with the teacher and with the student. The last line it prints:

    wrote samples.png: 100 images of mnist from runs/mnist/generator.safetensors (step 800)
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dmd_loss import OneStepGenerator
from plumbing.devices import AMP, autocast, pick_amp, pick_device
from plumbing.files import save_grid
from plumbing.options import Options, UserError, option, run_script
from plumbing.pairs import sample_noise
from teachers import (
    DECODERS,
    Teacher,
    check_teaches,
    find_generator,
    latent_shape,
    load_generator,
    load_teacher,
)
from workloads import get_workload

SEED = 2_000_000  # image s is sample s of this stream; pairs and training draw from others


@dataclass
class Config(Options):
    """Options at None: the generator and its dataset decide."""

    checkpoint: str | None = option(
        None,
        "a run folder, a generator's file (for sd15 also others' UNets), https://... or "
        "hf://owner/repo/file (default: the last run's, or the shipped one)",
    )
    prompt: tuple[str, ...] = option((), "sd15: one or several, cycled over the images")
    labels: str | None = option(None, "classes, cycled over the images: 7 or 0-9 (default: all)")
    seeds: str | None = option(None, "of the images: 0-99 or 3,5,8 (default: 0-99; sd15: 0-3)")
    out: str = option("samples.png", "a .png for one grid, or a folder for one file per image")
    columns: int = option(10, "images per row of the grid")
    teacher: bool = option(False, "put the teacher's result above each image, and time both")
    teacher_weights: str | None = option(
        None, "teacher (default: the dataset's own); of sd15 its text encoder and VAE serve G too"
    )
    guidance: float | None = option(None, "sd15: of the teacher (default: the dataset's)")
    steps: int | None = option(None, "solver steps of the teacher (default: the dataset's)")
    decoder: str = option("full", "sd15: decoder of the images", DECODERS)
    tiny_decoder: str | None = option(None, "sd15: folder or repository of it (default: TAESD)")
    amp: str = option("auto", "half precision: bf16, fp16, off, or auto: for sd15 on a GPU", AMP)
    batch_size: int | None = option(None, "images at a time (default: 100; sd15: 4)")
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


def check(config: Config) -> None:
    """What can be checked before anything is loaded.

    Raises:
        UserError: an option out of range, or a place that cannot be written.
    """
    for name in ("columns", "batch_size", "steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if config.guidance is not None and not config.guidance > 0:
        raise UserError(f"--guidance must be above 0, not {config.guidance}; 1 is no guidance")
    for name in ("steps", "guidance"):
        if getattr(config, name) is not None and not config.teacher:
            raise UserError(f"--{name} is the teacher's; add --teacher, or leave it away")
    out = Path(config.out)
    if out.suffix.lower() == ".png":
        if out.is_dir():
            raise UserError(f"{out} is a folder; choose another --out")
    elif out.suffix or out.is_file():
        raise UserError(f"--out must be a .png or a folder, not {out}")
    elif config.seeds:
        seeds = parse_numbers(config.seeds, "seeds")
        if len(set(seeds)) < len(seeds):
            raise UserError("--seeds names a seed twice, but in a folder each seed is one file")


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


def choose_prompts(prompts: tuple[str, ...], count: int) -> list[str]:
    """The prompt of each image.

    Raises:
        UserError: no prompts, an empty one, or more of them than images.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError('this generator draws what it is told: give --prompt "a red bicycle"')
    if len(prompts) > count:
        raise UserError(f"{len(prompts)} prompts need as many --seeds, not {count}")
    return [prompts[i % len(prompts)] for i in range(count)]


def choose_condition(config: Config, dataset: str, count: int) -> Tensor | list[str] | None:
    """What each image shall show: labels, prompts, or None.

    Raises:
        UserError: an option that this generator does not have, or a bad value of it.
    """
    workload = get_workload(dataset)
    if workload.latent:
        if config.labels is not None:
            raise UserError(f"a generator of {dataset} has no --labels; it has --prompt")
        return choose_prompts(config.prompt, count)
    for name in ("prompt", "guidance"):
        if getattr(config, name):
            raise UserError(f"--{name} is for sd15; this is a generator of {dataset}")
    return choose_labels(config.labels, workload.num_classes, count)


def load_rest(config: Config, dataset: str, G: OneStepGenerator) -> Teacher | None:
    """What G needs beside itself: nothing, or of Stable Diffusion the text encoder and a decoder;
    with --teacher, the teacher.

    Raises:
        UserError: missing files, or a text encoder that does not fit G.
    """
    latent = get_workload(dataset).latent
    if not (latent or config.teacher):
        return None
    parts = ("unet", "text_encoder") if config.teacher else ("text_encoder",)
    teacher = load_teacher(
        dataset, config.teacher_weights, guidance=config.guidance, decoder=config.decoder,
        tiny_source=config.tiny_decoder, parts=parts,
    )  # fmt: skip
    if latent:
        needed = G.mu.net.config["cross_attention_dim"]
        width = teacher.sd.text_encoder.config["hidden_size"]
        if needed != width:
            raise UserError(
                f"the generator attends to text states of width {needed}, the text encoder gives "
                f"{width}; choose the right --teacher-weights"
            )
    return teacher


def paint(
    solve: Callable,
    z: Tensor,
    cond: Tensor | list[str] | None,
    teacher: Teacher | None,
    amp: str,
    rows: slice,
) -> Tensor:
    """From labels or prompts to images, for some of all images.

    Args:
        solve: (z, encoded condition) -> x, G or a teacher's solver.
        z, cond: noise and condition of all images.
        teacher: encodes and decodes; None where neither is needed.
        amp: precision of the networks, see devices.py.
        rows: which images, B of them.

    Returns:
        (B, C, H, W), about [-1, 1].
    """
    chosen = None if cond is None else cond[rows]
    with autocast(z.device, amp):
        if teacher is None:
            return solve(z[rows], chosen)
        return teacher.decode(solve(z[rows], teacher.encode(chosen)))


def draw_all(
    draw: Callable, warm_up: Callable | None, count: int, batch_size: int
) -> tuple[Tensor, float]:
    """Draw images batch by batch.

    Args:
        draw: draw(rows=slice of the images' numbers) -> images (B, C, H, W).
        warm_up: the same, or a shorter form of it: called once for a whole batch, not timed; None
            where the times do not matter.

    Returns:
        images (count, C, H, W) on the CPU, milliseconds per image (median over the batches).
    """
    batches = [slice(k, min(k + batch_size, count)) for k in range(0, count, batch_size)]
    if warm_up is not None:
        warm_up(rows=batches[0]).cpu()
    images, times = [], []
    for rows in batches:
        clock = time.perf_counter()
        images.append(draw(rows=rows).cpu())  # .cpu() waits for the device
        times.append((time.perf_counter() - clock) / len(images[-1]) * 1000)
    return torch.cat(images), statistics.median(times)


@torch.inference_mode()
def main(config: Config) -> None:
    """Sample, and write the pictures."""
    check(config)
    device, path = pick_device(config.device), find_generator(config.checkpoint)
    G, metadata = load_generator(path)
    dataset = metadata["dataset"]
    workload = get_workload(dataset)
    latent = workload.latent
    amp = "off" if config.amp == "auto" and not latent else pick_amp(config.amp, device)
    batch_size = config.batch_size or (4 if latent else 100)

    # Image i: noise from seed i, label or prompt i of the cycle.
    seeds = parse_numbers(config.seeds or ("0-3" if latent else "0-99"), "seeds")
    cond = choose_condition(config, dataset, len(seeds))
    shape = latent_shape(G.mu.net.config) if latent else workload.image_shape
    z = sample_noise(SEED, seeds, shape).to(device, memory_format=torch.channels_last)
    cond = cond.to(device) if isinstance(cond, Tensor) else cond

    teacher = load_rest(config, dataset, G)
    if config.teacher and config.teacher_weights is None:
        check_teaches(teacher, metadata, path)
    G = G.to(device, memory_format=torch.channels_last)
    teacher = teacher and teacher.to(device, amp)
    given = {"z": z, "cond": cond, "teacher": teacher, "amp": amp}

    y = None
    if config.teacher:
        steps = workload.solver_steps if config.steps is None else config.steps
        whole, short = (
            partial(paint, partial(teacher.solve, steps=n), **given) for n in (steps, min(steps, 2))
        )
        y, ms_teacher = draw_all(whole, short, len(z), batch_size)
    student = partial(paint, G, **given)
    x, ms_student = draw_all(student, student if config.teacher else None, len(z), batch_size)
    if config.teacher:
        print(
            f"teacher, {teacher.evaluations(steps)} evaluations: {ms_teacher:.2f} ms per image; "
            f"student, 1 evaluation: {ms_student:.2f} ms per image; "
            f"{ms_teacher / ms_student:.1f} times faster"
        )
    where = write_pictures(Path(config.out), x, y, seeds, config.columns)
    print(
        f"wrote {where}: {len(x)} images of {dataset} from {path} "
        f"(step {metadata.get('step', '?')})"
        + (", teacher above student" if config.teacher else "")
    )


def write_pictures(out: Path, x: Tensor, y: Tensor | None, seeds: list[int], columns: int) -> str:
    """One grid (teacher rows above student rows), or one PNG per image, named by its seed.

    Returns:
        what was written, for the last line.
    """
    scale, columns = max(1, 64 // x.shape[-1]), min(columns, len(x))
    if not out.suffix:
        for i, seed in enumerate(seeds):
            pair = x[i : i + 1] if y is None else torch.stack([y[i], x[i]])
            save_grid(out / f"{seed:06d}.png", pair, columns=1, scale=scale, gap=0)
        return f"{out}/"  # one SEED.png each
    bands = []
    for start in range(0, len(x), columns):
        rows = [image[start : start + columns] for image in (y, x) if image is not None]
        blank = x.new_ones(columns - len(rows[0]), *x.shape[1:])  # fills up the last row
        bands += [torch.cat([row, blank]) for row in rows]
    save_grid(out, torch.cat(bands), columns, scale)
    return str(out)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
