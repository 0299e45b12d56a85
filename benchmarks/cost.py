"""What the paper's runs cost and what they ask of a machine, by arithmetic. It needs neither
weights nor a GPU.

    python benchmarks/cost.py
    python benchmarks/cost.py --tflops 989 --tflops-tf32 495 --tflops-float32 67      H100

Every network is built on the meta device, which takes no memory, and its floating-point operations
are counted. With B unpaired and R paired images, and K images in the KL gradient, a step costs:

    3 (B + R)    forwards for G
    5 K          forwards for mu_real and mu_fake; K more if the teacher is guided
    B + R + K    more forwards of G and mu_fake with gradient checkpointing
    3 R          forwards of VGG for LPIPS

The first two rows are 11 B forwards if R = K = B (see benchmarks/step.py). Days are those of one
GPU at the given share of its peak: in half precision, but TF32 for LPIPS, and float32 for the pairs
of the EDM datasets, which make_pairs.py computes without --amp.

The second table is about a machine, for the paper's number of GPUs. `demands` says what it counts.
"""

import math
import sys
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

sys.path.insert(0, str(Path(__file__).parent.parent))

from edm_unet import EDMPrecond
from plumbing.options import Options, option, run_script
from plumbing.pairs import OPEN_SHARDS
from sd_loader import SD15, UNet
from workloads import WORKLOADS, Workload

# The paper's number of GPUs (Appendix B), each with one rank.
GPUS = {"cifar10": 7, "cifar10-uncond": 7, "imagenet64": 7, "sd15": 72, "sd15-guidance8": 80}
MAPS, DESCRIPTORS = 1, 0  # of an open shard: safetensors maps a file and closes it
PROMPT = 300  # bytes; a prompt of 75 tokens has about as many


@dataclass
class Config(Options):
    """The speed of the GPUs, and what a machine has for each of them."""

    tflops: float = option(
        312.0, "peak of the GPU, 10^12 operations per second (A100, bfloat16)", above=0
    )
    tflops_tf32: float = option(156.0, "its peak in TF32 (A100)", above=0)
    tflops_float32: float = option(19.5, "its peak in float32, without TF32 (A100)", above=0)
    utilisation: float = option(0.4, "share of the peak that is reached", above=0)
    gpus: int = option(0, "number of GPUs in the second table; 0: the paper's", least=0)
    disk: float = option(1.0, "GB per second from a GPU to a file", above=0)
    network: float = option(10.0, "GB per second between GPUs (NCCL broadcast)", above=0)
    host_memory: float = option(64.0, "GB of host memory for each GPU", above=0)
    notice: float = option(30.0, "seconds from SIGTERM to SIGKILL", above=0)

    def seconds(self, half: float = 0, tf32: float = 0, float32: float = 0) -> float:
        """How long one GPU needs for this many operations of each precision."""
        time = half / self.tflops + tf32 / self.tflops_tf32 + float32 / self.tflops_float32
        return time / (1e12 * self.utilisation)


def flops(network: nn.Module, *inputs: torch.Tensor) -> int:
    """Floating-point operations of one forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return counter.get_total_flops()


@cache
def build(dataset: str) -> nn.Module:
    """The workload's network, without memory."""
    with torch.device("meta"):
        if WORKLOADS[dataset].latent:
            return UNet(SD15["unet"])
        return EDMPrecond(**WORKLOADS[dataset].network).eval()


@cache
def forward_flops(dataset: str) -> int:
    """Floating-point operations of the workload's network for one image."""
    with torch.device("meta"):
        x, t = torch.zeros(1, *WORKLOADS[dataset].image_shape), torch.ones(1)
        text = [torch.zeros(1, 77, 768)] if WORKLOADS[dataset].latent else []
        return flops(build(dataset), x, t, *text)


@cache
def lpips_flops(size: int) -> int:
    """Operations of LPIPS for one pair of images: two forwards, and a backward to x_ref, which is
    as much as one forward because VGG is frozen."""
    with torch.device("meta"):
        return 3 * flops(vgg16().features, torch.zeros(1, 3, size, size))


def step_flops(workload: Workload, forward: int) -> tuple[int, int]:
    """Operations of one training step over all GPUs: of the networks, and of LPIPS."""
    B, R = workload.batch_size, workload.batch_size_ref
    K = B + R if workload.kl_on_pairs else B
    recomputed = B + R + K if workload.latent else 0
    guided = K if workload.guidance != 1 else 0
    forwards = 3 * (B + R) + 5 * K + guided + recomputed
    lpips = R * lpips_flops(512 if workload.latent else 224) if workload.distance == "lpips" else 0
    return forwards * forward, lpips


def pairs_flops(workload: Workload, forward: int) -> int:
    """Operations of all ODE solutions by the teacher."""
    steps = workload.solver_steps
    evaluations = 2 * steps - 1 if workload.solver == "heun" else 2 * (steps + 1)
    return workload.num_pairs * evaluations * forward


