"""Measure the one-step generator, and its teacher.

    python evaluate.py                                     the newest run, or the shipped generator
    python evaluate.py --rows student                      MNIST without the slow teacher
    torchrun --nproc-per-node 8 evaluate.py --checkpoint runs/imagenet64        eight GPUs
    torchrun --nproc-per-node 8 evaluate.py --dataset imagenet64 --rows teacher --steps 256

    torchrun --nproc-per-node 8 evaluate.py --checkpoint runs/sd15 --captions captions.txt \
        --reference val2014 --clip-score

Rows: the student (1 evaluation of the network), the teacher (N Heun steps, 2 N - 1 evaluations) and
the untrained student (the teacher's single step: G before training).

CIFAR-10 and ImageNet-64: FID by EDM's protocol (see plumbing/fid.py), whose second and third number
take --seed-start 50000 and 100000. The last line:

    student: FID 2.62 (50000 images)

Stable Diffusion: a picture for each of COCO's captions, or of your own (plumbing/captions.py), kept
in a folder, so that an interrupted command goes on. The last line, with a folder of real images and
--clip-score (each needs an optional package):

    student: ... ms per image (batch 1), FID ..., CLIP score ... (30000 images)

MNIST (minutes on 2 CPU cores, the student alone less than one): three figures, for all rows
on the same noises and labels, and the last line:

    student: FD 1.62, accuracy 97.58%, diversity 0.958

    FD         Frechet distance between Gaussians fitted to features of generated and of test images
               (as FID, but the features are a small MNIST classifier's: not comparable with FID)
    accuracy   share of images that the classifier assigns to the class they were made for
    diversity  mean pairwise distance of images within a class, over that of test images
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from plumbing.captions import (
    clip_score,
    draw_missing,
    folder_fid,
    latency,
    optional,
    preview,
)
from plumbing.devices import AMP, Ranks, autocast, join_ranks, pick_amp, to
from plumbing.digits import measure
from plumbing.downloads import fetch
from plumbing.fid import (
    INCEPTION_HASH,
    feature_statistics,
    frechet_distance,
    inception,
    list_images,
    read_reference,
    seeded_inputs,
)
from plumbing.files import file_hash, read_tensors, to_uint8, write_json, write_tensors
from plumbing.options import Options, UserError, option, run_script
from plumbing.pairs import read_prompts, sample_noise
from plumbing.rundir import claim_folder
from teachers import (
    SDTeacher,
    check_teaches,
    find_generator,
    is_sd_unet,
    load_generator,
    load_teacher,
)
from workloads import WORKLOADS, get_workload

ROWS = ("untrained", "teacher", "student")
# Options that only one kind of measurement has.
ONLY_FID, ONLY_MNIST = ("seed_start", "inception", "statistics"), ("seed",)
ONLY_CAPTIONS = ("guidance", "images", "clip_score")


@dataclass
class Config(Options):
    """What to measure, and how."""

    checkpoint: str | None = option(
        None, "a run folder, a file, https://... or hf://... (default: the last run, or what ships)"
    )
    dataset: str | None = option(
        None, "the generator's; needed only for a teacher without a generator", tuple(WORKLOADS)
    )
    captions: str | None = option(None, "sd15: text file, one caption a line (.gz too)")
    rows: tuple[str, ...] = option((), "what to measure (default: student; mnist: all)", ROWS)
    samples: int | None = option(
        None, "images per row (default: 50000; mnist: 10000; sd15: all captions)", least=2
    )
    steps: int | None = option(None, "of the teacher's solver (default: the dataset's)", least=1)
    teacher_weights: str | None = option(None, "teacher weights (default: the dataset's own)")
    json: str | None = option(None, "write the numbers to this file too")
    amp: str = option("off", "half precision of generator and teacher: bf16, fp16, ...", AMP)
    batch_size: int | None = option(None, "images at a time (default: 100; sd15: 4)", least=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    reference: str | None = option(
        None, "FID: real images' .npz or .safetensors, or a folder of them (default: EDM's .npz)"
    )
    # FID
    seed_start: int = option(0, "FID: seed of the first image", least=0)
    inception: str | None = option(None, "FID: file of Inception's weights (default: downloaded)")
    statistics: str | None = option(
        None, "FID: .safetensors to keep the generated images' statistics in, and to reuse"
    )
    # MNIST and captions
    seed: int = option(0, "mnist, sd15: seed of the noises", least=0, below=2**64)
    guidance: float | None = option(None, "sd15: of the teacher (default: the dataset's)", above=0)
    images: str = option("captions", "sd15: folder of the pictures, a folder a row")
    clip_score: bool = option(False, "sd15: CLIP score too")


def refuse(config: Config, names: tuple[str, ...], dataset: str) -> None:
    """Raise UserError for an option that was given in vain."""
    for name in names:
        if getattr(config, name) != getattr(Config, name):
            raise UserError(f"--{name.replace('_', '-')} is not for {dataset}; leave it away")


def complete(config: Config, dataset: str, device: torch.device) -> Config:
    """Fill in what the dataset and the device decide; refuse what does not go with the dataset."""
    rows = config.rows or (ROWS if dataset == "mnist" else ("student",))
    samples = config.samples or (10_000 if dataset == "mnist" else 50_000)
    others = (*ONLY_FID, "reference") if dataset == "mnist" else ONLY_MNIST
    refuse(config, (*others, *ONLY_CAPTIONS), dataset)
    if config.inception and not Path(config.inception).is_file():
        raise UserError(f"{config.inception} does not exist; check --inception")
    if config.statistics and not config.statistics.endswith(".safetensors"):
        raise UserError(f"--statistics must be a .safetensors file, not {config.statistics}")
    if config.statistics and len(rows) > 1:
        raise UserError("--statistics keeps those of one row; choose one with --rows")
    if dataset == "mnist" and samples < 200:  # 128 features need more images than that
        raise UserError(f"--samples must be at least 200, not {samples}")
    amp = pick_amp(config.amp, device)
    size = config.batch_size or 100
    return replace(config, dataset=dataset, rows=rows, samples=samples, amp=amp, batch_size=size)


# --------------------------------------------------------------------------------------------------
# Rows


class Row(NamedTuple):
    """One thing to measure."""

    name: str  # one of ROWS
    solve: Callable  # noise (B, C, H, W), labels (B,) or None -> images (B, C, H, W), about [-1, 1]
    evaluations: int  # of the network, for one image
    source: str  # the file of its weights, for the reader
    sha256: str  # the file's hash
    net: nn.Module  # which has the shape of what it makes, and EDM's the number of classes


def load_rows(config: Config, device: torch.device) -> tuple[Config, list[Row]]:
    """The complete config, and what its rows ask for, on the device."""
    dataset, path, rows = config.dataset, None, {}
    if config.checkpoint or dataset is None or "student" in (config.rows or ROWS):
        path = find_generator(config.checkpoint)
    if is_sd_unet(path) if path else WORKLOADS[dataset].latent:
        raise UserError("a text-to-image model is measured on captions; give a file of --captions")
    if path:
        G, metadata = load_generator(path)
        if dataset not in (None, metadata["dataset"]):
            raise UserError(
                f"{path} makes {metadata['dataset']}, not {dataset}; choose another --checkpoint"
            )
        dataset, G = metadata["dataset"], G.to(device, memory_format=torch.channels_last)
        source = f"{path} (step {metadata.get('step', '?')})"
        rows["student"] = Row("student", G, 1, source, file_hash(path), G.mu.net)
    config = complete(config, dataset, device)  # before a teacher is downloaded in vain
    if set(config.rows) != {"student"}:
        given = {"teacher": config.teacher_weights} if config.teacher_weights else {}
        workload = get_workload(dataset, **given)
        teacher = load_teacher(workload).to(device)
        if "student" in config.rows and not config.teacher_weights:
            check_teaches(teacher, metadata, path)
        source, sha256 = teacher.record["name"], teacher.record["sha256"]
        for name, steps in (("teacher", config.steps or workload.solver_steps), ("untrained", 1)):
            solve = partial(teacher.solve, steps=steps)
            net = teacher.mu_real.net
            rows[name] = Row(name, solve, teacher.evaluations(steps), source, sha256, net)
    return config, [rows[name] for name in config.rows]


def draw(row: Row, config: Config, ranks: Ranks) -> Iterator[Tensor]:
    """This rank's share of a row's images, batch by batch: uint8 (B, C, H, W), on its device."""
    share, shape, classes = ranks.share(config.samples), row.net.image_shape, row.net.label_dim
    with tqdm(total=len(share), desc=row.name, unit="image", disable=ranks.rank > 0) as bar:
        for start in range(0, len(share), config.batch_size):
            indices = share[start : start + config.batch_size]
            if config.dataset == "mnist":
                z = sample_noise("evaluation", config.seed, indices, shape)
                labels = torch.tensor(indices) % 10
            else:
                seeds = [config.seed_start + k for k in indices]
                z, labels = seeded_inputs(seeds, shape, classes, ranks.device)
            z, labels = to(ranks.device, z, labels)
            with torch.inference_mode(), autocast(ranks.device, config.amp):
                images = row.solve(z, labels)
            if not images.isfinite().all():
                raise UserError(f"{row.source} gives NaN or infinity; check it, or try --amp off")
            yield to_uint8(images)
            bar.update(len(images))


# --------------------------------------------------------------------------------------------------
# Figures


def measure_fid(config: Config, rows: list[Row], ranks: Ranks) -> dict[str, dict]:
    """FID of each row, printed as soon as it is known -> what --json keeps (on rank 0)."""
    kept = Path(config.statistics) if config.statistics else None
    reuse = kept is not None and kept.exists()
    if not ranks.agree(reuse):
        raise UserError(f"the ranks see different files; {kept} must be on a shared disk")
    with ranks.first_goes_first():  # rank 0 downloads
        source = config.reference or WORKLOADS[config.dataset].reference
        if not source:
            raise UserError("give the real images: --reference, a folder or statistics of them")
        source, network = fetch(source), None
        if source.is_dir() or not reuse:
            network = inception(config.inception, ranks.device)
    size = rows[0].net.image_shape[-1]
    reference = read_reference(source, network, config.batch_size, ranks, size)

    results = {}
    for row in rows:
        record = describe(row, config, ranks.device)
        if reuse:
            mu, sigma = read_statistics(kept, record)
        else:
            images = (batch.expand(-1, 3, -1, -1) for batch in draw(row, config, ranks))
            mu, sigma = feature_statistics(images, network, ranks)
        if ranks.rank > 0:
            continue
        fid = frechet_distance(mu, sigma, *reference)
        results[row.name] = {"fid": fid, "reference": str(source)} | record
        print(f"{row.source}: evaluations {row.evaluations}, seeds {record['seeds']}, vs. {source}")
        print(f"{row.name}: FID {fid:.2f} ({config.samples} images)", flush=True)
        if kept and not reuse:  # after the number: it may have cost hours
            write_tensors(kept, {"mu": mu, "sigma": sigma}, record)
    return results


def describe(row: Row, config: Config, device: torch.device) -> dict[str, str]:
    """All that the generated images' statistics depend on; goes into their file."""
    return {
        "dataset": config.dataset,
        "row": row.name,
        "weights": row.sha256,
        "evaluations": str(row.evaluations),
        "count": str(config.samples),
        "seeds": f"{config.seed_start}-{config.seed_start + config.samples - 1}",
        "device": device.type,  # a GPU's random numbers are not a CPU's
        "amp": config.amp,
        "inception": file_hash(Path(config.inception))[:8] if config.inception else INCEPTION_HASH,
    }


