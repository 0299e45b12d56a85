"""Draw pictures with the one-step generator.

    python sample.py                          the newest run's generator, or the shipped one
    python sample.py --teacher                the teacher's many-step result above each image
    python sample.py --labels 3 --seeds 7-46 --out threes.png
    python sample.py --checkpoint runs/sd15 --prompt "a red bicycle" "a lighthouse" --seeds 0-3

An image depends only on the generator, its seed and its label or prompt. Training never uses this
noise. A CPU is enough for MNIST. --teacher also prints the time per image of both models; for
Stable Diffusion, this time includes the text encoder and the decoder. The last line for MNIST:

    wrote samples.png: 100 images of mnist from runs/mnist/generator.safetensors (step 1000)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from plumbing.devices import AMP, autocast, pick_amp, pick_device
from plumbing.drawing import save_grid
from plumbing.options import Options, UserError, option, parse_numbers, run_script
from plumbing.pairs import sample_noise
from teachers import find_generator, load_generator, load_teacher, origin, workload_of
from workloads import Workload


@dataclass
class Config(Options):
    """What to draw. For options that are None, the generator's workload decides."""

    checkpoint: str | None = option(None, "run folder, file, https:// or hf:// (default: newest)")
    prompt: tuple[str, ...] = option((), "sd15: one or more, used in turn")
    labels: str | None = option(None, "classes, used in turn: 7 or 0-9 (default: all)")
    seeds: str | None = option(None, "one per image: 0-99 or 3,5,8 (default: 0-99; sd15: 0-3)")
    out: str = option("samples.png", "a .png file for one grid, or a folder for one file per image")
    columns: int = option(10, "images per row of the grid", least=1)
    teacher: bool = option(False, "put the teacher's result above each image and time both")
    teacher_weights: str | None = option(None, "default: the generator's; sd15: G needs them too")
    guidance: float | None = option(None, "sd15: the teacher's (default: the generator's)", above=0)
    steps: int | None = option(None, "of the teacher's solver (default: the dataset's)", least=1)
    decoder: str = option("full", "sd15: decoder that makes the images", ("tiny", "full"))
    amp: str | None = option(None, "half precision (default: for sd15 on a GPU)", AMP)
    batch_size: int | None = option(None, "images at a time (default: 100; sd15: 4)", least=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "guidance"):
            if getattr(self, name) is not None and not self.teacher:
                raise UserError(f"--{name} is the teacher's; add --teacher or omit it")
        if Path(self.out).suffix.lower() not in ("", ".png"):
            raise UserError(f"--out must be a .png or a folder, not {self.out}")


@torch.inference_mode()
def main(config: Config) -> None:
    """Draw the images and write them."""
    device, path = pick_device(config.device), find_generator(config.checkpoint)
    G, metadata = load_generator(path)
    workload = workload_of(
        metadata, config.teacher, teacher=config.teacher_weights, guidance=config.guidance,
        solver_steps=config.steps, decoder=config.decoder,
    )  # fmt: skip
    amp = pick_amp(config.amp or workload.solver_amp, device, workload.half)

    # Image i has the noise of the i-th seed, and the i-th label or prompt in turn.
    seeds = parse_numbers(config.seeds or ("0-3" if workload.latent else "0-99"), "seeds")
    if not Path(config.out).suffix and len(set(seeds)) < len(seeds):
        raise UserError("--seeds lists a seed twice; for a folder, give each seed once")
    classes = 0 if workload.latent else G.mu.net.label_dim
    cond = choose_condition(config, workload, classes, len(seeds))
    cond = torch.tensor(cond, device=device) if classes else cond
    z = sample_noise("samples", 0, seeds, G.mu.net.image_shape)
    z, G = (each.to(device, memory_format=torch.channels_last) for each in (z, G))

    # Stable Diffusion also needs its text encoder and a decoder. EDM needs nothing but G.
    encode = decode = lambda same: same
    record = {}
    if workload.latent or config.teacher:
        teacher = load_teacher(workload, with_unet=config.teacher).to(device, amp)
        encode, decode, record = teacher.encode, teacher.decode, teacher.record
    source = origin(path, metadata, workload, record, bool(config.teacher_weights))

    def draw(solve: Callable, rows: slice) -> Tensor:
        """Draw these rows of z and cond -> images (B, C, H, W), about [-1, 1]."""
        with autocast(device, amp):
            x = solve(z[rows], encode(None if cond is None else cond[rows]))
            return decode(x).cpu()  # .cpu() waits for the GPU

    size = config.batch_size or (4 if workload.latent else 100)
    batches = [slice(start, start + size) for start in range(0, len(seeds), size)]
    solvers, bands, times = [G], [], []
    if config.teacher:
        solvers = [partial(teacher.solve, steps=workload.solver_steps), G]
        for solve in (partial(teacher.solve, steps=2), G):  # warm up: not timed
            draw(solve, batches[0])
    for solve in solvers:
        clock = time.perf_counter()
        bands.append(torch.cat([draw(solve, rows) for rows in batches]))
        times.append((time.perf_counter() - clock) * 1000 / len(seeds))
    if config.teacher:
        print(
            f"teacher, {teacher.evaluations(workload.solver_steps)} evaluations: "
            f"{times[0]:.2f} ms per image; student, 1 evaluation: {times[1]:.2f} ms per image; "
            f"{times[0] / times[1]:.1f} times faster"
        )
    if workload.latent:
        for cut_off in teacher.sd.tokenizer.too_long.values():
            print(f"a prompt is too long for the text encoder: {cut_off!r} is cut off")
    where = write_pictures(Path(config.out), bands, seeds, config.columns)
    source += ", teacher above student" if config.teacher else ""
    print(f"wrote {where}: {len(seeds)} images of {workload.dataset} from {source}")


def choose_condition(config: Config, workload: Workload, classes: int, count: int) -> list | None:
    """The label or prompt of each image, taken in turn; None if the network takes neither."""
    cycle = config.prompt
    if cycle and not workload.latent:
        raise UserError(f"--prompt is for sd15; this is a generator of {workload.dataset}")
    if config.labels is not None and not classes:
        raise UserError(f"a generator of {workload.dataset} has no --labels; omit them")
    if classes:
        cycle = parse_numbers(config.labels or f"0-{classes - 1}", "labels")
        if max(cycle) >= classes:
            raise UserError(f"--labels {config.labels}: out of range 0-{classes - 1}")
    elif not workload.latent:
        return None
    elif not cycle or not all(prompt.strip() for prompt in cycle):
        raise UserError('this generator draws from text; give --prompt "a red bicycle"')
    elif len(cycle) > count:
        raise UserError(f"{len(cycle)} prompts need as many --seeds, not {count}")
    return [cycle[i % len(cycle)] for i in range(count)]


def write_pictures(out: Path, bands: list[Tensor], seeds: list[int], columns: int) -> str:
    """Write one grid with the bands' rows in turn, or a folder of one PNG per seed -> its name."""
    x = torch.stack(bands, dim=1)  # (N, bands, C, H, W)
    scale, columns = max(1, 64 // x.shape[-1]), min(columns, len(x))
    if not out.suffix:
        for seed, column in zip(seeds, x, strict=True):
            save_grid(out / f"{seed:06d}.png", column, columns=1, scale=scale, gap=0)
        return f"{out}/"
    white = x.new_ones(-len(x) % columns, *x.shape[1:])  # to the end of the last row
    rows = torch.cat([x, white]).unflatten(0, (-1, columns)).transpose(1, 2)
    save_grid(out, rows.flatten(0, 2), columns, scale)  # (rows * bands * columns, C, H, W)
    return str(out)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
