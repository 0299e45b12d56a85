"""What the paper's runs cost, by arithmetic: it needs neither weights nor a GPU.

    python benchmarks/cost.py
    python benchmarks/cost.py --tflops 989 --tflops-float32 67      H100

Every network is built on the meta device, which takes no memory, and its floating-point operations
are counted. With B unpaired and R paired images, and K images in the KL gradient, a step costs:

    3 (B + R)    forwards for G
    5 K          forwards for mu_real and mu_fake; K more if the teacher is guided
    B + R + K    more forwards of G and mu_fake with gradient checkpointing
    3 R          forwards of VGG for LPIPS

The first two rows are 11 B forwards if R = K = B (see benchmarks/step.py). Days are those of one
GPU at the given share of its half-precision peak. The pairs of the EDM datasets count at the rate
of float32, because make_pairs.py computes them without --amp. (LPIPS is also float32, but its
convolutions may use TF32, whose rate lies between the two. This is not taken into account.)
"""

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

sys.path.insert(0, str(Path(__file__).parent.parent))

from edm_unet import EDMPrecond
from plumbing.options import Options, option, run_script
from sd_loader import SD15, UNet
from workloads import WORKLOADS, Workload


@dataclass
class Config(Options):
    """The speed of the GPU."""

    tflops: float = option(
        312.0, "peak of the GPU, 10^12 operations per second (A100, bfloat16)", above=0
    )
    tflops_float32: float = option(19.5, "its peak in float32, without TF32 (A100)", above=0)
    utilisation: float = option(0.4, "share of the peak that is reached", above=0)


def flops(network: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Floating-point operations of one forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return counter.get_total_flops()


def forward_flops(dataset: str) -> int:
    """Floating-point operations of the workload's network for one image."""
    with torch.device("meta"):
        x = torch.zeros(1, *WORKLOADS[dataset].image_shape)
        if WORKLOADS[dataset].latent:
            t = torch.zeros(1, dtype=torch.long)
            return flops(UNet(SD15["unet"]), x, t, torch.zeros(1, 77, 768))
        return flops(EDMPrecond(**WORKLOADS[dataset].network).eval(), x, torch.ones(1))


def lpips_flops(workload: Workload) -> int:
    """Operations of LPIPS for one pair of images: two forwards, and a backward to x_ref, which is
    as much as one forward because VGG is frozen."""
    if workload.distance != "lpips":
        return 0
    size = 512 if workload.latent else 224
    with torch.device("meta"):
        return 3 * flops(vgg16().features, torch.zeros(1, 3, size, size))


def step_flops(workload: Workload, forward: int) -> int:
    """Operations of one training step over all GPUs."""
    B, R = workload.batch_size, workload.batch_size_ref
    K = B + R if workload.kl_on_pairs else B
    recomputed = B + R + K if workload.latent else 0
    guided = K if workload.guidance != 1 else 0
    forwards = 3 * (B + R) + 5 * K + guided + recomputed
    return forwards * forward + R * lpips_flops(workload)


def pairs_flops(workload: Workload, forward: int) -> int:
    """Operations of all ODE solutions by the teacher."""
    steps = workload.solver_steps
    evaluations = 2 * steps - 1 if workload.solver == "heun" else 2 * (steps + 1)
    return workload.num_pairs * evaluations * forward


def main(config: Config) -> None:
    """Print the table."""
    per_day = 1e12 * config.utilisation * 86400  # operations, for each TFLOP/s of the peak
    peaks = f"{config.tflops:g} TFLOP/s (float32: {config.tflops_float32:g})"
    print(f"{peaks} at {config.utilisation:.0%}")
    print(f"{'':16}{'forward':>12}{'step':>15}{'steps':>9}{'pairs':>12}{'training':>12}")
    for dataset, workload in WORKLOADS.items():
        if not workload.network:  # `edm`, whose network is in a file
            continue
        forward = forward_flops(dataset)
        step = step_flops(workload, forward)
        ends = [end for end, _ in workload.phases] or [workload.steps]
        all_steps = sum(
            (end - start) * step_flops(workload.at(start), forward)
            for start, end in pairwise([0, *ends])
        )
        peak = config.tflops if workload.latent else config.tflops_float32  # of the pairs
        pairs_days = pairs_flops(workload, forward) / (peak * per_day)
        training_days = all_steps / (config.tflops * per_day)
        print(
            f"{dataset:16}{forward / 1e9:8.1f} GFLOP{step / 1e12:9.1f} TFLOP{workload.steps:9d}"
            f"{pairs_days:7.2f} days{training_days:7.2f} days"
        )


if __name__ == "__main__":
    run_script(main, Config, __doc__)
