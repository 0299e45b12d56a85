"""What judges digits: a small classifier, and three figures that evaluate.py prints.

    FD         Frechet distance between Gaussians fitted to features of generated and of test images
    accuracy   share of images that the classifier assigns to the class they were made for
    diversity  mean pairwise distance of images within a class, over that of test images

Its weights and the test images' statistics are in assets/; `python evaluate.py --train-classifier`
remakes both.
"""

import gzip

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from plumbing.fid import frechet_distance, mean_and_covariance
from plumbing.files import load_strictly, read_tensors, write_tensors
from plumbing.options import UserError
from plumbing.pairs import generator_for
from workloads import ASSETS

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
def classify(
    classifier: nn.Module, images: Tensor, device: torch.device, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """Features (N, 128) and predicted classes (N,), on the CPU, batch by batch."""
    features, predictions = [], []
    for batch in images.split(batch_size):
        feature, logits = classifier(batch.to(device))
        features.append(feature.cpu())
        predictions.append(logits.argmax(1).cpu())
    return torch.cat(features), torch.cat(predictions)


@torch.inference_mode()
def confidence(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    device: torch.device,
    batch_size: int = 500,
) -> Tensor:
    """Probability (N,), 0 .. 1, that the classifier gives each image's own label, on the CPU."""
    rows = []
    for batch, label in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        probabilities = classifier(batch.to(device))[1].softmax(dim=1).cpu()
        rows.append(probabilities.gather(1, label[:, None])[:, 0])
    return torch.cat(rows)


def load_classifier(device: torch.device) -> nn.Module:
    """The classifier of assets/, in eval mode."""
    classifier = MNISTClassifier()
    tensors, _ = read_tensors(CLASSIFIER)
    load_strictly(classifier, {k: v.float() for k, v in tensors.items()}, CLASSIFIER)
    return classifier.eval().to(device)


def train_classifier(
    data: str, device: torch.device, epochs: int = 8, batch_size: int = 128
) -> None:
    """Train on MNIST's training set, then write the weights and the test set's statistics.

    Args:
        data: folder of the MNIST files, see load_mnist.
    """
    images, labels = load_mnist(data, train=True)
    test_images, test_labels = load_mnist(data, train=False)
    torch.manual_seed(0)
    classifier = MNISTClassifier().to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    total = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=total)
    progress = tqdm(range(total), desc="classifier")
    for step in progress:
        generator = generator_for(0, step)
        index = torch.randint(len(images), (batch_size,), generator=generator)
        # Shifts of up to two pixels: digits are not always centred in what a generator makes.
        dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
        batch = images[index].roll((dy, dx), dims=(2, 3)).to(device)
        loss = F.cross_entropy(classifier(batch)[1], labels[index].to(device), label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")

    # What ships is float16; the statistics belong to exactly those weights.
    classifier.half()
    tensors = {name: value.clone() for name, value in classifier.state_dict().items()}
    classifier.float().eval()
    features, predictions = classify(classifier, test_images, device)
    mean, covariance = mean_and_covariance(features)
    diversity = torch.tensor(class_diversity(test_images, test_labels), dtype=torch.float64)
    statistics = {"mean": mean, "covariance": covariance, "diversity": diversity}
    write_tensors(CLASSIFIER, tensors, {"dataset": "mnist"})
    write_tensors(STATISTICS, statistics, {"dataset": "mnist test set"})
    accuracy = (predictions == test_labels).double().mean()
    print(f"wrote {CLASSIFIER} and {STATISTICS}: test accuracy {accuracy:.2%}")


def class_diversity(images: Tensor, labels: Tensor) -> float:
    """Mean Euclidean distance between two images of a class, averaged over the classes.

    Args:
        images: (N, C, H, W); labels: (N,) long, at least two images of each class that occurs.
    """
    distances = []
    for label in labels.unique():
        of_class = images[labels == label].flatten(1).double()
        n = len(of_class)
        distances.append(torch.cdist(of_class, of_class).sum() / (n * (n - 1)))
    return float(torch.stack(distances).mean())


def measure(images: Tensor, labels: Tensor, device: torch.device) -> dict[str, float]:
    """The three figures for one set of images, and how many images there are.

    Args:
        images: (N, 1, 28, 28) in [-1, 1]; labels: (N,) long, what they were made for.

    Returns:
        "fd", "accuracy" (0 .. 1), "diversity" (1 = the test images'), "samples" (N).
    """
    classifier, (statistics, _) = load_classifier(device), read_tensors(STATISTICS)
    features, predictions = classify(classifier, images, device)
    mean, covariance = mean_and_covariance(features)
    return {
        "fd": frechet_distance(mean, covariance, statistics["mean"], statistics["covariance"]),
        "accuracy": float((predictions == labels).double().mean()),
        "diversity": class_diversity(images, labels) / float(statistics["diversity"]),
        "samples": len(images),
    }


def load_mnist(folder: str, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST through torchvision -> images (N, 1, 28, 28) float32 in [-1, 1], labels (N,) long.

    Raises:
        UserError: not in the folder and not to be had from the network, or damaged.
    """
    try:
        from torchvision.datasets import MNIST  # only needed to retrain what assets/ holds
    except ImportError:
        raise UserError("MNIST is read through torchvision: pip install torchvision") from None
    try:
        data = MNIST(folder, train=train, download=True)
    except (OSError, RuntimeError, ValueError, gzip.BadGzipFile) as error:
        raise UserError(
            f"MNIST is neither complete in {folder!r} nor downloadable ({error}); put its four "
            f"files into {folder}/MNIST/raw"
        ) from None
    return data.data[:, None].float() / 127.5 - 1, torch.as_tensor(data.targets)
