"""MNIST, and what judges digits: a small classifier and the three figures of evaluate.py.

Its weights and the test images' statistics are in assets/, from assets/train_classifier.py.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pdist

from plumbing.fid import frechet_distance, mean_and_covariance
from plumbing.files import load_strictly, one_line, read_tensors
from plumbing.options import UserError

ASSETS = Path(__file__).parent.parent / "assets"
CLASSIFIER = ASSETS / "mnist_classifier.safetensors"
STATISTICS = ASSETS / "mnist_statistics.safetensors"


class MNISTClassifier(nn.Module):
    """A small convolutional classifier; its features are the last hidden layer, (B, 128)."""

    def __init__(self):
        super().__init__()
        layers, c_in = [], 1
        for c_out, stride in ((32, 1), (32, 2), (64, 1), (64, 2), (128, 1)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.ReLU()]
            c_in = c_out
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 1, 28, 28) in [-1, 1] -> features (B, 128), logits (B, 10)."""
        features = self.trunk(images).mean(dim=(2, 3))
        return features, self.head(features)


@torch.inference_mode()
def classify(classifier: nn.Module, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features (N, 128) and logits (N, 10), on the CPU, batch by batch."""
    rows = [classifier(batch.to(device)) for batch in images.split(500)]
    features, logits = zip(*rows, strict=True)
    return torch.cat(features).cpu(), torch.cat(logits).cpu()


def load_classifier(device: torch.device) -> nn.Module:
    """The classifier of assets/, in eval mode."""
    classifier = MNISTClassifier()
    load_strictly(classifier, read_tensors(CLASSIFIER)[0], CLASSIFIER)
    return classifier.eval().to(device)


def class_diversity(images: Tensor, labels: Tensor) -> float:
    """Mean Euclidean distance between two images (N, C, H, W) of a class, averaged over the classes
    of labels (N,) long."""
    by_class = [images[labels == label].flatten(1).double() for label in labels.unique()]
    return float(torch.stack([pdist(of_class).mean() for of_class in by_class]).mean())


def measure(images: Tensor, labels: Tensor, device: torch.device) -> dict[str, float]:
    """The three figures that evaluate.py explains, of images (N, 1, 28, 28) in [-1, 1] made for
    labels (N,) long: "fd", "accuracy" (0 .. 1), "diversity" (1 = the test images'); and N."""
    classifier, (statistics, _) = load_classifier(device), read_tensors(STATISTICS)
    features, logits = classify(classifier, images, device)
    mean, covariance = mean_and_covariance(features)
    return {
        "fd": frechet_distance(mean, covariance, statistics["mean"], statistics["covariance"]),
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
        "diversity": class_diversity(images, labels) / float(statistics["diversity"]),
        "samples": len(images),
    }


def load_mnist(folder: str, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST through torchvision -> images (N, 1, 28, 28) float32 in [-1, 1], labels (N,) long."""
    from torchvision.datasets import MNIST  # slow to import

    try:
        data = MNIST(folder, train=train, download=True)
    except (OSError, RuntimeError, ValueError) as error:
        text = f"put MNIST's four files into {folder}/MNIST/raw: they cannot be downloaded"
        raise UserError(one_line(f"{text} ({error})")) from None
    return data.data[:, None].float() / 127.5 - 1, torch.as_tensor(data.targets)
