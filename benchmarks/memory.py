"""Estimate how much memory of a GPU a training step takes, and what fits where. It needs no GPU.

    python benchmarks/memory.py                                20 minutes on a CPU core
    python benchmarks/memory.py --gpus 8 --tflops 71           on eight GPUs of another kind

train.py's `training_step` runs with networks of full size on tensors without data (PyTorch's
FakeTensorMode), while every tensor's memory is counted from allocation to release. CUDA's autocast
is imitated where it differs from the CPU's: group norms, layer norms and upsampling are in float32
there, and the norms work on contiguous copies.

With several GPUs, DistributedDataParallel's buckets hold the gradients of both networks all the
time. With --accumulate, the gradients of the first parts stand beside them. With --shard-optimizer,
each GPU holds its share of AdamW's state. The samples of all parts are kept until mu_fake has
learnt from them.

Left out are the CUDA context, the workspace of cuDNN and cuBLAS, NCCL's buffers and what the
allocator cannot use. Therefore a card must hold the estimate, --slack of it and --context. fp16
takes as much as bf16.

The first table has a step's peak in GiB for parts of several sizes on one GPU. The second has the
smallest --accumulate with which a run fits, with the disk and days that it needs (see cost.py).
"""

import bisect
import contextlib
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from benchmarks import cost
from dmd_loss import l2_distance, lpips_distance
from edm_unet import EDMPrecond
from plumbing.devices import Ranks
from plumbing.options import option, run_script
from sd_loader import NETWORKS, SD15, SDTeacher, StableDiffusion
from teachers import EDMTeacher, Teacher
from workloads import WORKLOADS, Workload, get_workload

GiB = 2**30
CARDS = {16: 15, 24: 22, 40: 39, 80: 79}  # GB as sold: GiB that the least of them has
# The first table: dataset, decoder, unpaired and paired samples of a part.
PARTS = [
    ("mnist", "tiny", [(16, 4)]),
    ("cifar10", "tiny", [(8, 8), (28, 28), (56, 56)]),
    ("imagenet64", "tiny", [(4, 4), (12, 12), (24, 24), (48, 48)]),
    ("sd15", "tiny", [(2, 1), (8, 4), (32, 16)]),
    ("sd15", "full", [(4, 1), (16, 4)]),
]
# What CUDA's autocast computes in float32, but the CPU's does not (of what our networks use).
IN_FLOAT32 = {name: getattr(F, name) for name in ("group_norm", "layer_norm", "interpolate")}


@dataclass
class Config(cost.Config):
    """What a card must hold besides the estimate. The other options are those of cost.py."""

    slack: float = option(0.1, "share of the estimate that the allocator cannot use", least=0)
    context: float = option(1.0, "GiB of the CUDA context and of all libraries", least=0)


# --------------------------------------------------------------------------------------------------
# Tensors without data


class NoData(FakeTensorMode):
    """FakeTensorMode whose tensors can be copied with copy.deepcopy."""

    def __deepcopy__(self, memo: dict) -> "NoData":
        return self


def replace_tensors(module: nn.Module, *where, device=None, memory_format=None) -> nn.Module:
    """nn.Module.to, which PyTorch does not have for parameters without data."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:  # no bias
                    continue
                new = tensor.detach()
                for target in filter(None, (*where, device)):  # a device or a type
                    new = new.to(target)
                if memory_format and new.ndim == 4:
                    new = new.contiguous(memory_format=memory_format)
                if tensors is part._parameters:
                    new = nn.Parameter(new, tensor.requires_grad)
                tensors[name] = new
    return module


def as_on_a_gpu(function: Callable) -> Callable:
    """One of F's functions in IN_FLOAT32 as CUDA and its autocast compute it."""

    def call(*given, **named):
        if torch.is_autocast_enabled("cpu"):
            given, named = tree_map_only(Tensor, Tensor.float, (given, named))
        x, *others = given
        if function is not F.interpolate:  # CUDA's norms do not know channels-last
            x = x.contiguous()
        with torch.autocast("cpu", enabled=False):
            return function(x, *others, **named)

    return call


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Make all tensors in this block have a shape, type and device but no data."""
    with NoData(), mock.patch.object(nn.Module, "to", replace_tensors):
        yield


class Storages(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is active, and still exist."""

    def __init__(self):
        super().__init__()
        self.known, self.bytes, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed. CUDA's allocator hands out units of 512 bytes."""
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            size = math.ceil(storage.nbytes() / 512) * 512
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.remove, storage._cdata, size)

    def remove(self, key: int, size: int) -> None:
        """Count a storage no longer."""
        self.known.remove(key)
        self.bytes -= size


