"""Time a training step against its arithmetic floor, and what LPIPS adds to it.

    python benchmarks/step.py --dataset mnist --batch-size 32
    python benchmarks/step.py --dataset imagenet64 --batch-size 48 --amp bf16 --compile

It runs train.py's `training_step`, including the random draws and the reading of pairs. The weights
and the pairs are random. Let F(n) be the time of one forward of the teacher on n images. If a
backward counts as two forwards, a step with B unpaired and R paired images costs
3 F(B + R) + 5 F(B):

    G on B + R images, forward and backward       3 F(B + R)
    teacher and mu_fake on B images, forward      2 F(B)
    mu_fake on B images, forward and backward     3 F(B)

LPIPS (VGG at 224x224, random weights) is timed separately. Memory is the peak of the GPU's or, on a
CPU, that of the process, which includes Python and PyTorch. The last line it prints:

    F(32) 33.9 ms, step 394.8 ms, floor 372.8 ms, ratio 1.06
"""

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from dmd_loss import lpips_distance
from edm_unet import EDMPrecond
from plumbing.devices import AMP, Ranks, pick_device, to
from plumbing.files import file_hash, write_json, write_tensors
from plumbing.options import Options, UserError, option, run_script
from plumbing.pairs import shards
from workloads import WORKLOADS, Workload, get_workload

DATASETS = tuple(name for name, row in WORKLOADS.items() if row.network and not row.latent)


@dataclass
class Config(Options):
    """What to measure, and how."""

    dataset: str = option("mnist", "the dataset whose networks are timed", DATASETS)
    batch_size: int = option(32, "B: unpaired images; R is in proportion to the dataset's", least=1)
    resolution: int | None = option(None, "of the images (default: the dataset's)")
    repeats: int = option(15, "steps and forwards to time, in turn; medians count", least=1)
    amp: str = option("off", "half precision: auto, bf16, fp16, off", AMP)
    compile: bool = option(False, "torch.compile the networks")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    json: str | None = option(None, "write the numbers to this file")


def write_inputs(folder: Path, workload: Workload) -> dict[str, str]:
    """Write a teacher and 64 pairs, all random -> the run's options teacher, pairs and out."""
    teacher, dataset = folder / "teacher.safetensors", workload.dataset
    torch.manual_seed(0)
    net = EDMPrecond(**workload.network)
    metadata = {"kwargs": json.dumps(net.kwargs)}
    write_tensors(teacher, net.state_dict(), metadata)
    record = {"name": teacher.name, "sha256": file_hash(teacher)}
    meta = {"dataset": dataset, "teacher": record, "guidance": 1.0}
    meta |= {"num_pairs": 64, "shard_size": 64, "seed": 0}
    write_json(folder / "pairs" / "meta.json", meta)
    tensors = {name: torch.randn(64, *workload.image_shape) for name in ("z", "y")}
    if classes := workload.network["label_dim"]:
        tensors["cond"] = torch.arange(64) % classes
    write_tensors(shards(folder / "pairs", meta)[0][0], tensors, {})
    return {"teacher": str(teacher), "pairs": str(folder / "pairs"), "out": str(folder / "run")}


def sizes(workload: Workload) -> tuple[int, int]:
    """B, the number of unpaired images, and B + R, that of all."""
    return workload.batch_size, workload.batch_size + workload.batch_size_ref


def milliseconds(function: Callable, device: torch.device) -> float:
    """The time of one call, until the device has finished."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000


def peak_memory(device: torch.device) -> float:
    """Peak memory of the GPU, or of this process, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def measure(config: Config, folder: Path, workload: Workload) -> dict[str, float]:
    """Time forwards and steps in turn, so that a change of the machine's speed affects both.

    Returns:
        medians in milliseconds, "forward" (of B images), "floor" and "step" (and "lpips" if the
        dataset uses it), and the peak memory, "GiB".
    """
    device, B, total = pick_device(config.device), *sizes(workload)
    workload = replace(
        workload, distance="l2", amp=config.amp, compile=config.compile,
        **write_inputs(folder, workload),
    )  # fmt: skip
    ranks = Ranks(0, 1, device)
    run = train.prepare(ranks, *train.load_inputs(workload, ranks))
    x = torch.randn(total, *workload.image_shape)
    classes = workload.network["label_dim"]
    cond = torch.arange(total) % classes if classes else None
    x, t, cond = to(device, x, torch.full((total,), 500), cond)

    @torch.no_grad()
    def forward(n):
        with run.autocast():
            run.teacher.mu_real(x[:n], t[:n], None if cond is None else cond[:n])

    def step():
        train.training_step(run, step.count)
        step.count += 1

    step.count = 0
    timed = (partial(forward, B), partial(forward, total), step)
    for function in 2 * timed:
        function()
    if device.type == "cuda":  # cuDNN's search for algorithms, which takes memory, is over
        torch.cuda.reset_peak_memory_stats(device)
    times = [[milliseconds(function, device) for function in timed] for _ in range(config.repeats)]
    F, F_total, taken = (statistics.median(values) for values in zip(*times, strict=True))
    found = {"forward": F, "floor": 3 * F_total + 5 * F, "step": taken, "GiB": peak_memory(device)}
    if WORKLOADS[config.dataset].distance == "lpips":
        found["lpips"] = lpips_time(x[:B], device, config.repeats)
    return found


def main(config: Config) -> None:
    """Measure and print."""
    workload = get_workload(config.dataset, batch_size=config.batch_size)
    size = workload.image_shape[-1] if config.resolution is None else config.resolution
    # The network halves the resolution at every level but the first.
    least = 2 ** (len(workload.network["channel_mult"]) - 1)
    if size < least or size % least:
        raise UserError(f"--resolution must be a multiple of {least}, not {size}")
    workload = replace(workload, network=workload.network | {"img_resolution": size})
    with tempfile.TemporaryDirectory() as folder:
        found = measure(config, Path(folder), workload)
    if config.json is not None:
        write_json(Path(config.json), found)
    floor, taken = found["floor"], found["step"]
    B, device = workload.batch_size, pick_device(config.device)
    print(
        f"{config.dataset}, {size}x{size}, batch {B} + {workload.batch_size_ref}, {device}, "
        f"amp {config.amp}, compile {config.compile}; peak memory {found['GiB']:.1f} GiB"
    )
    if "lpips" in found:
        print(f"LPIPS, forward and backward: {found['lpips']:.1f} ms")
    print(
        f"F({B}) {found['forward']:.1f} ms, step {taken:.1f} ms, floor {floor:.1f} ms, "
        f"ratio {taken / floor:.2f}"
    )


def lpips_time(x: torch.Tensor, device: torch.device, repeats: int) -> float:
    """Milliseconds that the regression loss with LPIPS on images x takes, with its gradient."""
    from lpips import LPIPS  # slow to import, and not needed for MNIST

    network = LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    network, x_ref = network.to(device), x.clone().requires_grad_(True)

    def loss():
        lpips_distance(network, x_ref, x).mean().backward()

    loss()
    return statistics.median(milliseconds(loss, device) for _ in range(min(repeats, 5)))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
