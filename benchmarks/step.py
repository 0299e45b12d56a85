"""Time a training step against its arithmetic floor.

    python benchmarks/step.py --dataset mnist --batch-size 32

With F the time of one teacher forward on B images, a step with B unpaired and B paired images costs
11 F of arithmetic, counting a backward as two forwards:

    G on 2B images, forward and backward     6 F
    teacher and mu_fake, forward             2 F
    mu_fake, forward and backward            3 F

The last line it prints:

    F 21.3 ms, step 260.1 ms, floor 234.3 ms, ratio 1.11
"""

import copy
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from dmd_loss import (
    OneStepGenerator,
    denoising_loss,
    distribution_matching_loss,
    l2_distance,
    regression_loss,
)
from edm_unet import EDMDenoiser, EDMPrecond
from rundir import UserError, option, pick_device, run_script
from workloads import MNIST_TEACHER_KWARGS, get_workload

# Random weights will do: time does not depend on them.
NETWORKS = {
    "mnist": MNIST_TEACHER_KWARGS,
    "cifar10": {
        "img_resolution": 32,
        "img_channels": 3,
        "label_dim": 10,
        "model_type": "SongUNet",
        "channel_mult": [2, 2, 2],
    },
    "imagenet64": {
        "img_resolution": 64,
        "img_channels": 3,
        "label_dim": 1000,
        "model_type": "DhariwalUNet",
    },
}


@dataclass
class Config:
    dataset: str = option("mnist", "whose networks", tuple(NETWORKS))
    batch_size: int = option(32, "B, unpaired and paired images each")
    repeats: int = option(15, "steps and forwards measured, in turn; the medians count")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")


def main(config: Config) -> None:
    """Measure forwards and steps in turn, so that both see the same machine."""
    if config.batch_size < 1 or config.repeats < 1:
        raise UserError("--batch-size and --repeats must be at least 1")
    device, workload = pick_device(config.device), get_workload(config.dataset)
    train_config = train.resolve(train.Config(dataset=config.dataset))
    net = EDMPrecond(**NETWORKS[config.dataset])
    mu_real = EDMDenoiser(net).to(device, memory_format=torch.channels_last)
    mu_real = mu_real.eval().requires_grad_(False)
    G = OneStepGenerator(copy.deepcopy(mu_real)).requires_grad_(True)
    mu_fake = copy.deepcopy(mu_real).requires_grad_(True)
    optimizer_G = train.adamw(G, train_config, device)
    optimizer_fake = train.adamw(mu_fake, train_config, device)

    B = config.batch_size
    z = torch.randn(B, *workload.image_shape)
    cond = torch.randint(workload.num_classes, (B,))
    z, cond = train.to(device, z, cond)
    t = torch.full((B,), 500, device=device)

    @torch.no_grad()
    def forward():
        mu_real(z, t, cond)

    def step():
        x, x_ref = G(torch.cat([z, z]), torch.cat([cond, cond])).split([B, B])
        loss, _ = distribution_matching_loss(mu_real, mu_fake, x, cond)
        loss = loss + regression_loss(x_ref, z, l2_distance)
        train.update(G, optimizer_G, loss, 1e-4, 10.0)
        loss = denoising_loss(mu_fake, x.detach(), cond)
        train.update(mu_fake, optimizer_fake, loss, 1e-4, 10.0)

    def milliseconds(function) -> float:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1000

    for _ in range(2):
        forward(), step()
    times = [(milliseconds(forward), milliseconds(step)) for _ in range(config.repeats)]
    F, total = (statistics.median(values) for values in zip(*times, strict=True))
    print(f"{config.dataset}, batch {B}, {device}, {torch.get_num_threads()} threads")
    print(f"F {F:.1f} ms, step {total:.1f} ms, floor {11 * F:.1f} ms, ratio {total / (11 * F):.2f}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