# --------------------------------------------------------------------------------------------------
# A step without data


def teacher_of(workload: Workload) -> Teacher:
    """The workload's teacher, in full size."""
    if not workload.latent:
        return EDMTeacher(EDMPrecond(**workload.network), {})
    parts = ["unet", "text_encoder", "vae" if workload.decoder == "full" else "tiny_vae"]
    sd = StableDiffusion(**{part: NETWORKS[part](SD15[part]).eval() for part in parts})
    sd.tokenizer = lambda prompts: torch.zeros(len(prompts), 77, dtype=torch.long)
    for part in parts[1:]:
        getattr(sd, part).requires_grad_(False)
    return SDTeacher(sd, {}, workload.guidance, workload.decoder)


def distance_of(workload: Workload, device: torch.device) -> Callable:
    """The distance of Eq. 9."""
    if workload.distance == "l2":
        return l2_distance
    from lpips import LPIPS  # here: slow to import

    network = LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    return partial(lpips_distance, network.requires_grad_(False).to(device))


def draw_batch(run: train.Run, step: int, rows: range, rows_ref: range) -> train.Batch:
    """train.draw_batch, but nothing is drawn."""
    config, teacher, B, R = run.config, run.teacher, len(rows), len(rows_ref)
    device, K = run.ranks.device, B + R if config.kl_on_pairs else B
    z, z_ref, y_ref, noise, noise_fake = (
        torch.empty(n, *teacher.image_shape, device=device).to(memory_format=torch.channels_last)
        for n in (B, R, R, K, K)
    )
    t = torch.zeros(K, dtype=torch.long, device=device)
    cond = torch.zeros(B + R, dtype=torch.long, device=device) if teacher.num_classes else None
    if config.latent:
        tokens = torch.zeros(B + R, 77, dtype=torch.long, device=device)
        cond = teacher.sd.text_encoder(tokens).float()
    return train.Batch(z, z_ref, y_ref, cond, t, noise, t, noise_fake)


def make_run(workload: Workload, device: torch.device) -> train.Run:
    """What train.py has before its first step. It must be called without_data."""
    inputs = teacher_of(workload), None, distance_of(workload, device)
    return train.prepare(Ranks(0, 1, device), workload, *inputs)