def days(dataset: str, config: Config) -> tuple[float, float]:
    """Days of one GPU, for the pairs and for the training."""
    workload, forward = WORKLOADS[dataset], forward_flops(dataset)
    pairs = config.seconds(
        **{"half" if workload.latent else "float32": pairs_flops(workload, forward)}
    )
    ends = [end for end, _ in workload.phases] or [workload.steps]
    training = sum(
        (end - start) * config.seconds(*step_flops(workload.at(start), forward))
        for start, end in pairwise([0, *ends])
    )
    return pairs / 86400, training / 86400


def print_costs(config: Config) -> None:
    """Print the operations of each workload, and the days of one GPU."""
    peaks = f"{config.tflops:g} TFLOP/s (TF32: {config.tflops_tf32:g}, float32: "
    print(f"{peaks}{config.tflops_float32:g}) at {config.utilisation:.0%}")
    print(f"{'':16}{'forward':>12}{'step':>15}{'steps':>9}{'pairs':>12}{'training':>12}")
    for dataset, workload in WORKLOADS.items():
        if not workload.network:  # `edm`, whose network is in a file
            continue
        forward, (pairs, training) = forward_flops(dataset), days(dataset, config)
        print(
            f"{dataset:16}{forward / 1e9:8.1f} GFLOP"
            f"{sum(step_flops(workload, forward)) / 1e12:9.1f} TFLOP{workload.steps:9d}"
            f"{pairs:7.2f} days{training:7.2f} days"
        )


def pairs_bytes(workload: Workload, files: int) -> int:
    """Bytes of all pairs on disk. Each has y, k and its class or prompt. Each file has one z."""
    numbers = math.prod(workload.image_shape)
    y, text = (2, PROMPT) if workload.latent else (4, 0)
    labels = 8 if workload.network["label_dim"] else 0
    return workload.num_pairs * (numbers * y + 8 + labels + text) + files * numbers * 4


def demands(dataset: str, config: Config) -> dict[str, tuple]:
    """What a workload asks of a machine: {what: (number, its usual limit or None)}.

    Files: for a parameter, a checkpoint takes 24 bytes (G, mu_fake, and AdamW's two moments of
    each), and the generator, which is saved after it, 4. Only their bytes are counted as time.
    --shard-optimizer first sends the moments, 16 bytes, to rank 0.

    Host memory: rank 0 needs most. For a parameter, it takes 12 bytes at the start, when teacher, G
    and mu_fake are not on the GPU yet, and again at a save, when the generator is three times in
    memory (twice in newer versions of safetensors). Sharded moments are 16 more. An open shard
    takes its prompts, as Python's strings. Left out are the libraries, the batches (megabytes)
    and sd15's text encoder and decoders (below 1 GB, at the start).

    SIGTERM: it comes when a step has just begun, and that step is finished first. If the process is
    killed instead, the steps since the last checkpoint are lost.
    """
    workload, gpus = WORKLOADS[dataset], config.gpus or GPUS[dataset]
    billions = sum(parameter.numel() for parameter in build(dataset).parameters()) / 1e9
    files = math.ceil(workload.num_pairs / workload.shard_size)
    open_shards = min(files, OPEN_SHARDS)
    prompts = open_shards * workload.shard_size * PROMPT / 1e9 if workload.latent else 0
    step = config.seconds(*step_flops(workload, forward_flops(dataset))) / gpus
    lost = min(workload.save_minutes, workload.save_every * step / 60)
    rows = {
        "GPUs": (gpus, None),
        "files of pairs": (files, None),
        "GB of pairs": (pairs_bytes(workload, files) / 1e9, None),
        "memory maps of a rank's shards": (MAPS * open_shards, 65_530),
        "descriptors of a rank's shards": (DESCRIPTORS * open_shards, 1024),
        "minutes lost if killed": (lost, None),
        "GB of a save": (28 * billions, None),
    }
    for how, moments in (("", 0), (", `--shard-optimizer`", 16 * billions)):
        host, gather = prompts + 12 * billions + moments, moments / config.network
        save, checkpoint = (gather + each * billions / config.disk for each in (28, 24))
        rows[f"GB of host memory, rank 0{how}"] = (host, config.host_memory)
        rows[f"seconds of a save{how}"] = (save, None)
        rows[f"seconds from SIGTERM to a checkpoint{how}"] = (step + checkpoint, config.notice)
    return rows


def print_demands(config: Config) -> None:
    """Print what the workloads ask of a machine, as a table in Markdown."""

    def cell(value: float | None, limit: float | None = None) -> str:
        shown = "" if value is None else f"{value:,.1f}".removesuffix(".0")
        return shown if limit is None or value <= limit else f"{shown} (beyond)"

    columns = [demands(dataset, config) for dataset in GPUS]
    print(f"\n| | {' | '.join(GPUS)} | usual limit |\n{'|---' * (len(GPUS) + 2)}|")
    for name, (_, limit) in columns[0].items():
        cells = [cell(*column[name]) for column in columns]
        print(f"| {' | '.join([name, *cells, cell(limit)])} |")


def main(config: Config) -> None:
    """Print both tables."""
    print_costs(config)
    print_demands(config)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
