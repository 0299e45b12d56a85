"""Measure the one-step generator against its teacher.

    python evaluate.py                                 MNIST: about 9 minutes on 2 CPU cores
    python evaluate.py --rows student                  without the slow teacher: under a minute
    python evaluate.py --train-classifier              remake the classifier and the statistics

Three figures, each for the student (1 evaluation), the teacher (18 Heun steps, 35 evaluations) and
the untrained student (the teacher's single step, G before training), on the same noises and labels:

    FD         Frechet distance between Gaussians fitted to features of generated and of test images
               (as FID, but the features are a small MNIST classifier's: not comparable with FID)
    accuracy   share of images that the classifier assigns to the class they were made for
    diversity  mean pairwise distance of images within a class, over that of test images

The last line it prints:

    student: FD 1.23, accuracy 99.12 %, diversity 0.987
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from edm_unet import heun_sample
from edm_weights import fetch
from fid import frechet_distance, mean_and_covariance
from pairs import sample_noise
from rundir import (
    UserError,
    generator_for,
    load_strictly,
    option,
    pick_device,
    read_tensors,
    run_script,
    to_uint8,
    write_json,
    write_tensors,
)
from workloads import (
    ASSETS,
    MNIST_GENERATOR,
    get_workload,
    load_generator,
    load_mnist,
    load_teacher,
)

CLASSIFIER = ASSETS / "mnist_classifier.safetensors"
STATISTICS = ASSETS / "mnist_statistics.safetensors"
ROWS = ("student", "teacher", "untrained")


@dataclass
class Config:
    checkpoint: str | None = option(
        None, "a run folder or generator.safetensors (default: runs/mnist, or the shipped one)"
    )
    rows: tuple[str, ...] = option(ROWS, f"what to measure: {', '.join(ROWS)}")
    samples: int = option(10_000, "images per row")
    steps: int | None = option(None, "Heun steps of the teacher (default: the dataset's)")
    teacher_weights: str | None = option(None, "teacher weights (default: the dataset's own)")
    seed: int = option(1_000_000, "seed of the noises; far from make_pairs.py's")
    json: str | None = option(None, "write the numbers to this file too")
    batch_size: int = option(250, "images at a time")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    train_classifier: bool = option(False, "train the classifier and recompute the statistics")
    data: str = option("data", "folder of the MNIST files, for --train-classifier")


# --------------------------------------------------------------------------------------------------
# The three figures


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


# --------------------------------------------------------------------------------------------------
# The classifier whose features they use


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


def load_classifier(device: torch.device) -> nn.Module:
    """The classifier of assets/, in eval mode."""
    classifier = MNISTClassifier()
    tensors, _ = read_tensors(CLASSIFIER)
    load_strictly(classifier, {k: v.float() for k, v in tensors.items()}, CLASSIFIER)
    return classifier.eval().to(device)


def train_classifier(config: Config, epochs: int = 8, batch_size: int = 128) -> None:
    """Train on MNIST's training set, then write the weights and the test set's statistics."""
    device = pick_device(config.device)
    images, labels = load_mnist(config.data, train=True)
    test_images, test_labels = load_mnist(config.data, train=False)
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
    tensors = {name: value.half() for name, value in classifier.state_dict().items()}
    write_tensors(CLASSIFIER, tensors, {"dataset": "mnist"})
    classifier = load_classifier(device)
    features, predictions = classify(classifier, test_images, device)
    mean, covariance = mean_and_covariance(features)
    diversity = torch.tensor(class_diversity(test_images, test_labels), dtype=torch.float64)
    statistics = {"mean": mean, "covariance": covariance, "diversity": diversity}
    write_tensors(STATISTICS, statistics, {"dataset": "mnist test set"})
    accuracy = (predictions == test_labels).double().mean()
    print(f"wrote {CLASSIFIER} and {STATISTICS}: test accuracy {accuracy:.2%}")


# --------------------------------------------------------------------------------------------------
# Samples to measure


@torch.inference_mode()
def generate(draw, config: Config, row: str, workload, device) -> tuple[Tensor, Tensor]:
    """Images k = 0 .. samples-1 of class k mod classes -> (N, C, H, W) rounded to uint8's values
    but in [-1, 1], labels (N,)."""
    labels = torch.arange(config.samples) % workload.num_classes
    images = []
    for rows in tqdm(torch.arange(config.samples).split(config.batch_size), desc=row):
        z = sample_noise(config.seed, rows.tolist(), workload.image_shape)
        z = z.to(device, memory_format=torch.channels_last)
        images.append(to_uint8(draw(z, labels[rows].to(device)).cpu()))
    return torch.cat(images).float() / 127.5 - 1, labels


def measure(images: Tensor, labels: Tensor, classifier, statistics, device) -> dict[str, float]:
    """The three figures for one set of images, and how many images there are."""
    features, predictions = classify(classifier, images, device)
    mean, covariance = mean_and_covariance(features)
    return {
        "fd": frechet_distance(mean, covariance, statistics["mean"], statistics["covariance"]),
        "accuracy": float((predictions == labels).double().mean()),
        "diversity": class_diversity(images, labels) / float(statistics["diversity"]),
        "samples": len(images),
    }


def find_generator(given: str | None) -> Path:
    """The generator to measure: the one given, else runs/mnist's, else the shipped one."""
    if given:
        folder = Path(given)
        return folder / "generator.safetensors" if folder.is_dir() else fetch(given)
    run = Path("runs/mnist/generator.safetensors")
    return run if run.exists() else MNIST_GENERATOR


