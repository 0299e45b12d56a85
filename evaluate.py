"""Measure the one-step generator and its teacher.

    python evaluate.py                    the newest run, or the shipped MNIST generator
    python evaluate.py --rows student     without the teacher, which is slow
    torchrun --nproc-per-node 8 evaluate.py --checkpoint runs/imagenet64
    torchrun --nproc-per-node 8 evaluate.py --dataset imagenet64 --rows teacher --steps 256
    torchrun --nproc-per-node 8 evaluate.py --checkpoint runs/sd15 --captions captions.txt \
        --reference val2014 --clip-score

A row of the results is the student (1 evaluation of the network), the teacher (2 N - 1 evaluations
in N Heun steps) or the untrained student (G before training, which is one step of the teacher).

CIFAR-10 and ImageNet-64: FID by EDM's protocol (see plumbing/fid.py). EDM measures it three times:
add --seed 50000 for the second and --seed 100000 for the third. The last line:

    student: FID 2.62 (50000 images)

Stable Diffusion: one picture for each caption, COCO's or your own (see plumbing/captions.py). The
pictures are kept, so an interrupted command resumes. FID needs a folder of real images. FID and
--clip-score each need an optional package. The last line:

    student: ... ms per image (batch 1), FID ..., CLIP score ... (30000 images)

MNIST (minutes on 2 CPU cores, less than one for the student alone): the first three metrics
of docs/details.md. All rows have the same noises and labels. The last line:

    student: FD 0.99, accuracy 98.25%, diversity 0.971
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from plumbing import fid
from plumbing.captions import clip_score, draw_missing, folder_fid, latency, load_judge, preview
from plumbing.devices import AMP, Ranks, autocast, join_ranks, pick_amp
from plumbing.digits import measure
from plumbing.downloads import fetch
from plumbing.drawing import only_to_look_at, to_uint8
from plumbing.files import file_hash, write_json
from plumbing.options import Options, UserError, option, run_script
from plumbing.pairs import read_prompts, sample_noise
from plumbing.rundir import claim_folder
from teachers import find_generator, is_sd_unet, load_generator, load_teacher, origin, workload_of
from workloads import WORKLOADS, Workload

ROWS = ("untrained", "teacher", "student")


@dataclass
class Config(Options):
    """What to measure, and how."""

    checkpoint: str | None = option(None, "folder, file, https:// or hf:// (default: newest run)")
    dataset: str | None = option(None, "measure its teacher, without a generator", tuple(WORKLOADS))
    captions: str | None = option(None, "sd15: text file or .gz, one caption per line")
    rows: tuple[str, ...] = option((), "what to measure (default: student; mnist: all)", ROWS)
    samples: int | None = option(None, "images per row (50000; mnist: 10000; sd15: all)", least=1)
    seed: int = option(0, "seed of the noise; FID: of the first image", least=0, below=2**64)
    reference: str | None = option(None, "FID: .npz or folder of real images (default: EDM's .npz)")
    out: str = option("captions", "sd15: folder of the pictures, with a subfolder per row")
    clip_score: bool = option(False, "sd15: also measure the CLIP score")
    teacher_weights: str | None = option(None, "default: the generator's, or the dataset's own")
    steps: int | None = option(None, "steps of the teacher (default: the dataset's)", least=1)
    guidance: float | None = option(None, "sd15: the teacher's (default: the generator's)", above=0)
    amp: str | None = option(None, "half precision (default: for sd15 on a GPU)", AMP)
    batch_size: int | None = option(None, "images at a time (default: 100; sd15: 4)", least=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    json: str | None = option(None, "also write the figures to this file")
    prompts: tuple[str, ...] = ()  # the contents of --captions


def complete(config: Config, workload: Workload, device: torch.device) -> Config:
    """Fill in what depends on the workload and the device, and check that the options fit."""
    mnist, latent = workload.dataset == "mnist", workload.latent
    for name, unused in {"reference": mnist, "out": not latent, "clip_score": not latent}.items():
        if unused and getattr(config, name) != getattr(Config, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is not for {workload.dataset}; omit it")
    rows = config.rows or (ROWS if mnist else ("student",))
    prompts = read_prompts(Path(config.captions)) if latent else ()
    samples = config.samples or len(prompts) or (10_000 if mnist else 50_000)
    reference = config.reference or workload.reference
    if latent and samples > len(prompts):
        raise UserError(f"{config.captions} holds {len(prompts)} captions, not {samples}")
    if latent and "untrained" in rows:
        raise UserError("with --captions, --rows takes student and teacher, not untrained")
    if not (mnist or latent or reference):
        raise UserError("give the real images: --reference, a folder or an .npz of statistics")
    least = 200 if mnist else 2 if reference else 1  # mnist: a covariance of 128 features
    if samples < least:
        raise UserError(f"--samples must be at least {least}, not {samples}")
    if latent and reference:  # fail now, not after hours of drawing
        fid.list_images(Path(reference))
        load_judge("clean-fid", torch.device("cpu"))
    if config.clip_score:
        load_judge("open_clip_torch", torch.device("cpu"))
    return replace(
        config, dataset=workload.dataset, rows=rows, samples=samples, prompts=tuple(prompts),
        reference=reference, batch_size=config.batch_size or (4 if latent else 100),
        amp=pick_amp(config.amp or workload.solver_amp, device, workload.half),
        teacher_weights=workload.teacher,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Rows


@dataclass(frozen=True)
class Row:
    """One thing to measure."""

    name: str  # one of ROWS
    solve: Callable  # noise (B, C, H, W); labels (B,), prompts or None -> images, about [-1, 1]
    evaluations: int  # of the network, per image
    source: str  # where its weights come from, as printed
    sha256: str  # hash of the file of weights
    net: nn.Module  # has image_shape, (C, H, W) of the noise; EDM's also has label_dim


def load_rows(config: Config, device: torch.device) -> tuple[Config, list[Row]]:
    """Load the rows that the config asks for -> the completed config, the rows on the device."""
    dataset, path, rows = config.dataset, None, {}
    if config.checkpoint or "student" in (config.rows or ROWS) or not (dataset or config.captions):
        path = find_generator(config.checkpoint)
    latent = is_sd_unet(path) if path else WORKLOADS[dataset or "sd15"].latent
    if latent and not config.captions:
        raise UserError("a text-to-image model needs captions; give a file of --captions")
    if config.captions and not latent:
        raise UserError(f"--captions is for text-to-image models, not for {path or dataset}")
    G, metadata = load_generator(path) if path else (None, {"dataset": dataset or "sd15"})
    if dataset not in (None, made := metadata["dataset"]):
        raise UserError(f"{path} makes {made}, not {dataset}; choose another --checkpoint")
    given, record = config.teacher_weights, {}
    workload = workload_of(
        metadata, bool({*config.rows} - {"student"}), teacher=given, guidance=config.guidance,
        solver_steps=config.steps, decoder="full",
    )  # fmt: skip
    config = complete(config, workload, device)  # reports mistakes before a teacher is downloaded
    with_teacher = set(config.rows) != {"student"}
    if latent or with_teacher:  # a student of sd15 needs the text encoder and the decoder
        teacher = load_teacher(workload, with_unet=with_teacher).to(device, config.amp)
        record = teacher.record
    if path:
        G = G.to(device, memory_format=torch.channels_last)
        source = origin(path, metadata, workload, record, bool(given))
        rows["student"] = Row("student", G, 1, source, file_hash(path), G.mu.net)
    if with_teacher:
        source, sha256 = teacher.record["name"], teacher.record["sha256"]
        source += f", guidance {workload.guidance:g}" if latent else ""
        net = teacher.sd.unet if latent else teacher.mu_real.net
        for name, steps in (("teacher", workload.solver_steps), ("untrained", 1)):
            solve = partial(teacher.solve, steps=steps)
            rows[name] = Row(name, solve, teacher.evaluations(steps), source, sha256, net)
    chosen = [rows[name] for name in config.rows]
    if latent:
        chosen = [replace(r, solve=partial(text_to_image, teacher, r.solve)) for r in chosen]
    return config, chosen


def text_to_image(teacher, solve: Callable, z: Tensor, prompts: list[str]) -> Tensor:
    """Noise (B, 4, H, W) and prompts -> images (B, 3, 8H, 8W), about [-1, 1]."""
    return teacher.decode(solve(z, teacher.encode(prompts)))


@torch.inference_mode()
def draw(row: Row, config: Config, device: torch.device, numbers: Sequence[int]) -> Tensor:
    """Draw images (B, C, H, W), about [-1, 1]. Image k depends on the seed, k and caption k."""
    shape = row.net.image_shape
    if config.prompts or config.dataset == "mnist":
        z = sample_noise("evaluation", config.seed, numbers, shape)
        labels = torch.tensor(numbers, device=device) % 10
        cond = [config.prompts[k] for k in numbers] if config.prompts else labels
    else:
        seeds = [config.seed + k for k in numbers]
        z, cond = fid.seeded_inputs(seeds, shape, row.net.label_dim, device)
    with autocast(device, config.amp):
        return row.solve(z.to(device, memory_format=torch.channels_last), cond)


def draw_share(row: Row, config: Config, ranks: Ranks) -> Iterator[Tensor]:
    """Draw this rank's share of a row, batch by batch: uint8 (B, C, H, W), on its device."""
    share = ranks.share(config.samples)
    for i in tqdm(range(0, len(share), config.batch_size), desc=row.name, disable=ranks.rank > 0):
        yield to_uint8(draw(row, config, ranks.device, share[i : i + config.batch_size]))


