"""Measure the speed of everything on this machine, and how it scales: a table and a picture.

    python benchmarks/speed.py                                       on a CPU, in minutes
    python benchmarks/speed.py --scale 16 --amp bf16 --compile       on a GPU

It times training steps of the EDM workloads against the batch size, and for MNIST's network also
against the resolution. Each measurement runs `step.py` in its own process, so that peak memory is
measured separately. Then it compares one-step sampling with the teacher's 35 evaluations. The last
line it prints:

    wrote speed.png
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from plumbing.devices import AMP
from plumbing.drawing import write_figure
from plumbing.files import read_json
from plumbing.options import Options, UserError, option, run_script
from workloads import ASSETS, get_workload

ROOT = Path(__file__).parent.parent
BATCHES = {"mnist": (4, 8, 16, 32, 64), "cifar10": (1, 2, 4), "imagenet64": (1, 2)}
RESOLUTIONS = {"mnist": (28, 56, 84, 112)}
BATCH = 8  # batch size of the measurements against the resolution, before --scale


@dataclass
class Config(Options):
    """What to measure, and how."""

    out: str = option("speed.png", "file of the picture")
    datasets: tuple[str, ...] = option(
        (), "workloads to time (default: all of them)", tuple(BATCHES)
    )
    scale: int = option(1, "factor of all batch sizes; a GPU needs larger ones than a CPU", least=1)
    repeats: int = option(5, "repetitions of each measurement; medians count", least=1)
    amp: str = option("off", "half precision: auto, bf16, fp16, off", AMP)
    compile: bool = option(False, "torch.compile the networks")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")


def run(script: str, *arguments: object) -> list[str]:
    """Run one of the project's scripts -> the lines that it prints."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{script} failed, see above; choose other workloads with --datasets")
    return done.stdout.splitlines()


def measure(config: Config, dataset: str, batch: int, size: int | None = None) -> dict[str, float]:
    """Run step.py once, and print its row of the table -> its measurements."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder) / "numbers.json"
        options = ["--dataset", dataset, "--batch-size", batch, "--repeats", config.repeats]
        options += ["--amp", config.amp, "--device", config.device, "--json", numbers]
        options += ["--compile"] if config.compile else []
        options += ["--resolution", size] if size else []
        run("benchmarks/step.py", *options)
        found = read_json(numbers)
    workload = get_workload(dataset, batch_size=batch)
    size = size or workload.image_shape[-1]
    cells = (
        dataset, size, f"{batch} + {workload.batch_size_ref}", f"{found['forward']:.1f} ms",
        f"{found['step']:.1f} ms", f"{found['step'] / found['floor']:.2f}",
        f"{found['GiB']:.1f} GiB", f"{found['lpips']:.0f} ms" if "lpips" in found else "",
    )  # fmt: skip
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return found


def draw(path: Path, by_batch: dict, by_size: dict, batch: int) -> None:
    """Plot seconds per step and memory against the batch size and against the resolution.

    Args:
        by_batch, by_size: dataset -> {batch size or resolution: what `measure` returned}.
        batch: the batch size of by_size.
    """
    from matplotlib.figure import Figure  # late, see options.py
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(12, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col")
    columns = ((by_batch, "batch size"), (by_size, f"resolution, batch size {batch}"))
    for (top, bottom), (series, label) in zip(panels.T, columns, strict=True):
        for dataset, found in series.items():
            x, measured = list(found), found.values()
            top.plot(x, [n["step"] / 1000 for n in measured], "o-", label=dataset)
            bottom.plot(x, [n["GiB"] for n in measured], "o-", label=dataset)
        top.set(xscale="log", yscale="log", ylabel="seconds per training step")
        bottom.set(xscale="log", ylim=(0, None), ylabel="peak memory, GiB", xlabel=label)
        ticks = sorted({x for found in series.values() for x in found})
        bottom.set_xticks(ticks, [str(x) for x in ticks], minor=False)
        bottom.xaxis.set_minor_locator(NullLocator())
        if series:
            top.legend()
        top.grid(alpha=0.3), bottom.grid(alpha=0.3)
    write_figure(path, figure)


def main(config: Config) -> None:
    """Measure, print the table, and plot."""
    datasets = config.datasets or tuple(BATCHES)
    print("| dataset | resolution | batch | F | step | ratio to floor | memory | LPIPS |")
    print("|---|---|---|---|---|---|---|---|")
    by_batch = {
        dataset: {
            n * config.scale: measure(config, dataset, n * config.scale) for n in BATCHES[dataset]
        }
        for dataset in datasets
    }
    by_size = {
        dataset: {n: measure(config, dataset, BATCH * config.scale, n) for n in sizes}
        for dataset, sizes in RESOLUTIONS.items()
        if dataset in datasets
    }
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "digits.png"
        checkpoint = ("--checkpoint", ASSETS / "mnist_generator.safetensors", "--teacher")
        lines = run("sample.py", *checkpoint, "--out", picture, "--device", config.device)
    print("mnist, " + next(line for line in lines if "faster" in line))
    draw(Path(config.out), by_batch, by_size, BATCH * config.scale)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
