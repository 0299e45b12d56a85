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
take --seed 50000 and 100000. The last line:

    student: FID 2.62 (50000 images)

Stable Diffusion: a picture for each of COCO's captions, or of your own (plumbing/captions.py), kept
in a folder, so that an interrupted command goes on. The last line, with a folder of real images and
--clip-score (each needs an optional package):

    student: ... ms per image (batch 1), FID ..., CLIP score ... (30000 images)

MNIST (minutes on 2 CPU cores, the student alone less than one): three figures, for all rows
on the same noises and labels, and the last line:

    student: FD 0.99, accuracy 98.25%, diversity 0.971

    FD         Frechet distance between Gaussians fitted to features of generated and of test images
               (as FID, but the features are a small MNIST classifier's: not comparable with FID)
    accuracy   share of images that the classifier assigns to the class they were made for
    diversity  mean pairwise distance of images within a class, over that of test images
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from plumbing.captions import clip_score, draw_missing, folder_fid, latency, optional, preview
from plumbing.devices import AMP, Ranks, autocast, join_ranks, pick_amp
from plumbing.digits import measure
from plumbing.downloads import fetch
from plumbing.drawing import to_uint8
from plumbing.fid import (
    feature_statistics,
    frechet_distance,
    inception,
    list_images,
    read_reference,
    seeded_inputs,
)
from plumbing.files import file_hash, write_json
from plumbing.options import Options, UserError, option, run_script
from plumbing.pairs import read_prompts, sample_noise
from plumbing.rundir import claim_folder
from teachers import (
    Teacher,
    check_teaches,
    find_generator,
    is_sd_unet,
    load_generator,
    load_teacher,
)
from workloads import WORKLOADS, Workload, get_workload

ROWS = ("untrained", "teacher", "student")


@dataclass
class Config(Options):
    """What to measure, and how."""

    checkpoint: str | None = option(
        None, "a run folder, a file, https://... or hf://... (default: the last run, or what ships)"
    )
    dataset: str | None = option(None, "of a teacher without a generator", tuple(WORKLOADS))
    captions: str | None = option(None, "sd15: text file, one caption a line (.gz too)")
    rows: tuple[str, ...] = option((), "what to measure (default: student; mnist: all)", ROWS)
    samples: int | None = option(None, "images a row (50000; mnist: 10000; sd15: all)", least=1)
    seed: int = option(0, "of the noises; FID: of the first image", least=0, below=2**64)
    reference: str | None = option(None, "FID: real images' .npz, or a folder (default: EDM's)")
    out: str = option("captions", "sd15: folder of the pictures, a folder a row")
    clip_score: bool = option(False, "sd15: CLIP score too")
    teacher_weights: str | None = option(None, "teacher weights (default: the dataset's own)")
    steps: int | None = option(None, "of the teacher's solver (default: the dataset's)", least=1)
    guidance: float | None = option(None, "sd15: of the teacher (default: the dataset's)", above=0)
    amp: str = option("off", "half precision of generator and teacher: bf16, fp16, ...", AMP)
    batch_size: int | None = option(None, "images at a time (default: 100; sd15: 4)", least=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    json: str | None = option(None, "write the numbers to this file too")
    prompts: tuple[str, ...] = ()  # what the file of --captions holds


def complete(config: Config, workload: Workload, device: torch.device) -> Config:
    """Fill in what the workload and the device decide; refuse what does not fit."""
    mnist, latent = workload.dataset == "mnist", workload.latent
    for name, vain in {"reference": mnist, "out": not latent, "clip_score": not latent}.items():
        if vain and getattr(config, name) != getattr(Config, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is not for {workload.dataset}; leave it away")
    rows = config.rows or (ROWS if mnist else ("student",))
    prompts = read_prompts(Path(config.captions)) if latent else ()
    samples = config.samples or len(prompts) or (10_000 if mnist else 50_000)
    reference = config.reference or workload.reference
    if latent and samples > len(prompts):
        raise UserError(f"{config.captions} holds {len(prompts)} captions, not {samples}")
    if latent and "untrained" in rows:
        raise UserError("--rows of captions are student and teacher, not untrained")
    if latent and reference:  # now, not after hours of drawing
        list_images(Path(reference))  # or an error
        optional("cleanfid", "clean-fid")
    if config.clip_score:
        optional("open_clip", "open_clip_torch")
    if not (mnist or latent or reference):
        raise UserError("give the real images: --reference, a folder or statistics of them")
    least = 200 if mnist else 2 if reference else 1  # mnist: for a covariance of 128 features
    if samples < least:
        raise UserError(f"--samples must be at least {least}, not {samples}")
    return replace(
        config, dataset=workload.dataset, rows=rows, samples=samples, prompts=tuple(prompts),
        reference=reference, batch_size=config.batch_size or (4 if latent else 100),
        amp=pick_amp(config.amp, device, workload.half), teacher_weights=workload.teacher,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Rows


class Row(NamedTuple):
    """One thing to measure."""

    name: str  # one of ROWS
    # noise (B, C, H, W); labels (B,), prompts or None -> images, about [-1, 1]
    solve: Callable
    evaluations: int  # of the network, for one image
    source: str  # the file of its weights, for the reader
    sha256: str  # the file's hash
    net: nn.Module  # which has the shape of the noise, and EDM's the number of classes


def load_rows(config: Config, device: torch.device) -> tuple[Config, list[Row]]:
    """The complete config, and what its rows ask for, on the device."""
    dataset, path, rows = config.dataset, None, {}
    if config.checkpoint or "student" in (config.rows or ROWS) or not (dataset or config.captions):
        path = find_generator(config.checkpoint)
    latent = is_sd_unet(path) if path else WORKLOADS[dataset or "sd15"].latent
    if latent and not config.captions:
        raise UserError("a text-to-image model is measured on captions; give a file of --captions")
    if config.captions and not latent:
        raise UserError(f"--captions is for text-to-image models, not for {path or dataset}")
    if path:
        G, metadata = load_generator(path)
        if dataset not in (None, metadata["dataset"]):
            raise UserError(
                f"{path} makes {metadata['dataset']}, not {dataset}; choose another --checkpoint"
            )
        dataset, G = metadata["dataset"], G.to(device, memory_format=torch.channels_last)
        source = f"{path} (step {metadata.get('step', '?')})"
        rows["student"] = Row("student", G, 1, source, file_hash(path), G.mu.net)
    given = {"teacher": config.teacher_weights, "solver_steps": config.steps}
    given |= {"guidance": config.guidance, "decoder": "full"}
    given = {name: value for name, value in given.items() if value is not None}
    workload = get_workload(dataset or "sd15", **given)
    config = complete(config, workload, device)  # before a teacher is downloaded in vain
    of_teacher = set(config.rows) != {"student"}
    if latent or of_teacher:
        teacher = load_teacher(workload, with_unet=of_teacher).to(device, config.amp)
    if of_teacher:
        if "student" in config.rows and "teacher" not in given:
            check_teaches(teacher, metadata, path)
        source, sha256 = teacher.record["name"], teacher.record["sha256"]
        source += f", guidance {workload.guidance:g}" if latent else ""
        net = teacher.sd.unet if latent else teacher.mu_real.net
        for name, steps in (("teacher", workload.solver_steps), ("untrained", 1)):
            solve = partial(teacher.solve, steps=steps)
            rows[name] = Row(name, solve, teacher.evaluations(steps), source, sha256, net)
    chosen = [rows[name] for name in config.rows]
    if latent:  # from prompts to pictures
        chosen = [row._replace(solve=partial(text_to_image, teacher, row.solve)) for row in chosen]
    return config, chosen


def text_to_image(teacher: Teacher, solve: Callable, z: Tensor, prompts: list[str]) -> Tensor:
    """Noise (B, 4, H, W) and prompts -> images (B, 3, 8H, 8W), about [-1, 1]."""
    return teacher.decode(solve(z, teacher.encode(prompts)))


@torch.inference_mode()
def draw(row: Row, config: Config, device: torch.device, numbers: Sequence[int]) -> Tensor:
    """Images k in numbers, (B, C, H, W), about [-1, 1]: each a function of (seed, k), and of
    caption k if there are captions."""
    shape = row.net.image_shape
    if config.prompts or config.dataset == "mnist":
        z = sample_noise("evaluation", config.seed, numbers, shape)
        labels = torch.tensor(numbers, device=device) % 10
        cond = [config.prompts[k] for k in numbers] if config.prompts else labels
    else:
        seeds = [config.seed + k for k in numbers]
        z, cond = seeded_inputs(seeds, shape, row.net.label_dim, device)
    with autocast(device, config.amp):
        images = row.solve(z.to(device, memory_format=torch.channels_last), cond)
    if not images.isfinite().all():
        raise UserError(f"{row.source} gives NaN or infinity; check it, or try --amp off")
    return images


def draw_share(row: Row, config: Config, ranks: Ranks) -> Iterator[Tensor]:
    """This rank's share of a row's images, batch by batch: uint8 (B, C, H, W), on its device."""
    share = ranks.share(config.samples)
    with tqdm(total=len(share), desc=row.name, unit="image", disable=ranks.rank > 0) as bar:
        for start in range(0, len(share), config.batch_size):
            numbers = share[start : start + config.batch_size]
            yield to_uint8(draw(row, config, ranks.device, numbers))
            bar.update(len(numbers))


def describe(row: Row, config: Config, device: torch.device) -> dict:
    """All that a row's images depend on; goes into their folder, and with their figures."""
    about = {
        "dataset": config.dataset, "row": row.name, "source": row.source, "weights": row.sha256,
        "evaluations": row.evaluations, "count": config.samples, "seed": config.seed,
        "amp": config.amp, "device": device.type,  # a GPU's random numbers are not a CPU's
    }  # fmt: skip
    if config.captions:
        about |= {"captions": file_hash(Path(config.captions)), "encoder": config.teacher_weights}
    return about


# --------------------------------------------------------------------------------------------------
# Figures of one row: as numbers, and as text. On rank 0; the others have none


def measure_digits(row: Row, config: Config, ranks: Ranks) -> tuple[dict, str]:
    """FD, accuracy and diversity."""
    share = ranks.share(config.samples)
    images = torch.zeros(config.samples, *row.net.image_shape)
    mine = torch.cat(list(draw_share(row, config, ranks)))
    images[share.start : share.stop] = mine.float() / 127.5 - 1
    images = ranks.sum(images)  # the other ranks' are zero
    if ranks.rank > 0:
        return {}, ""
    found = measure(images, torch.arange(config.samples) % 10, ranks.device)
    text = "FD {fd:.2f}, accuracy {accuracy:.2%}, diversity {diversity:.3f}"
    return found, text.format(**found)


def prepare_fid(config: Config, size: int, ranks: Ranks) -> dict:
    """For all rows: Inception, and the statistics of the real images (size x size in a folder)."""
    with ranks.first_goes_first():  # rank 0 downloads
        path, network = fetch(config.reference), inception(ranks.device)
    real = read_reference(path, network, config.batch_size, ranks, size)
    return {"network": network, "real": real}


def measure_fid(
    row: Row, config: Config, ranks: Ranks, network: nn.Module, real: tuple[Tensor, Tensor]
) -> tuple[dict, str]:
    """FID to real images of this mean (2048,) and covariance (2048, 2048)."""
    images = (batch.expand(-1, 3, -1, -1) for batch in draw_share(row, config, ranks))
    drawn = feature_statistics(images, network, ranks)
    if ranks.rank > 0:
        return {}, ""
    found = {"fid": frechet_distance(*drawn, *real), "reference": config.reference}
    return found, f"FID {found['fid']:.2f} ({config.samples} images)"


def measure_captions(row: Row, config: Config, ranks: Ranks) -> tuple[dict, str]:
    """Draw the pictures that are missing -> latency, FID and CLIP score."""
    folder = Path(config.out) / row.name
    if ranks.rank == 0:
        about = describe(row, config, ranks.device)
        claim_folder(folder, "meta.json", about, may_grow=("count",))
    ranks.barrier()
    draw_row = partial(draw, row, config, ranks.device)
    draw_missing(folder, config.samples, draw_row, config.batch_size, ranks)
    if ranks.rank > 0:
        return {}, ""
    found = {"ms_per_image": latency(lambda: draw_row([0]))}
    text = f"{found['ms_per_image']:.1f} ms per image (batch 1)"
    if config.reference:
        found["fid"] = folder_fid(folder, Path(config.reference), ranks.device)
        text += f", FID {found['fid']:.2f}"
    if config.clip_score:
        found["clip_score"] = clip_score(folder, config.prompts[: config.samples], ranks.device)
        text += f", CLIP score {found['clip_score']:.3f}"
    print(f"wrote {preview(folder, config.samples)}")
    return found, f"{text} ({config.samples} images)"


def main(config: Config) -> None:
    """Print the figures of each row as soon as they are known, and write them as JSON."""
    ranks, results = join_ranks(config.device), {}
    with ranks.first_goes_first():  # rank 0 downloads
        config, rows = load_rows(config, ranks.device)
    if config.captions or config.dataset == "mnist":
        measure_row = measure_captions if config.captions else measure_digits
    else:
        size = rows[0].net.image_shape[-1]
        measure_row = partial(measure_fid, **prepare_fid(config, size, ranks))
    for row in rows:
        found, text = measure_row(row, config, ranks)
        if ranks.rank > 0:
            continue
        results[row.name] = found | describe(row, config, ranks.device)
        how = f"evaluations {row.evaluations}, {config.samples} images, seed {config.seed}"
        print(f"{row.source}: {how}\n{row.name}: {text}", flush=True)
    if config.json and ranks.rank == 0:
        write_json(Path(config.json), results)
    ranks.barrier()  # all leave together


if __name__ == "__main__":
    run_script(main, Config, __doc__)