def describe(row: Row, config: Config, device: torch.device) -> dict:
    """Everything that a row's images depend on, to be stored with the figures or the images."""
    about = {
        "dataset": config.dataset, "row": row.name, "source": row.source, "weights": row.sha256,
        "evaluations": row.evaluations, "count": config.samples, "seed": config.seed,
        "amp": config.amp, "device": device.type,  # a GPU draws other random numbers than a CPU
    }  # fmt: skip
    if config.captions:
        about |= {"captions": file_hash(Path(config.captions)), "encoder": config.teacher_weights}
    return about


# --------------------------------------------------------------------------------------------------
# The figures of one row, as numbers and as text, on rank 0; ({}, "") on the other ranks


def measure_digits(row: Row, config: Config, ranks: Ranks) -> tuple[dict, str]:
    """FD, accuracy and diversity."""
    share = ranks.share(config.samples)
    images = torch.zeros(config.samples, *row.net.image_shape)
    images[share.start : share.stop] = torch.cat(list(draw_share(row, config, ranks))) / 127.5 - 1
    images = ranks.sum(images)  # each rank has zeros where the others have images
    if ranks.rank > 0:
        return {}, ""
    found = measure(images, torch.arange(config.samples) % 10, ranks.device)
    return found, "FD {fd:.2f}, accuracy {accuracy:.2%}, diversity {diversity:.3f}".format(**found)


