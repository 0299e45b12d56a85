"""Where the work runs: on which device, in which precision, and in how many processes.

    python train.py ...                                one process
    torchrun --nproc-per-node 8 train.py ...           eight, one for each GPU (or on the CPU)
    torchrun --nnodes 9 --nproc-per-node 8 ... train.py ...       72 GPUs of nine machines

A *rank* is the number of one of these processes. Rank 0 writes files; the
others only compute (but for the pairs, of which each writes its own shards).
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from plumbing.options import UserError

AMP = ("auto", "bf16", "fp16", "off")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def pick_device(name: str) -> torch.device:
    """ "auto" -> the GPU if there is one, else the CPU; "cpu", "cuda", "cuda:1", ... as given.

    From here on float32 is float32: unless told otherwise, the convolutions of A100s and newer GPUs
    round their inputs to TF32, 10 bits.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64)  # the solvers', which Apple's mps lacks
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}); try --device cpu") from None
    return device


def to(device: torch.device, *tensors: Tensor | None) -> list[Tensor | None]:
    """Bring tensors to the device, images in channels-last layout."""

    def move(x: Tensor | None) -> Tensor | None:
        layout = torch.channels_last if x is not None and x.ndim == 4 else torch.preserve_format
        return None if x is None else x.to(device, memory_format=layout)

    return [move(x) for x in tensors]


def pick_amp(name: str, device: torch.device, half: str = "bf16") -> str:
    """ "auto" -> on a GPU `half`, or "fp16" if it has no bf16; "off" elsewhere."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "off"
    return half if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """A context in which networks compute in half precision; their weights stay float32."""
    return torch.autocast(device.type, DTYPES[amp], enabled=amp != "off")


# --------------------------------------------------------------------------------------------------
# Processes


def share(n: int, part: int, parts: int) -> range:
    """One of the consecutive parts of 0 .. n-1; they are equally long if their number divides n."""
    return range(n * part // parts, n * (part + 1) // parts)


@dataclass(frozen=True)
class Ranks:
    """This process among those that do one job together."""

    rank: int  # its number, 0 .. count-1
    count: int  # how many there are
    device: torch.device  # where it works

    def share(self, n: int) -> range:
        """This rank's part of 0 .. n-1: consecutive, and equal for all ranks if count divides n."""
        return share(n, self.rank, self.count)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.count > 1:
            with others_alive():
                dist.barrier()

    @contextlib.contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Rank 0 runs the block alone, then the others: what it downloads is there for them."""
        if self.rank > 0:
            self.barrier()
        yield
        if self.rank == 0:
            self.barrier()

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks of a tensor of equal shape, on every rank."""
        if self.count > 1:
            x = x.clone()
            with others_alive():
                dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. (A CPU tensor: the GPU need not be waited for.)"""
        return self.sum(torch.tensor(int(flag))).item() > 0

    def agree(self, number: int) -> bool:
        """Whether all ranks have this number."""
        return not self.any(self.sum(torch.tensor(int(number))).item() != number * self.count)


@contextlib.contextmanager
def others_alive() -> Iterator[None]:
    """A rank that has failed says why itself; the others, who wait for it, say just this. What went
    wrong on this rank (a CUDA error shows up at the next wait) is left as it is."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"[Cc]onnection|Broken pipe|pair closure|remote process", str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"another rank has failed, see its message ({reason})") from error


def join_ranks(device: str) -> Ranks:
    """Find out from torchrun's environment who this process is, and meet the others. The device is
    as for pick_device; with several ranks "auto" and "cuda" are each rank's own GPU."""
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if count == 1:
        return Ranks(0, 1, pick_device(device))
    if "LOCAL_RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set, but not by torchrun; start several processes with it")
    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # before anything is put on the first GPU
    where = pick_device(device)
    if where.type == "cuda":
        if where.index is not None or local >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs and each rank takes one of its "
                "own: lower --nproc-per-node, and leave --device away"
            )
        where = torch.device("cuda", local)
    # Numbers on the CPU travel by gloo, those on the GPU by NCCL. Ranks that finish early
    # wait, be it for hours; one that is gone is noticed by torchrun.
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=2))
    return Ranks(rank, count, where)
