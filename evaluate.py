"""Measure the one-step generator, and its teacher.

    python evaluate.py                                     the newest run, or the shipped generator
    python evaluate.py --rows student                      MNIST without the slow teacher
    torchrun --nproc-per-node 8 evaluate.py --checkpoint runs/imagenet64        eight GPUs
    torchrun --nproc-per-node 8 evaluate.py --dataset imagenet64 --teacher --steps 256
    python evaluate.py --train-classifier                  remake MNIST's classifier and statistics

Rows: the student (1 evaluation of the network), the teacher (N Heun steps, 2 N - 1 evaluations) and
the untrained student (the teacher's single step: G before training).

CIFAR-10 and ImageNet-64: FID by EDM's protocol (see fid.py), for which features of 50,000 images
are compared with the published statistics of the training images. EDM's README reports the least of
three such numbers: add --seed-start 50000 and --seed-start 100000. The last line:

    student: FID 2.62 (50000 images)

MNIST (about 8 minutes on 2 CPU cores; the student alone takes less than one): three figures, for
all rows on the same noises and labels:

    FD         Frechet distance between Gaussians fitted to features of generated and of test images
               (as FID, but the features are a small MNIST classifier's: not comparable with FID)
    accuracy   share of images that the classifier assigns to the class they were made for
    diversity  mean pairwise distance of images within a class, over that of test images

and the last line:

    student: FD 1.10, accuracy 98.88%, diversity 0.961
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from plumbing.devices import AMP, Ranks, autocast, join_ranks, pick_amp, pick_device
from plumbing.digits import measure, train_classifier
from plumbing.downloads import fetch
from plumbing.fid import (
    EDM_REFERENCES,
    INCEPTION_HASH,
    FeatureStatistics,
    frechet_distance,
    inception,
    inception_features,
    read_reference,
    seeded_inputs,
    write_statistics,
)
from plumbing.files import file_hash, read_header, to_uint8, write_json
from plumbing.options import Options, UserError, option, run_script
from plumbing.pairs import sample_noise
from teachers import (
    Teacher,
    check_teaches,
    find_generator,
    is_sd_unet,
    load_generator,
    load_teacher,
)
from workloads import WORKLOADS, get_workload

ROWS = ("student", "teacher", "untrained")


@dataclass
class Config(Options):
    """Options at None: the dataset decides, see `complete`."""

    checkpoint: str | None = option(
        None,
        "a run folder, a generator's file, https://... or hf://owner/repo/file "
        "(default: the last run's, or the shipped one)",
    )
    dataset: str | None = option(
        None, "the generator's; needed only for a teacher without a generator", tuple(WORKLOADS)
    )
    rows: tuple[str, ...] = option(
        (), f"what to measure: {', '.join(ROWS)} (default: student; mnist: all)"
    )
    teacher: bool = option(False, "the same as --rows teacher")
    samples: int | None = option(None, "images per row (default: 50000; mnist: 10000)")
    steps: int | None = option(None, "Heun steps of the teacher (default: the dataset's)")
    teacher_weights: str | None = option(None, "teacher weights (default: the dataset's own)")
    json: str | None = option(None, "write the numbers to this file too")
    amp: str = option("off", "half precision of generator and teacher: bf16, fp16, ...", AMP)
    batch_size: int | None = option(None, "images at a time (default: 64; mnist: 100)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    # FID
    seed_start: int | None = option(None, "FID: seed of the first image (default: 0)")
    reference: str | None = option(
        None, "FID: real images' .npz or .safetensors, or a folder of them (default: EDM's .npz)"
    )
    inception: str | None = option(None, "FID: file of Inception's weights (default: downloaded)")
    statistics: str | None = option(
        None, "FID: .safetensors to keep the generated images' statistics in, and to reuse"
    )
    # MNIST
    seed: int | None = option(None, "mnist: seed of the noises (default: 1000000)")
    train_classifier: bool = option(False, "mnist: train the classifier, recompute its statistics")
    data: str = option("data", "folder of the MNIST files, for --train-classifier")


# --------------------------------------------------------------------------------------------------
# Options


def check(config: Config) -> Config:
    """Refuse what can be refused before anything is loaded.

    Raises:
        UserError: an option out of range, or a file that is not there.
    """
    if config.teacher:
        if config.rows:
            raise UserError("--teacher is short for --rows teacher; give one of them")
        config = replace(config, rows=("teacher",))
    unknown = [row for row in config.rows if row not in ROWS]
    if unknown:
        raise UserError(f"unknown row {unknown[0]!r}; known: {', '.join(ROWS)}")
    for name, least in (("steps", 1), ("batch_size", 1), ("seed_start", 0), ("seed", 0)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if config.inception is not None and not Path(config.inception).is_file():
        raise UserError(f"{config.inception} does not exist; check --inception")
    if config.statistics is not None:
        if not config.statistics.endswith(".safetensors"):
            raise UserError(f"--statistics must be a .safetensors file, not {config.statistics}")
        if len(set(config.rows)) > 1:
            raise UserError("--statistics keeps those of one row; choose one with --rows")
    return config


def complete(config: Config, dataset: str) -> Config:
    """Fill in the dataset and what it decides.

    Raises:
        UserError: too few images, or an option that the dataset does not have.
    """
    fid_only, mnist_only = ("seed_start", "reference", "inception", "statistics"), ("seed",)
    for name in fid_only if dataset == "mnist" else mnist_only:
        if getattr(config, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is not for {dataset}; leave it away")
    if dataset == "mnist":
        # 128 features need more images than that; the seed is far from those of make_pairs.py.
        least, defaults = 200, {"samples": 10_000, "batch_size": 100, "seed": 1_000_000}
    else:
        least, defaults = 2, {"samples": 50_000, "batch_size": 64, "seed_start": 0}
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    config = replace(config, dataset=dataset, **missing)
    if config.samples < least:
        raise UserError(f"--samples must be at least {least}, not {config.samples}")
    return config


# --------------------------------------------------------------------------------------------------
# Rows


@dataclass(frozen=True)
class Row:
    """One thing to measure.

    Attributes:
        name: one of ROWS.
        draw: noise (B, C, H, W) and labels (B,) or None -> images (B, C, H, W), about in [-1, 1].
        evaluations: of the network, for one image.
        source, sha256: the file of its weights, for the reader; its hash.
    """

    name: str
    draw: Callable[[Tensor, Tensor | None], Tensor]
    evaluations: int
    source: str
    sha256: str


def load_rows(config: Config, device: torch.device) -> tuple[str, list[Row]]:
    """The dataset, and what config.rows asks for, on the device.

    Raises:
        UserError: files that are missing or unusable, or a dataset that cannot be measured here.
    """
    dataset, names, rows = config.dataset, config.rows, {}
    if dataset is None or config.checkpoint is not None or "student" in (names or ROWS):
        path = find_generator(config.checkpoint)
        refuse_text(is_sd_unet(path))  # before gigabytes are loaded in vain
        G, metadata = load_generator(path)
        if dataset not in (None, metadata["dataset"]):
            raise UserError(
                f"{path} makes {metadata['dataset']}, not {dataset}; choose another --checkpoint"
            )
        dataset = metadata["dataset"]
    refuse_text(dataset == "sd15")
    names = dict.fromkeys(names or (ROWS if dataset == "mnist" else ("student",)))
    if "student" in names:
        G = G.to(device, memory_format=torch.channels_last)
        source = f"{path} (step {metadata.get('step', '?')})"
        rows["student"] = Row("student", G, 1, source, file_hash(path))
    if names.keys() - {"student"}:
        teacher = load_teacher(dataset, config.teacher_weights).to(device)
        if "student" in names and config.teacher_weights is None:
            check_teaches(teacher, metadata, path)
        record, default = teacher.record, get_workload(dataset).solver_steps
        for name, steps in (("teacher", config.steps or default), ("untrained", 1)):
            draw = partial(draw_from_teacher, teacher, steps)
            n = teacher.evaluations(steps)
            rows[name] = Row(name, draw, n, record["name"], record["sha256"])
    return dataset, [rows[name] for name in names]


def refuse_text(is_text: bool) -> None:
    """Raise UserError for a text-to-image model."""
    if is_text:
        raise UserError(
            "text-to-image models are measured on COCO's captions, which is not part of this "
            "project; write images with sample.py and give their folder to clean-fid"
        )


def draw_from_teacher(teacher: Teacher, steps: int, z: Tensor, labels: Tensor | None) -> Tensor:
    """A teacher's Row.draw."""
    return teacher.solve(z, teacher.encode(labels), steps)


