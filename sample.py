"""Draw pictures with the one-step generator.

    python sample.py                          the last run's generator, or the one that is shipped
    python sample.py --teacher                beside the teacher's many steps from the same noise
    python sample.py --labels 3 --seeds 7-46 --out threes.png
    python sample.py --checkpoint runs/sd15 --prompt "a red bicycle" "a lighthouse" --seeds 0-3

Image s is a function of its seed and its label or prompt alone; its noise occurs in no training. A
CPU is enough for MNIST. The times that --teacher prints are those from what a user gives to what he
sees: text to image, where there is text, so that Stable Diffusion's text encoder and decoder count,
both with the teacher and with the student. The last line it prints:

    wrote samples.png: 100 images of mnist from runs/mnist/generator.safetensors (step 900)
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from plumbing.devices import AMP, autocast, pick_amp, pick_device
from plumbing.files import save_grid
from plumbing.options import Options, UserError, option, run_script
from plumbing.pairs import sample_noise
from teachers import (
    Teacher,
    check_teaches,
    find_generator,
    latent_shape,
    load_generator,
    load_teacher,
)
from workloads import Workload, get_workload

SEED = 2_000_000  # image s is sample s of this stream; pairs and training draw from others


@dataclass
class Config(Options):
    """Where an option is None, the generator's workload decides."""

    checkpoint: str | None = option(
        None,
        "a run folder, a generator's file (for sd15 also others' UNets), https://... or "
        "hf://owner/repo/file (default: the last run's, or the shipped one)",
    )
    prompt: tuple[str, ...] = option((), "sd15: one or several, cycled over the images")
    labels: str | None = option(None, "classes, cycled over the images: 7 or 0-9 (default: all)")
    seeds: str | None = option(None, "of the images: 0-99 or 3,5,8 (default: 0-99; sd15: 0-3)")
    out: str = option("samples.png", "a .png for one grid, or a folder for one file per image")
    columns: int = option(10, "images per row of the grid", least=1)
    teacher: bool = option(False, "put the teacher's result above each image, and time both")
    teacher_weights: str | None = option(
        None, "teacher (default: the dataset's own); of sd15 its text encoder and VAE serve G too"
    )
    guidance: float | None = option(None, "sd15: of the teacher (default: the dataset's)", above=0)
    steps: int | None = option(None, "of the teacher's solver (default: the dataset's)", least=1)
    decoder: str = option("full", "sd15: decoder of the images", ("tiny", "full"))
    amp: str = option("auto", "half precision; auto: for sd15 on a GPU", AMP)
    batch_size: int | None = option(None, "images at a time (default: 100; sd15: 4)", least=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "guidance"):
            if getattr(self, name) is not None and not self.teacher:
                raise UserError(f"--{name} is the teacher's; add --teacher, or leave it away")
        out = Path(self.out)
        if out.is_dir() if out.suffix.lower() == ".png" else out.suffix or out.is_file():
            raise UserError(f"--out must be a .png or a folder, and {out} is neither")