def measure_fid(row: Row, config: Config, ranks: Ranks, network, real) -> tuple[dict, str]:
    """FID. `network` comes from fid.inception, and `real` from fid.read_reference."""
    images = (batch.expand(-1, 3, -1, -1) for batch in draw_share(row, config, ranks))
    drawn = fid.feature_statistics(images, network, ranks)
    if ranks.rank > 0:
        return {}, ""
    found = {"fid": fid.frechet_distance(*drawn, *real), "reference": config.reference}
    return found, f"FID {found['fid']:.2f} ({config.samples} images)"


def measure_captions(row: Row, config: Config, ranks: Ranks) -> tuple[dict, str]:
    """Draw the missing pictures, and measure latency, FID and CLIP score."""
    folder = Path(config.out) / row.name
    if ranks.rank == 0:
        claim_folder(folder, "meta.json", describe(row, config, ranks.device), may_grow=("count",))
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
    with only_to_look_at(f"{folder}.png"):
        print(f"wrote {preview(folder, config.samples)}")
    return found, f"{text} ({config.samples} images)"


def main(config: Config) -> None:
    """Print the figures of each row as soon as they are known, and write them as JSON."""
    ranks, results = join_ranks(config.device), {}
    with ranks.first_goes_first():  # rank 0 downloads
        config, rows = load_rows(config, ranks.device)
    measure_row = measure_captions if config.captions else measure_digits
    if not (config.captions or config.dataset == "mnist"):
        if rows[0].net.image_shape[0] not in (1, 3):
            raise UserError("FID needs images of 1 or 3 channels; a network of others has none")
        with ranks.first_goes_first():  # rank 0 downloads
            path, network = fetch(config.reference), fid.inception(ranks.device)
        size = rows[0].net.image_shape[-1]
        real = fid.read_reference(path, network, config.batch_size, ranks, size)
        measure_row = partial(measure_fid, network=network, real=real)
    for row in rows:
        found, text = measure_row(row, config, ranks)
        if ranks.rank == 0:
            results[row.name] = found | describe(row, config, ranks.device)
            how = f"evaluations {row.evaluations}, {config.samples} images, seed {config.seed}"
            print(f"{row.source}: {how}\n{row.name}: {text}", flush=True)
    if config.json and ranks.rank == 0:
        write_json(Path(config.json), results)
    ranks.barrier()  # all leave together


if __name__ == "__main__":
    run_script(main, Config, __doc__)
