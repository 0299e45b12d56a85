"""Train the small MNIST teacher that ships in assets/, with EDM's own objective.

    python assets/train_teacher.py

The paper's teachers are released diffusion models. This script makes one that is small enough for a
laptop: a class-conditional DDPM++ of 0.64 M parameters for 28x28 digits, trained as in Karras et
al. 2022 (arXiv 2206.00364) with log-normal noise levels and the weight lambda(sigma). The result is
a moving average of the weights.

It takes about an hour on 2 CPU cores, and can use a GPU. torchvision downloads MNIST (12 MB). You
can interrupt it at any time; the same command resumes. The last line it prints:

    wrote runs/mnist-teacher/teacher.safetensors (loss 0.2711)

This file is shipped as assets/mnist_teacher.safetensors, and its log.csv as mnist_teacher.csv.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from assets.mnist import load_mnist
from edm_unet import EDMPrecond, heun_sample
from plumbing.devices import Ranks, pick_device, to
from plumbing.drawing import only_to_look_at, save_grid
from plumbing.files import atomic_path, write_csv, write_tensors
from plumbing.optim import Learner
from plumbing.options import Options, UserError, option, run_script
from plumbing.pairs import generator, normal, sample_noise
from plumbing.rundir import claim_folder, load_checkpoint
from workloads import WORKLOADS


@dataclass
class Config(Options):
    """The data, the objective and the optimisation."""

    data: str = option(
        "data", "folder of the MNIST files (downloaded by torchvision if missing)", free=True
    )
    out: str = option("runs/mnist-teacher", "run folder", free=True)
    steps: int = option(13_000, "training steps", least=1)
    batch_size: int = option(64, "images per step", least=1)
    learning_rate: float = option(2e-3, "peak learning rate of Adam, cosine decay to 0", above=0)
    warmup: int = option(200, "steps of linear warm-up", least=0)
    ema: float = option(
        0.999, "decay of the moving average of the weights, per step", least=0, below=1
    )
    # For photographs, EDM has P_mean = -1.2 and P_std = 1.2. The class of a digit is decided at
    # larger noise, sigma = 1 to 5. At 0.3 a black and white image is easy to see.
    p_mean: float = option(0.2, "training noise levels: mean of ln sigma")
    p_std: float = option(1.1, "training noise levels: standard deviation of ln sigma", above=0)
    save_every: int = option(1000, "steps between checkpoints (and pictures)", least=1, free=True)
    seed: int = option(0, "seed of everything random", least=0, below=2**64)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...", free=True)


def edm_loss(
    net, images: Tensor, labels: Tensor, p_mean: float, p_std: float, draws: np.random.Generator
) -> Tensor:
    """EDM Eq. 2 with Table 1: mean of lambda(sigma) |D(x + n; sigma) - x|^2, n ~ N(0, sigma^2 I).

    ln sigma ~ N(p_mean, p_std^2); lambda(sigma) = 1 / sigma^2 + 1 / sigma_data^2 makes the loss of
    an untrained network 1 at every sigma.

    Args:
        net: (x (B, 1, 28, 28), sigma (B, 1, 1, 1), labels) -> denoised images.
        images: (B, 1, 28, 28) in [-1, 1]; labels: (B,) long.

    Returns:
        loss, scalar.
    """
    sigma = (p_mean + p_std * normal(draws, len(images), 1, 1, 1)).exp().to(images.device)
    noise = normal(draws, *images.shape).to(images.device)
    weight = (1 / sigma) ** 2 + 1 / net.sigma_data**2  # EDM's lambda(sigma)
    return (weight * (net(images + sigma * noise, sigma, labels) - images) ** 2).mean()


def main(config: Config) -> None:
    """Train, or resume training, and write teacher.safetensors."""
    device, out = pick_device(config.device), Path(config.out)
    images, labels = load_mnist(config.data, train=True)
    torch.manual_seed(config.seed)
    net = EDMPrecond(**WORKLOADS["mnist"].network)
    net.to(device, memory_format=torch.channels_last)
    learner = Learner(
        net, Ranks(0, 1, device), config.learning_rate, warmup=config.warmup,
        end=max(config.steps, config.warmup + 1),
        betas=(0.9, 0.99), weight_decay=0.0, grad_clip=math.inf,
        decay=lambda step: min(config.ema, (step + 1) / (step + 10)),  # forgets the start
    )  # fmt: skip
    run = {"net": learner, "ema": learner.average}
    claim_folder(out, "config.json", config.settings())
    done, log = load_checkpoint(out, run)

    progress = tqdm(range(done, config.steps), initial=done, total=config.steps, desc="teacher")
    for step in progress:
        # A batch depends on (seed, step) alone, so resuming is exact.
        draws = generator("assets", config.seed, step)
        index = torch.from_numpy(draws.integers(len(images), size=config.batch_size))
        x, y = to(device, images[index], labels[index])
        loss = edm_loss(net, x, y, config.p_mean, config.p_std, draws)
        learner.backward(loss)
        learner.step(step)

        if not loss.isfinite():
            raise UserError(f"the loss is {loss.item()} at step {step + 1}; lower --learning-rate")
        log.append({"step": step + 1, "loss": f"{loss.item():.6f}"})
        progress.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            write_csv(out / "log.csv", log)
            state = {name: part.state_dict() for name, part in run.items()}
            with atomic_path(out / "checkpoint.pt") as temporary:
                torch.save(state | {"step": step + 1}, temporary)
            with only_to_look_at(f"samples_{step + 1:06d}.png"):
                z = sample_noise("pictures", 0, range(40), (1, 28, 28)).to(device)
                labels_40 = torch.arange(10, device=device).repeat(4)
                digits = heun_sample(learner.average.eval(), z, labels_40)
                save_grid(out / f"samples_{step + 1:06d}.png", digits, columns=10, scale=2)

    weights = {name: value.half() for name, value in learner.average.state_dict().items()}
    metadata = {"kwargs": json.dumps(net.kwargs), "dataset": "mnist"}
    write_tensors(out / "teacher.safetensors", weights, metadata)
    tail = [float(row["loss"]) for row in log[-500:]]
    print(f"wrote {out / 'teacher.safetensors'} (loss {sum(tail) / len(tail):.4f})")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