def parse_numbers(text: str, name: str) -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7]."""
    ranges = [part.partition("-") for part in text.split(",")]
    try:
        numbers = [n for a, _, b in ranges for n in range(int(a), int(b or a) + 1)]
    except ValueError:
        numbers = []
    if not numbers:
        raise UserError(f"--{name} must be like 0-9 or 3,5,8, not {text!r}")
    return numbers


def choose_condition(config: Config, workload: Workload, count: int) -> Tensor | list[str] | None:
    """What each image shall show: labels (count,), prompts, or None; they go round."""
    classes, prompts = workload.num_classes, config.prompt
    if prompts and not workload.latent:
        raise UserError(f"--prompt is for sd15; this is a generator of {workload.dataset}")
    if config.labels is not None and not classes:
        raise UserError(f"a generator of {workload.dataset} has no --labels; leave them away")
    if workload.latent:
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise UserError('this generator draws what it is told: give --prompt "a red bicycle"')
        if len(prompts) > count:
            raise UserError(f"{len(prompts)} prompts need as many --seeds, not {count}")
        return [prompts[i % len(prompts)] for i in range(count)]
    if not classes:
        return None
    cycle = parse_numbers(config.labels or f"0-{classes - 1}", "labels")
    if not 0 <= min(cycle) <= max(cycle) < classes:
        raise UserError(f"--labels {config.labels}: out of range; the classes are 0-{classes - 1}")
    return torch.tensor([cycle[i % len(cycle)] for i in range(count)])


def draw_all(
    solve: Callable,
    z: Tensor,
    cond: Tensor | list[str] | None,
    teacher: Teacher | None,
    amp: str,
    batch_size: int,
    warm_up: Callable | None = None,
) -> tuple[Tensor, float]:
    """From labels or prompts to images, batch by batch.

    Args:
        solve: (z, encoded condition) -> x, G or a teacher's solver.
        z, cond: noise and condition of all images.
        teacher: encodes and decodes; None where neither is needed.
        warm_up: like `solve`, called once for a whole batch, not timed.

    Returns:
        images (count, C, H, W), about [-1, 1], on the CPU; milliseconds per image (median over the
        batches).
    """

    def draw(solve: Callable, rows: slice) -> Tensor:
        chosen = None if cond is None else cond[rows]
        with autocast(z.device, amp):
            if teacher is None:
                return solve(z[rows], chosen).cpu()
            return teacher.decode(solve(z[rows], teacher.encode(chosen))).cpu()  # .cpu() waits

    batches = [slice(k, min(k + batch_size, len(z))) for k in range(0, len(z), batch_size)]
    if warm_up is not None:
        draw(warm_up, batches[0])
    images, times = [], []
    for rows in batches:
        clock = time.perf_counter()
        images.append(draw(solve, rows))
        times.append((time.perf_counter() - clock) / len(images[-1]) * 1000)
    return torch.cat(images), statistics.median(times)


def load_rest(config: Config, workload: Workload, text_width: int) -> Teacher | None:
    """What G needs beside itself: nothing, or of Stable Diffusion the text encoder and a decoder;
    with --teacher, the teacher."""
    if not (workload.latent or config.teacher):
        return None
    parts = ("unet", "text_encoder") if config.teacher else ("text_encoder",)
    teacher = load_teacher(workload, parts)
    if workload.latent and text_width != (width := teacher.sd.text_encoder.config["hidden_size"]):
        raise UserError(
            f"the generator attends to text states of width {text_width}, the text encoder gives "
            f"{width}; choose the right --teacher-weights"
        )
    return teacher


@torch.inference_mode()
def main(config: Config) -> None:
    """Sample, and write the pictures."""
    device, path = pick_device(config.device), find_generator(config.checkpoint)
    G, metadata = load_generator(path)
    given = {"teacher": config.teacher_weights, "guidance": config.guidance}
    given |= {"solver_steps": config.steps, "decoder": config.decoder}
    given = {name: value for name, value in given.items() if value is not None}
    workload = get_workload(metadata["dataset"], **given)
    latent, shape = workload.latent, workload.image_shape
    amp = "off" if config.amp == "auto" and not latent else pick_amp(config.amp, device)

    # Image i: noise from seed i, label or prompt i of the cycle.
    seeds = parse_numbers(config.seeds or ("0-3" if latent else "0-99"), "seeds")
    if not Path(config.out).suffix and len(set(seeds)) < len(seeds):
        raise UserError("--seeds names a seed twice, but in a folder each seed is one file")
    cond = choose_condition(config, workload, len(seeds))

    net = G.mu.net
    teacher = load_rest(config, workload, net.config["cross_attention_dim"] if latent else 0)
    if config.teacher and config.teacher_weights is None:
        check_teaches(teacher, metadata, path)
    z = sample_noise(SEED, seeds, latent_shape(net.config) if latent else shape)
    z = z.to(device, memory_format=torch.channels_last)
    cond = cond.to(device) if isinstance(cond, Tensor) else cond
    G = G.to(device, memory_format=torch.channels_last)
    teacher = teacher and teacher.to(device, amp)
    how = (z, cond, teacher, amp, config.batch_size or (4 if latent else 100))
    y = None
    if config.teacher:
        steps = workload.solver_steps
        two = partial(teacher.solve, steps=min(steps, 2))
        y, ms_teacher = draw_all(partial(teacher.solve, steps=steps), *how, warm_up=two)
    x, ms_student = draw_all(G, *how, warm_up=G if config.teacher else None)
    if config.teacher:
        print(
            f"teacher, {teacher.evaluations(steps)} evaluations: {ms_teacher:.2f} ms per image; "
            f"student, 1 evaluation: {ms_student:.2f} ms per image; "
            f"{ms_teacher / ms_student:.1f} times faster"
        )
    where = write_pictures(Path(config.out), x, y, seeds, config.columns)
    print(
        f"wrote {where}: {len(x)} images of {workload.dataset} from {path} "
        f"(step {metadata.get('step', '?')})"
        + (", teacher above student" if config.teacher else "")
    )


def write_pictures(out: Path, x: Tensor, y: Tensor | None, seeds: list[int], columns: int) -> str:
    """One grid (teacher rows above student rows), or one PNG per image, named by its seed -> what
    was written, for the last line."""
    scale = max(1, 64 // x.shape[-1])
    bands = [x] if y is None else [y, x]
    if not out.suffix:
        for seed, *pair in zip(seeds, *bands, strict=True):
            save_grid(out / f"{seed:06d}.png", torch.stack(pair), columns=1, scale=scale, gap=0)
        return f"{out}/"
    columns = min(columns, len(x))
    bands = [F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(x) % columns), value=1) for images in bands]
    rows = [images.unflatten(0, (-1, columns)) for images in bands]  # (rows, columns, C, H, W)
    save_grid(out, torch.stack(rows, dim=1).flatten(0, 2), columns, scale)
    return str(out)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