def read_statistics(path: Path, record: dict[str, str]) -> tuple[Tensor, Tensor]:
    """The mean and covariance that were kept with this record."""
    tensors, found = read_tensors(path)
    changed = [key for key in record if found.get(key) != record[key]]
    if changed:
        raise UserError(
            f"{path} holds statistics with another {', '.join(changed)}; "
            "choose another --statistics or delete it"
        )
    return tensors["mu"], tensors["sigma"]


def measure_digits(config: Config, rows: list[Row], ranks: Ranks) -> dict[str, dict]:
    """The three figures of each row, printed as soon as they are known -> what --json keeps."""
    share, labels, results = ranks.share(config.samples), torch.arange(config.samples) % 10, {}
    for row in rows:
        images = torch.zeros(config.samples, *WORKLOADS["mnist"].image_shape)
        mine = torch.cat(list(draw(row, config, ranks)))
        images[share.start : share.stop] = mine.float() / 127.5 - 1
        images = ranks.sum(images)  # the other ranks' are zero
        if ranks.rank > 0:
            continue
        results[row.name] = found = measure(images, labels, ranks.device)
        print(f"{row.source}: evaluations {row.evaluations}, {config.samples} images")
        fd, accuracy = f"FD {found['fd']:.2f}", f"accuracy {found['accuracy']:.2%}"
        print(f"{row.name}: {fd}, {accuracy}, diversity {found['diversity']:.3f}", flush=True)
    return results