@torch.inference_mode()
def draw_uint8(row: Row, z: Tensor, labels: Tensor | None, amp: str) -> Tensor:
    """Noise (B, C, H, W) and labels (B,) or None -> uint8 images (B, C, H, W), on z's device.

    Raises:
        UserError: NaN or infinity.
    """
    with autocast(z.device, amp):
        images = row.draw(z.contiguous(memory_format=torch.channels_last), labels)
    if not images.isfinite().all():
        raise UserError(f"{row.source} gives NaN or infinity; check it, or try --amp off")
    return to_uint8(images)


# --------------------------------------------------------------------------------------------------
# FID


def measure_fid(config: Config, rows: list[Row], ranks: Ranks) -> dict[str, dict]:
    """FID of each row, printed as soon as it is known -> what --json keeps (on rank 0)."""
    seeds = range(config.seed_start, config.seed_start + config.samples)
    records = [describe(row, seeds, config, ranks.device) for row in rows]
    path = None if config.statistics is None else Path(config.statistics)
    with ranks.first_goes_first():
        source, network = fetch(config.reference or EDM_REFERENCES[config.dataset]), None
        known = [read_statistics(path, record) for record in records]
        if None in known or source.is_dir():
            network = inception(config.inception, ranks.device)
    reference = read_reference(source, network, config.batch_size)  # ranks share a folder

    results = {}
    for row, record, statistics in zip(rows, records, known, strict=True):
        found = statistics or sample_statistics(row, seeds, network, config, ranks)
        if ranks.rank > 0:
            continue
        fid = frechet_distance(*found, *reference)
        results[row.name] = {"fid": fid, "reference": str(source)} | record
        print(f"{row.source}: evaluations {row.evaluations}, seeds {record['seeds']}, vs. {source}")
        print(f"{row.name}: FID {fid:.2f} ({len(seeds)} images)", flush=True)
        if path is not None and statistics is None:  # after the number: it may have cost hours
            write_statistics(path, *found, len(seeds), record)
    return results