@cache
def peak(
    dataset: str, B: int, R: int, *, parts: int = 1, decoder: str = "tiny", amp: str = "bf16",
    distance: str | None = None, several: bool = False,
) -> float:  # fmt: skip
    """Peak memory of a step in GiB on one GPU, or on each of several. The GPU's B unpaired and R
    paired samples come in this many parts. `distance` is the workload's unless it is given."""
    run_parts = min(parts, 2)  # further ones only add their samples
    sizes = (B // parts, R // parts)
    workload = get_workload(
        dataset, batch_size=run_parts * sizes[0], batch_size_ref=run_parts * sizes[1],
        decoder=decoder, amp=amp, accumulate=run_parts, distance=distance,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_data())
        storages = stack.enter_context(Storages())
        stack.enter_context(mock.patch.object(train, "draw_batch", draw_batch))
        for name, function in IN_FLOAT32.items():
            stack.enter_context(mock.patch.object(F, name, as_on_a_gpu(function)))
        run = make_run(replace(workload, phases=()), torch.device("cpu"))
        before = storages.bytes
        batch = draw_batch(run, 0, *map(range, sizes))
        samples = storages.bytes - before + batch.noise.nbytes  # and x, in the shape of the noise
        del batch
        buckets = []
        for learner in (run.G, run.mu_fake):
            for parameter in learner.parameters:  # a first step makes AdamW's state
                parameter.grad = torch.zeros_like(parameter)
            learner.step(0)
            if several:
                buckets += [torch.zeros_like(parameter) for parameter in learner.parameters]
            if several and parts == 1:  # otherwise the first parts have gradients of their own
                for parameter in learner.parameters:
                    parameter.register_post_accumulate_grad_hook(forget_gradient)
        storages.peak = 0
        train.training_step(run, 1)
    return (storages.peak + (parts - run_parts) * samples) / GiB


def forget_gradient(parameter: Tensor) -> None:
    """Drop a gradient, which is in a bucket now."""
    parameter.grad = None


# --------------------------------------------------------------------------------------------------
# What fits


def smallest(workload: Workload, gpus: int, room: float) -> int | None:
    """The smallest --accumulate with which all phases of a run fit, or None. From two parts on, in
    which gradients are kept from part to part, more need less memory: it is found by bisection."""
    phases = [workload.at(start) for start in (0, *(end for end, _ in workload.phases[:-1]))]
    stages = {(phase.batch_size, phase.batch_size_ref, phase.decoder) for phase in phases}
    samples = math.gcd(*(size for stage in stages for size in stage[:2]))

    def fits_in(n: int) -> bool:
        sizes = ((B // gpus, R // gpus, decoder) for B, R, decoder in stages)
        how = {"parts": n, "several": gpus > 1}
        return all(
            peak(workload.dataset, B, R, decoder=decoder, **how) <= room for B, R, decoder in sizes
        )

    parts = [n for n in range(1, samples + 1) if samples % (n * gpus) == 0]
    if parts and fits_in(1):
        return 1
    first = bisect.bisect_left(parts, True, lo=1, key=fits_in)
    return parts[first] if first < len(parts) else None


def cell(dataset: str, gpus: int, card: float, config: Config) -> str:
    """What makes a run fit on cards of this many GiB."""
    workload, parameters = WORKLOADS[dataset], cost.build(dataset).parameters()
    state = 2 * 8 * sum(p.numel() for p in parameters) / GiB  # AdamW's, of G and of mu_fake
    for freed, how in ((0.0, ""), (state * (1 - 1 / gpus), ", sharded")):
        room = (card - config.context) / (1 + config.slack) + freed  # GiB
        if n := smallest(workload, gpus, room):
            return f"{n}{how}"
    return "no"


def print_parts() -> None:
    """Print the first table."""
    print("| dataset | samples of a part | float32 | half precision |\n|---|---|---|---|")
    for dataset, decoder, sizes in PARTS:
        name = f"{dataset}, {decoder} decoder" if WORKLOADS[dataset].latent else dataset
        for B, R in sizes:
            needed = (peak(dataset, B, R, decoder=decoder, amp=amp) for amp in ("off", "bf16"))
            peaks = " | ".join(f"{value:.1f}" for value in needed)
            print(f"| {name} | {B} + {R} | {peaks} |", flush=True)


def print_fits(config: Config) -> None:
    """Print the second table."""
    cards = " | ".join(f"{card} GB" for card in CARDS)
    print(f"\n| dataset | GPUs | {cards} | GB of disk | days |\n{'|---' * (len(CARDS) + 4)}|")
    for dataset, papers in cost.GPUS.items():
        needs = cost.demands(dataset, config)
        disk = needs["GB of pairs"][0] + 2 * needs["GB of a save"][0]
        for gpus in (1, config.gpus or papers):
            cells = " | ".join(cell(dataset, gpus, card, config) for card in CARDS.values())
            days = float(f"{sum(cost.days(dataset, config)) / gpus:.2g}")
            print(f"| {dataset} | {gpus} | {cells} | {disk:.0f} | {days:g} |", flush=True)


def main(config: Config) -> None:
    """Print both tables."""
    print_parts()
    print_fits(config)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
