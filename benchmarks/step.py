"""Time a training step against its arithmetic floor, and what LPIPS adds to it.

    python benchmarks/step.py --dataset mnist --batch-size 32
    python benchmarks/step.py --dataset imagenet64 --batch-size 48 --amp bf16 --compile

It runs train.py's own `training_step`, random draws and reading of pairs included, on random
weights and pairs in a temporary folder. With F the time of one teacher forward on B images, a step
with B unpaired and B paired images costs 11 F of arithmetic, counting a backward as two forwards:

    G on 2B images, forward and backward     6 F
    teacher and mu_fake, forward             2 F
    mu_fake, forward and backward            3 F

LPIPS (VGG at 224x224, random weights) is timed apart. The last line it prints:

    F 21.3 ms, step 260.1 ms, floor 234.3 ms, ratio 1.11
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from devices import AMP, Ranks, pick_amp, pick_device
from dmd_loss import lpips_distance
from edm_unet import EDMPrecond
from edm_weights import EDM_ARCHITECTURES
from pairs import shard_path
from rundir import UserError, option, run_script, write_json, write_tensors
from workloads import MNIST_TEACHER_KWARGS, file_hash, get_workload

NETWORKS = {"mnist": MNIST_TEACHER_KWARGS, **EDM_ARCHITECTURES}


@dataclass
class Config:
    dataset: str = option("mnist", "whose networks", tuple(NETWORKS))
    batch_size: int = option(32, "B, unpaired and paired images each")
    repeats: int = option(15, "steps and forwards measured, in turn; the medians count")
    amp: str = option("off", "half precision: auto, bf16, fp16, off", AMP)
    compile: bool = option(False, "torch.compile the networks")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")


def write_inputs(folder: Path, dataset: str) -> dict[str, str]:
    """A teacher of random weights and 64 pairs of noise -> options of train.Config."""
    workload, teacher = get_workload(dataset), folder / "teacher.safetensors"
    torch.manual_seed(0)
    net = EDMPrecond(**NETWORKS[dataset])
    metadata = {"kwargs": json.dumps(net.kwargs)}
    write_tensors(teacher, net.state_dict(), metadata)
    record = {"name": teacher.name, "sha256": file_hash(teacher)}
    meta = {"dataset": dataset, "teacher": record, "guidance": 1.0}
    write_json(folder / "pairs" / "meta.json", meta | {"num_pairs": 64, "shard_size": 64})
    tensors = {name: torch.randn(64, *workload.image_shape) for name in ("z", "y")}
    if workload.num_classes:
        tensors["cond"] = torch.arange(64) % workload.num_classes
    write_tensors(shard_path(folder / "pairs", 0), tensors, {})
    return {"teacher": str(teacher), "pairs": str(folder / "pairs"), "out": str(folder / "run")}


def milliseconds(function: Callable, device: torch.device) -> float:
    """How long one call takes, until the device has done its work."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000


def main(config: Config) -> None:
    """Measure forwards and steps in turn, so that both see the same machine."""
    if config.batch_size < 1 or config.repeats < 1:
        raise UserError("--batch-size and --repeats must be at least 1")
    device, B = pick_device(config.device), config.batch_size
    ranks, workload = Ranks(0, 1, device), get_workload(config.dataset)
    with tempfile.TemporaryDirectory() as folder:
        options = train.Config(
            dataset=config.dataset, batch_size=B, batch_size_ref=B, distance="l2",
            amp=pick_amp(config.amp, device), compile=config.compile,
            **write_inputs(Path(folder), config.dataset),
        )  # fmt: skip
        run = train.prepare(train.resolve(options, ranks), ranks)
        x = torch.randn(B, *workload.image_shape)
        x, t = train.to(device, x, torch.full((B,), 500))
        cond = (
            torch.arange(B, device=device) % workload.num_classes if workload.num_classes else None
        )

        @torch.no_grad()
        def forward():
            with run.autocast():
                run.teacher.mu_real(x, t, cond)

        def step():
            train.training_step(run, step.count)
            step.count += 1

        step.count = 0
        for _ in range(3):
            forward(), step()
        pairs = (
            (milliseconds(forward, device), milliseconds(step, device))
            for _ in range(config.repeats)
        )
        F, total = (statistics.median(values) for values in zip(*pairs, strict=True))
    print(f"{config.dataset}, batch {B}, {device}, amp {config.amp}, compile {config.compile}")
    if workload.distance == "lpips":
        print(f"LPIPS, forward and backward: {lpips_time(x, device, config.repeats):.1f} ms")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    print(f"F {F:.1f} ms, step {total:.1f} ms, floor {11 * F:.1f} ms, ratio {total / (11 * F):.2f}")


def lpips_time(x: torch.Tensor, device: torch.device, repeats: int) -> float:
    """Milliseconds of the LPIPS regression loss on images x, with its gradient."""
    from lpips import LPIPS  # slow to import, and not needed for MNIST

    network = LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    network, x_ref = network.to(device), x.clone().requires_grad_(True)

    def loss():
        lpips_distance(network, x_ref, x).mean().backward()

    loss()
    return statistics.median(milliseconds(loss, device) for _ in range(min(repeats, 5)))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