# --------------------------------------------------------------------------------------------------
# Captions


def load_caption_rows(config: Config, ranks: Ranks) -> tuple[SDTeacher, dict[str, Row]]:
    """What encodes prompts and decodes latents, and rows that solve (z, text states) -> latents."""
    names, rows, dataset = config.rows or ("student",), {}, config.dataset or "sd15"
    if "untrained" in names:
        raise UserError("--rows of captions are student and teacher, not untrained")
    if "student" in names:
        path = find_generator(config.checkpoint)
        if not is_sd_unet(path):
            raise UserError(f"--captions is for text-to-image models, and {path} is none")
        G, metadata = load_generator(path)
        G, dataset = G.to(ranks.device, memory_format=torch.channels_last), metadata["dataset"]
        source = f"{path} (step {metadata.get('step', '?')})"
        rows["student"] = Row("student", G, 1, source, file_hash(path), G.mu.net)
    given = {"decoder": "full", "teacher": config.teacher_weights, "guidance": config.guidance}
    given |= {"solver_steps": config.steps}
    workload = get_workload(dataset, **{k: v for k, v in given.items() if v is not None})
    if not workload.latent:
        raise UserError(f"--captions is for text-to-image models, not for {dataset}")
    teacher = load_teacher(workload, with_unet="teacher" in names).to(ranks.device, config.amp)
    if "teacher" in names:
        steps, record = workload.solver_steps, teacher.record
        solve, count = partial(teacher.solve, steps=steps), teacher.evaluations(steps)
        source = f"{record['name']}, guidance {workload.guidance:g}"
        rows["teacher"] = Row("teacher", solve, count, source, record["sha256"], teacher.sd.unet)
    return teacher, {name: rows[name] for name in names}


