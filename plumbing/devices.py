"""Where the work runs: the device, the precision and the processes.

    python train.py ...                                             one process
    torchrun --nproc-per-node 8 train.py ...                        one on each of eight GPUs
    torchrun --nnodes 9 --nproc-per-node 8 ... train.py ...         72 GPUs of nine machines

A *rank* is one of these processes, and its number. Rank 0 writes all files except the shards of
pairs, which every rank writes.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from plumbing.options import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
AMP = ("auto", *DTYPES)


def pick_device(name: str) -> torch.device:
    """The device of this name. "auto" is the GPU if there is one, else the CPU.

    It also switches off TF32, to which A100s and newer GPUs round inputs of float32 convolutions.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64)  # the solvers need it; mps lacks it
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}); try --device cpu") from None
    return device


def to(device: torch.device, *tensors: Tensor | None) -> list[Tensor | None]:
    """Move tensors to the device, images (4 dimensions) in channels-last layout. None stays. A GPU
    fetches them from pinned memory, while the CPU goes on and draws the next ones."""

    def move(x: Tensor) -> Tensor:
        if device.type == "cuda" and not x.is_cuda:
            x = x.contiguous().pin_memory()  # a strided copy would wait
        x = x.to(device, non_blocking=True)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    return [None if x is None else move(x) for x in tensors]


def pick_amp(name: str, device: torch.device, half: str = "bf16") -> str:
    """The precision of this name. "auto" is "off" on a CPU, and on a GPU `half`, or "fp16" if the
    GPU has no bf16."""
    if name == "auto" and device.type == "cuda":
        return half if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "off" if name == "auto" else name


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """A context in which networks compute in the precision `amp`. Their weights do not change."""
    return torch.autocast(device.type, DTYPES[amp], enabled=amp != "off")


def share(n: int, part: int, parts: int) -> range:
    """Part number `part` of 0 .. n-1, which is cut into `parts` consecutive parts. They are equally
    long if `parts` divides n."""
    return range(n * part // parts, n * (part + 1) // parts)


@dataclass(frozen=True)
class Ranks:
    """This process as one of those that work together."""

    rank: int  # its number, 0 .. count-1
    count: int  # how many there are
    device: torch.device  # of this process

    def share(self, n: int) -> range:
        """This rank's part of 0 .. n-1, see share."""
        return share(n, self.rank, self.count)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(torch.zeros(1))

    @contextlib.contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the other ranks, which then find what it downloaded."""
        if self.rank > 0:
            self.barrier()
        yield
        if self.rank == 0:
            self.barrier()

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks, on every rank."""
        if self.count > 1:
            x = x.clone()
            with others_alive():
                dist.all_reduce(x)
        return x

    def broadcast(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Give every rank the values that each tensor has on the rank that owns it, in place."""
        with others_alive():
            both = zip(tensors, owners, strict=True)
            for sent in [dist.broadcast(x, owner, async_op=True) for x, owner in both]:
                sent.wait()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sum(torch.tensor(int(flag))).item() > 0  # on the CPU: no wait for the GPU


@contextlib.contextmanager
def others_alive() -> Iterator[None]:
    """Turn a lost connection into a UserError: another rank has failed, and prints its own message.
    This rank's own errors, such as a CUDA error that shows up here, pass unchanged."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"[Cc]onnection|Broken pipe|pair closure|remote process", str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"another rank has failed; see its message ({reason})") from error


def join_ranks(device: str) -> Ranks:
    """Read this process's rank from torchrun's environment, and connect to the other ranks. The
    device is pick_device's; with several ranks, "auto" and "cuda" are each rank's own GPU."""
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if count == 1:
        return Ranks(0, 1, pick_device(device))
    if "LOCAL_RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set, but not by torchrun; use torchrun, or unset it")
    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # before anything is allocated on the first GPU
    where = pick_device(device)
    if where.type == "cuda":
        if where.index is not None or local >= torch.cuda.device_count():
            raise UserError("each rank needs its own GPU; lower --nproc-per-node and omit --device")
        where = torch.device("cuda", local)
    # gloo for CPU tensors, NCCL for GPU tensors. The timeout is long because a rank that finishes
    # early may wait for hours. If a rank dies, torchrun notices.
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=2))
    return Ranks(rank, count, where)
