"""Train the classifier that judges digits, and compute the test images' statistics.

    python assets/train_classifier.py            a few minutes on 2 CPU cores

It replaces the two files in assets/. Figures of evaluate.py from before and after that cannot be
compared. torchvision downloads MNIST (12 MB). The last line it prints:

    wrote mnist_classifier.safetensors and mnist_statistics.safetensors to assets: test accuracy ...
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from assets.mnist import load_mnist
from plumbing.devices import pick_device
from plumbing.digits import (
    ASSETS,
    CLASSIFIER,
    STATISTICS,
    MNISTClassifier,
    class_diversity,
    classify,
)
from plumbing.fid import mean_and_covariance
from plumbing.files import write_tensors
from plumbing.options import Options, option, run_script
from plumbing.pairs import generator


@dataclass
class Config(Options):
    """The data, the output folder and the training."""

    data: str = option("data", "folder of the MNIST files (downloaded by torchvision if missing)")
    out: str = option(str(ASSETS), "folder of the two files")
    epochs: int = option(8, "passes over the training images", least=1)
    batch_size: int = option(128, "images per step", least=1)
    architecture: str = option(
        "convolutions", "another one makes an independent judge", ("convolutions", "lenet")
    )
    seed: int = option(0, "seed of everything random", least=0, below=2**64)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")


def main(config: Config) -> None:
    """Train on MNIST's training set, then write the weights and the test set's statistics."""
    device = pick_device(config.device)
    images, labels = load_mnist(config.data, train=True)
    test_images, test_labels = load_mnist(config.data, train=False)
    torch.manual_seed(config.seed)
    classifier = MNISTClassifier(config.architecture).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    total = config.epochs * max(1, len(images) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=total)
    progress = tqdm(range(total), desc="classifier")
    for step in progress:
        draws = generator("assets", config.seed, step)
        index = torch.from_numpy(draws.integers(len(images), size=config.batch_size))
        # Shifts of up to two pixels, because a generator does not always centre its digits.
        dy, dx = draws.integers(-2, 3, size=2).tolist()
        x = images[index].roll((dy, dx), dims=(2, 3)).to(device)
        loss = F.cross_entropy(classifier(x)[1], labels[index].to(device), label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")

    # The shipped weights are float16. The statistics belong to exactly these weights.
    tensors = classifier.half().state_dict()
    features, logits = classify(classifier.float().eval(), test_images, device)
    mean, covariance = mean_and_covariance(features)
    diversity = class_diversity(test_images, test_labels)
    statistics = {"mean": mean, "covariance": covariance, "diversity": diversity}
    out, accuracy = Path(config.out), float((logits.argmax(1) == test_labels).double().mean())
    metadata = {"architecture": config.architecture, "seed": config.seed, "accuracy": accuracy}
    write_tensors(out / CLASSIFIER, tensors, {"dataset": "mnist", **metadata})
    write_tensors(out / STATISTICS, statistics, {"dataset": "mnist test set"})
    print(f"wrote {CLASSIFIER} and {STATISTICS} to {out}: test accuracy {accuracy:.2%}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