def measure_captions(config: Config, ranks: Ranks) -> dict[str, dict]:
    """Draw what is missing, and measure it -> what --json keeps (on rank 0)."""
    refuse(config, ONLY_FID, "captions")
    captions = read_prompts(Path(config.captions))
    count = config.samples or len(captions)
    if count > len(captions):
        raise UserError(f"{config.captions} holds {len(captions)} captions, not {count}")
    real = Path(config.reference) if config.reference else None
    if real:
        list_images(real)  # or an error
        optional("cleanfid", "clean-fid")  # before hours of drawing
    if config.clip_score:
        optional("open_clip", "open_clip_torch")
    config = replace(config, amp=pick_amp(config.amp, ranks.device, "fp16"))
    with ranks.first_goes_first():  # rank 0 downloads
        teacher, rows = load_caption_rows(config, ranks)

    results = {}
    for row in rows.values():
        folder = Path(config.images) / row.name
        made = {"weights": row.sha256, "evaluations": row.evaluations, "source": row.source}
        made |= {"encoder": teacher.record["name"], "captions": file_hash(Path(config.captions))}
        made |= {"seed": config.seed, "amp": config.amp, "device": ranks.device.type}
        if ranks.rank == 0:
            claim_folder(folder, "meta.json", made | {"count": count}, may_grow=("count",))
        ranks.barrier()

        def draw_pictures(numbers: list[int], row: Row = row) -> Tensor:
            """Pictures k: functions of (seed, k, caption k)."""
            z = sample_noise("evaluation", config.seed, numbers, row.net.image_shape)
            with torch.inference_mode(), autocast(ranks.device, config.amp):
                cond = teacher.encode([captions[k] for k in numbers])
                return teacher.decode(row.solve(z.to(ranks.device), cond))

        draw_missing(folder, count, draw_pictures, config.batch_size or 4, ranks)
        if ranks.rank > 0:
            continue
        found = {"ms_per_image": latency(lambda k: draw_pictures([k[0] % count]))}
        figures = [f"{found['ms_per_image']:.1f} ms per image (batch 1)"]
        if real:
            found["fid"] = folder_fid(folder, real, ranks.device)
            figures.append(f"FID {found['fid']:.2f}")
        if config.clip_score:
            found["clip_score"] = clip_score(folder, captions[:count], ranks.device)
            figures.append(f"CLIP score {found['clip_score']:.3f}")
        results[row.name] = found | made | {"count": count}
        print(f"{row.source}: evaluations {row.evaluations}, see {preview(folder, count)}")
        print(f"{row.name}: {', '.join(figures)} ({count} images)", flush=True)
    return results


def main(config: Config) -> None:
    """Print the figures, and write them as JSON."""
    ranks = join_ranks(config.device)
    if config.captions:
        results = measure_captions(config, ranks)
    else:
        with ranks.first_goes_first():  # rank 0 downloads
            config, rows = load_rows(config, ranks.device)
        measure_rows = measure_digits if config.dataset == "mnist" else measure_fid
        results = measure_rows(config, rows, ranks)
    if config.json and ranks.rank == 0:
        write_json(Path(config.json), results)
    ranks.barrier()  # all leave together


if __name__ == "__main__":
    run_script(main, Config, __doc__)