def sample_statistics(
    row: Row, seeds: range, network: nn.Module, config: Config, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Draw the images with these seeds; the ranks share them.

    Returns:
        mean (2048,) and covariance (2048, 2048) of their features, float64, on every rank.
    """
    workload, share = get_workload(config.dataset), ranks.share(len(seeds))
    statistics = FeatureStatistics(ranks.device)
    with tqdm(total=len(share), desc=row.name, unit="image", disable=ranks.rank > 0) as bar:
        for indices in batches(share, config.batch_size):
            z, labels = seeded_inputs(
                [seeds[i] for i in indices], workload.image_shape, workload.num_classes,
                ranks.device,
            )  # fmt: skip
            images = draw_uint8(row, z, labels, config.amp)
            statistics.add(inception_features(images, network))
            bar.update(len(images))
    statistics.all_reduce()
    return statistics.mean_and_covariance()


def batches(indices: range, size: int) -> list[range]:
    """Consecutive parts of at most `size`."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def describe(row: Row, seeds: range, config: Config, device: torch.device) -> dict[str, str]:
    """All that the generated images' statistics depend on; goes into their file."""
    # The published weights are named by the beginning of their hash, so that is recorded.
    weights = INCEPTION_HASH if config.inception is None else file_hash(Path(config.inception))
    return {
        "dataset": config.dataset,
        "row": row.name,
        "weights": row.sha256,
        "evaluations": str(row.evaluations),
        "count": str(len(seeds)),
        "seeds": f"{seeds[0]}-{seeds[-1]}",
        "device": device.type,  # a GPU's random numbers are not a CPU's
        "amp": config.amp,
        "inception": weights[: len(INCEPTION_HASH)],
    }


def read_statistics(path: Path | None, record: dict[str, str]) -> tuple[Tensor, Tensor] | None:
    """Mean and covariance that write_statistics kept with this record; None if there is no file.

    Raises:
        UserError: a damaged file, or other images' statistics.
    """
    if path is None or not path.exists():
        return None
    found = read_header(path)[1]
    changed = [key for key in record if found.get(key) != record[key]]
    if changed:
        raise UserError(
            f"{path} holds statistics with another {', '.join(changed)}; "
            "choose another --statistics or delete it"
        )
    return read_reference(path)


# --------------------------------------------------------------------------------------------------
# MNIST: measuring


def measure_digits(config: Config, rows: list[Row], ranks: Ranks) -> dict[str, dict]:
    """Measure each row and print the table -> what --json keeps (on rank 0)."""
    results = {}
    for row in rows:
        images, labels = sample_digits(row, config, ranks)
        if ranks.rank == 0:
            results[row.name] = measure(images, labels, ranks.device)
    if ranks.rank > 0:
        return {}

    print(f"\n{rows[0].source}, {config.samples} images per row")
    print(f"{'':10} {'evaluations':>11} {'FD':>8} {'accuracy':>9} {'diversity':>9}")
    for row in rows:
        figures = results[row.name]
        print(
            f"{row.name:10} {row.evaluations:11} {figures['fd']:8.2f} "
            f"{figures['accuracy']:9.2%} {figures['diversity']:9.3f}"
        )
    first = results[rows[0].name]
    print(
        f"{rows[0].name}: FD {first['fd']:.2f}, accuracy {first['accuracy']:.2%}, "
        f"diversity {first['diversity']:.3f}"
    )
    return results


def sample_digits(row: Row, config: Config, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Draw images k = 0 .. samples-1 of class k mod 10; the ranks share them.

    Returns:
        images (N, 1, 28, 28) in [-1, 1], rounded as uint8 is, and labels (N,), on every rank.
    """
    workload, share = get_workload("mnist"), ranks.share(config.samples)
    labels = torch.arange(config.samples) % workload.num_classes
    # The other ranks' images stay zero, so that the sum over the ranks is all of them.
    images = torch.zeros(config.samples, *workload.image_shape, dtype=torch.uint8)
    with tqdm(total=len(share), desc=row.name, unit="image", disable=ranks.rank > 0) as bar:
        for indices in batches(share, config.batch_size):
            z = sample_noise(config.seed, indices, workload.image_shape).to(ranks.device)
            part = slice(indices.start, indices.stop)
            images[part] = draw_uint8(row, z, labels[part].to(ranks.device), config.amp).cpu()
            bar.update(len(indices))
    if ranks.count > 1:
        dist.all_reduce(images)
    return images.float() / 127.5 - 1, labels


def main(config: Config) -> None:
    """Print the figures, and write them as JSON."""
    if config.train_classifier:
        return train_classifier(config.data, pick_device(config.device))
    config = check(config)
    ranks = join_ranks(config.device)
    config = replace(config, amp=pick_amp(config.amp, ranks.device))
    with ranks.first_goes_first():  # rank 0 downloads
        dataset, rows = load_rows(config, ranks.device)
    config = complete(config, dataset)
    measure_rows = measure_digits if dataset == "mnist" else measure_fid
    results = measure_rows(config, rows, ranks)
    if config.json is not None and ranks.rank == 0:
        write_json(Path(config.json), results)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
