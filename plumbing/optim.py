"""How a network learns: learning rate, AdamW, clipping, fp16's loss scale, moving average."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plumbing.devices import Ranks


def learning_rate(step: int, peak: float, warmup: int, end: int | None = None) -> float:
    """Linear warm-up to the peak, then constant as in the paper, or a half cosine to 0 at `end`."""
    warm = min(1.0, (step + 1) / max(1, warmup))
    progress = max(0, step - warmup) / (end - warmup) if end else 0
    return peak * warm * 0.5 * (1 + math.cos(math.pi * progress))


def average_decay(step: int, share: float) -> float:
    """The decay of a moving average over about the last `share` of the steps so far: the power
    function profile of Karras et al. 2024 (arXiv 2312.02696), whose gamma + 1 is 1 / share."""
    return (1 - 1 / (step + 1)) ** (1 / share)


class Unfinished(Exception):
    """A step was abandoned between two of its parts. Nothing has changed."""


class Learner:
    """Trains one network. A step, whose batch comes in one or several parts:

        for part in learner.parts(parts):
            learner.backward(loss(learner.model, part))
        norm = learner.step(k)

    Gradients are averaged over the parts, and over the ranks during the backward pass of the last
    part (by DistributedDataParallel).

    Args:
        network: the network to train, on its device. Its training or eval mode is kept.
        peak, warmup, end: see learning_rate; betas, weight_decay: see AdamW.
        grad_clip: largest L2 norm of the gradient.
        fp16: scale the loss, so that small gradients do not become zero in half precision.
        shard: each rank updates a share of the parameters and holds its AdamW state (ZeRO-1).
        decay: step -> decay of the moving average of the weights. None: no average.

    Attributes:
        network: the bare network, for its weights; model: the network to call.
        average: the moving average, or the network itself.
    """

    def __init__(
        self,
        network: nn.Module,
        ranks: Ranks,
        peak: float,
        *,
        warmup: int,
        end: int | None = None,
        betas: tuple[float, float],
        weight_decay: float,
        grad_clip: float,
        fp16: bool = False,
        shard: bool = False,
        decay: Callable[[int], float] | None = None,
    ):
        self.network, self.grad_clip, self.decay = network, grad_clip, decay
        self.learning_rate = partial(learning_rate, peak=peak, warmup=warmup, end=end)
        self.count, self.ranks, self.sharded = 1, ranks, shard and ranks.count > 1
        self.average = copy.deepcopy(network).requires_grad_(False) if decay else network
        self.parameters = list(network.parameters())
        self.owners = [ranks.rank] * len(self.parameters)
        if self.sharded:
            ends = torch.tensor([p.numel() for p in self.parameters]).cumsum(0)
            self.owners = ((ends - 1) * ranks.count // ends[-1]).tolist()
        how = dict(betas=betas, weight_decay=weight_decay, fused=True)
        self.optimizer = torch.optim.AdamW(self.parameters, **how)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=fp16)
        self.model = network
        if ranks.count > 1:
            self.model = DistributedDataParallel(network, gradient_as_bucket_view=True)
            self.model.broadcast_buffers = False  # they are tables that never change
            for name, table in network.named_buffers(recurse=False):
                setattr(self.model, name, table)  # a denoiser's noise table

    def parts(self, parts: Sequence, leave: Callable[[], bool] | None = None) -> Iterator:
        """Yield the parts of a step, which all count equally. If `leave`, called between two parts,
        returns True, the gradients are dropped and Unfinished is raised."""
        self.count = len(parts)
        for i, part in enumerate(parts):
            if i > 0 and leave is not None and leave():
                self.optimizer.zero_grad(set_to_none=True)
                raise Unfinished
            # DistributedDataParallel reads this in the part's forward pass.
            self.model.require_backward_grad_sync = i + 1 == len(parts)
            yield part

    def backward(self, loss: Tensor) -> None:
        """Add a part's gradient to those of the step's other parts."""
        self.scaler.scale(loss / self.count).backward()

    def step(self, step: int) -> Tensor:
        """Clip the gradient and do step k. Returns the gradient's norm before clipping.

        If it is not finite with fp16, the optimizer skips this step and the loss scale is halved.
        In any other precision the weights become NaN, and rundir.Log ends the run unsaved.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        for parameter, owner in zip(self.parameters, self.owners, strict=True):
            if owner != self.ranks.rank:
                parameter.grad = None  # AdamW passes over it
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.sharded:
            self.ranks.broadcast([p.detach() for p in self.parameters], self.owners)
        if self.decay:
            decay = self.decay(step)
            for mean, weight in zip(self.average.parameters(), self.parameters, strict=True):
                mean.lerp_(weight.detach(), 1 - decay)
        return norm

    def state_dict(self) -> dict:
        """Network, optimizer and loss scale, for any number of ranks. All ranks must call it."""
        optimizer = self.optimizer.state_dict()
        if self.sharded:
            optimizer["state"] = self.gather(optimizer["state"])
        return {
            "network": self.network.state_dict(),
            "optimizer": optimizer if self.ranks.rank == 0 else {},
            "scaler": self.scaler.state_dict(),
        }

    def gather(self, state: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """AdamW's state of this rank's parameters -> that of all, on the CPU of rank 0."""
        whole = {}
        for i, parameter in enumerate(self.parameters):
            zero = torch.zeros_like(parameter)  # on the ranks that do not own it
            values = {"step": zero.sum(), "exp_avg": zero, "exp_avg_sq": zero} | state.get(i, {})
            values = {name: self.ranks.sum(value) for name, value in values.items()}
            if self.ranks.rank == 0:
                whole[i] = {name: value.cpu() for name, value in values.items()}
        return whole

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict returned."""
        self.network.load_state_dict(state["network"])
        # Copies, because tensors that are mapped to a file would keep it open.
        mine = {
            i: {k: value.to(self.parameters[i].device, copy=True) for k, value in values.items()}
            for i, values in state["optimizer"]["state"].items()
            if self.owners[i] == self.ranks.rank
        }
        self.optimizer.load_state_dict(state["optimizer"] | {"state": mine})
        self.scaler.load_state_dict(state["scaler"])
