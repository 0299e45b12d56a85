"""How a network learns: schedule, parts and ranks, AdamW, clipping, fp16's loss scale, average."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plumbing.devices import Ranks


def learning_rate(step: int, peak: float, warmup: int, end: int | None = None) -> float:
    """Linear warm-up to the peak, then constant as in the paper, or half a cosine to zero at step
    `end`."""
    warm = min(1.0, (step + 1) / max(1, warmup))
    progress = max(0, step - warmup) / (end - warmup) if end else 0
    return peak * warm * 0.5 * (1 + math.cos(math.pi * progress))


def average_decay(step: int, share: float) -> float:
    """Decay of a moving average whose memory is about this share of the steps so far, so that the
    start is forgotten however long the run: the power-function profile of Karras et al. 2024 (arXiv
    2312.02696), whose gamma + 1 is 1 / share."""
    return (1 - 1 / (step + 1)) ** (1 / share)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Moving average of the weights."""
    for mean, weight in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)


class Unfinished(Exception):
    """A step was left between its parts; nothing has changed."""


class Learner:
    """One network's way through the steps of a run.

        for part in learner.parts(parts):               # a step: one part, or several
            learner.backward(loss(learner.model, part))
        norm = learner.step(k)

    Gradients are averaged: over the parts, and with the last part over the ranks
    (DistributedDataParallel does that during its backward).

    Args:
        network: what is trained, on its device; stays in the mode that it is in.
        peak, warmup, end: of learning_rate.
        betas, weight_decay: of AdamW.
        grad_clip: largest L2 norm of the gradient.
        fp16: scale the loss, or small gradients would be zero in half precision.
        shard: spread AdamW's state over the ranks.
        decay: step -> decay of the moving average of the weights; None: no average.

    Attributes:
        network: bare, for its weights. model: the same as one calls it.
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
        self.count, self.rank, self.sharded = 1, ranks.rank, shard and ranks.count > 1
        self.average = copy.deepcopy(network).requires_grad_(False) if decay else network
        kind, options = torch.optim.AdamW, {"betas": betas, "weight_decay": weight_decay}
        options["fused"] = True
        if self.sharded:
            # ZeRO-1: G and mu_fake fit on a GPU whole, what doubles their memory is AdamW's state.
            # Unlike FSDP it leaves the networks, and so their checkpoints, as they are.
            from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import

            kind, options = ZeroRedundancyOptimizer, {"optimizer_class": kind, **options}
        self.optimizer = kind(network.parameters(), **options)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=fp16)
        self.model = network
        if ranks.count > 1:
            self.model = DistributedDataParallel(
                network, gradient_as_bucket_view=True, broadcast_buffers=False
            )
            for name, table in network.named_buffers(recurse=False):
                setattr(self.model, name, table)  # a denoiser's noise table is seen through it

    def parts(self, parts: Sequence, leave: Callable[[], bool] | None = None) -> Iterator:
        """The parts of a step one after the other, each of which counts equally.

        If `leave`, asked between two parts, says so, the gradients are forgotten: Unfinished.
        """
        self.count = len(parts)
        for i, part in enumerate(parts):
            if i > 0 and leave is not None and leave():
                self.optimizer.zero_grad(set_to_none=True)
                raise Unfinished
            # DistributedDataParallel's, which looks at it in the part's forward.
            self.model.require_backward_grad_sync = i + 1 == len(parts)
            yield part

    def backward(self, loss: Tensor) -> None:
        """Add a part's gradient to those of the step's other parts."""
        self.scaler.scale(loss / self.count).backward()

    def step(self, step: int) -> Tensor:
        """Clip, and do step k. Returns the gradient's norm before clipping.

        With fp16 it may be infinite: then this step is left out and the loss's scale lowered. In
        another precision the weights become NaN; rundir.Log ends the run when it next looks, before
        anything is saved.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.decay:
            update_average(self.average, self.network, self.decay(step))
        return norm

    def state_dict(self) -> dict:
        """Network, optimiser and scale, the same for any number of ranks. All ranks must call."""
        optimizer = {}
        if self.sharded:
            self.optimizer.consolidate_state_dict(to=0)
        if self.rank == 0:
            optimizer = self.optimizer.state_dict()
        states = {"network": self.network.state_dict(), "optimizer": optimizer}
        return states | {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.sharded:  # it puts "step" on the CPU (PyTorch issue 124133), and all there is twice
            self.optimizer.state.clear()
            for parameter, values in self.optimizer.optim.state.items():
                values["step"] = values["step"].to(parameter.device)
        self.scaler.load_state_dict(state["scaler"])