def main(config: Config) -> None:
    """Print the table, and write it as JSON."""
    if config.train_classifier:
        return train_classifier(config)
    unknown = [row for row in config.rows if row not in ROWS]
    if unknown:
        raise UserError(f"unknown row {unknown[0]!r}; known: {', '.join(ROWS)}")
    if config.samples < 200 or config.batch_size < 1:
        raise UserError("--samples must be at least 200 (128 features), --batch-size at least 1")
    device, path = pick_device(config.device), find_generator(config.checkpoint)
    G, metadata = load_generator(path)
    if metadata["dataset"] != "mnist":
        raise UserError(f"{path} makes {metadata['dataset']}; so far only mnist can be evaluated")
    G = G.to(device, memory_format=torch.channels_last)
    workload = get_workload("mnist")
    mu_real, _ = load_teacher("mnist", config.teacher_weights)
    net = mu_real.net.to(device, memory_format=torch.channels_last)
    steps = workload.solver_steps if config.steps is None else config.steps
    if steps < 1:
        raise UserError(f"--steps must be at least 1, not {steps}")
    classifier, (statistics, _) = load_classifier(device), read_tensors(STATISTICS)

    draws = {
        "student": (1, G),
        "teacher": (2 * steps - 1, lambda z, cond: heun_sample(net, z, cond, steps)),
        "untrained": (1, lambda z, cond: heun_sample(net, z, cond, 1)),
    }
    results = {}
    for row in config.rows:
        images, labels = generate(draws[row][1], config, row, workload, device)
        results[row] = measure(images, labels, classifier, statistics, device)

    print(f"\n{path} (step {metadata.get('step', '?')}), {config.samples} images per row")
    print(f"{'':10} {'evaluations':>11} {'FD':>8} {'accuracy':>9} {'diversity':>9}")
    for row, figures in results.items():
        print(
            f"{row:10} {draws[row][0]:11} {figures['fd']:8.2f} {figures['accuracy']:9.2%} "
            f"{figures['diversity']:9.3f}"
        )
    if config.json:
        write_json(Path(config.json), results)
    row = config.rows[0]
    print(
        f"{row}: FD {results[row]['fd']:.2f}, accuracy {results[row]['accuracy']:.2%}, "
        f"diversity {results[row]['diversity']:.3f}"
    )


if __name__ == "__main__":
    run_script(main, Config, __doc__)
