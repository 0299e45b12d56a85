"""MNIST, and the judge of digits: a small classifier and the figures computed from its features.

assets/train_classifier.py makes its weights and the statistics of the test images, in assets/.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pdist

from plumbing.fid import frechet_distance, mean_and_covariance
from plumbing.files import load_strictly, read_tensors

ASSETS = Path(__file__).parent.parent / "assets"
CLASSIFIER, STATISTICS = "mnist_classifier.safetensors", "mnist_statistics.safetensors"


def trunk(architecture: str) -> nn.Sequential:
    """Images (B, 1, 28, 28) -> features (B, 128)."""
    if architecture == "lenet":  # after LeCun et al. 1998: large filters, pooling, a dense layer
        return nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(),
        )  # fmt: skip
    layers, c_in = [], 1  # "convolutions": small filters, strides, a mean over the pixels
    for c_out, stride in ((32, 1), (32, 2), (64, 1), (64, 2), (128, 1)):
        layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.ReLU()]
        c_in = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class MNISTClassifier(nn.Module):
    """A small classifier. Its features are the last hidden layer, (B, 128)."""

    def __init__(self, architecture: str = "convolutions"):
        super().__init__()
        self.trunk = trunk(architecture)
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 1, 28, 28) in [-1, 1] -> features (B, 128), logits (B, 10)."""
        features = self.trunk(images)
        return features, self.head(features)


@torch.inference_mode()
def classify(classifier: nn.Module, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) -> features (N, 128) and logits (N, 10), both on the CPU."""
    rows = [classifier(batch.to(device)) for batch in images.split(500)]
    features, logits = zip(*rows, strict=True)
    return torch.cat(features).cpu(), torch.cat(logits).cpu()


def load_classifier(device: torch.device, folder: Path = ASSETS) -> nn.Module:
    """The classifier that assets/train_classifier.py wrote to this folder, in eval mode."""
    tensors, metadata = read_tensors(folder / CLASSIFIER)
    classifier = MNISTClassifier(metadata.get("architecture", "convolutions"))
    load_strictly(classifier, tensors, folder / CLASSIFIER)
    return classifier.eval().to(device)


def class_diversity(images: Tensor, labels: Tensor) -> Tensor:
    """Images (N, C, H, W), labels (N,) long -> the mean Euclidean distance between two images of a
    class, (classes,) float64, in ascending order of the labels."""
    by_class = [images[labels == label].flatten(1).double() for label in labels.unique()]
    return torch.stack([pdist(of_class).mean() for of_class in by_class])


def measure(
    images: Tensor, labels: Tensor, device: torch.device, folder: Path = ASSETS
) -> dict[str, float]:
    """evaluate.py's figures for images (N, 1, 28, 28) in [-1, 1] made for labels (N,) long, by the
    judge in a folder: "fd", "accuracy" (0 .. 1), "diversity" (1 = the test images'), "samples"."""
    classifier, (statistics, _) = load_classifier(device, folder), read_tensors(folder / STATISTICS)
    features, logits = classify(classifier, images, device)
    mean, covariance = mean_and_covariance(features)
    diversity = class_diversity(images, labels).mean() / statistics["diversity"].mean()
    return {
        "fd": frechet_distance(mean, covariance, statistics["mean"], statistics["covariance"]),
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
        "diversity": float(diversity),
        "samples": len(images),
    }
