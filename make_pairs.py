"""Make the noise/image pairs of the regression loss (Section 3.3, Eq. 9).

    python make_pairs.py                                                MNIST, 2 min on 2 CPU cores
    torchrun --nproc-per-node 8 make_pairs.py --dataset imagenet64      on eight GPUs
    python make_pairs.py --dataset sd15 --prompts captions.txt --guidance 3 --amp fp16

For every pair k, z ~ N(0, I) is drawn from (seed, k) and y is the teacher's deterministic ODE
solution for it: EDM's Heun solver, or guided PNDM for Stable Diffusion (whose y are latents).
Labels go round the classes: pair k has class k mod classes; so do the lines of --prompts.
Interrupt it at any time; the same command goes on at the first missing shard. It leaves preview.png
in the folder. The last line it prints:

    2000 pairs of mnist in pairs/mnist (preview: pairs/mnist/preview.png)
"""

import gzip
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from plumbing.devices import AMP, Ranks, autocast, join_ranks, pick_amp
from plumbing.files import (
    file_hash,
    holds_files,
    read_json,
    read_tensors,
    save_grid,
    write_json,
    write_tensors,
)
from plumbing.options import Options, UserError, option, run_script
from plumbing.pairs import num_shards, sample_noise, shard_path, shard_range
from teachers import DECODERS, Teacher, load_teacher
from workloads import ASSETS, WORKLOADS, Workload, get_workload


@dataclass
class Config(Options):
    """Options at None take the dataset's value from workloads.py."""

    dataset: str = option("mnist", f"one of {', '.join(WORKLOADS)}")
    teacher: str | None = option(None, "teacher weights (default: the dataset's own)")
    num_pairs: int | None = option(None, "number of pairs (default: the dataset's)")
    steps: int | None = option(None, "steps of the solver (default: the dataset's)")
    prompts: str = option(
        str(ASSETS / "prompts.txt"), "sd15: text file, one prompt a line (.gz too)"
    )
    guidance: float | None = option(None, "sd15: scale of classifier-free guidance, 1 = none")
    decoder: str = option("tiny", "sd15: decoder of the preview", DECODERS)
    tiny_decoder: str | None = option(None, "sd15: folder or repository of it (default: TAESD)")
    out: str | None = option(None, "output folder (default: pairs/DATASET)")
    seed: int = option(0, "seed: z of pair k is a function of (seed, k)")
    amp: str = option("off", "half precision: bf16, fp16, off, or auto", AMP)
    batch_size: int | None = option(None, "samples solved at a time (default: 100; sd15: 8)")
    shard_size: int = option(250, "pairs per file")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, or of a .gz of one, that are not empty.

    Raises:
        UserError: missing, not text, or without any line.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a text file, one prompt a line") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None
    prompts = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt; give a text file, one prompt a line")
    return prompts


def describe(config: Config, teacher: Teacher, workload: Workload) -> dict:
    """meta.json: everything that determines the pairs."""
    meta = {
        "dataset": config.dataset,
        "teacher": teacher.record,
        "solver": workload.solver,
        "steps": workload.solver_steps if config.steps is None else config.steps,
        "guidance": config.guidance,
        "amp": config.amp,
        "seed": config.seed,
        "num_pairs": workload.num_pairs if config.num_pairs is None else config.num_pairs,
        "shard_size": config.shard_size,
    }
    if workload.latent:
        prompts = Path(config.prompts)
        meta["prompts"] = {"name": prompts.name, "sha256": file_hash(prompts)}
    return meta


def check(config: Config, workload: Workload) -> Config:
    """Fill in what the workload decides, and check the ranges.

    Raises:
        UserError: an option out of range, or one that the dataset does not have.
    """
    config = replace(config)
    if config.batch_size is None:
        config.batch_size = 8 if workload.latent else 100  # on CPUs, more is slower
    if config.guidance is None:
        config.guidance = workload.guidance
    elif not workload.latent:
        raise UserError(f"--guidance is for sd15; {config.dataset} has a teacher without text")
    for name in ("steps", "num_pairs", "shard_size", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if workload.solver == "pndm" and config.steps is not None and not 2 <= config.steps <= 999:
        raise UserError(f"--steps of {config.dataset} must be 2 to 999, not {config.steps}")
    if not config.guidance > 0:
        raise UserError(f"--guidance must be above 0, not {config.guidance}; 1 is no guidance")
    if config.seed < 0:
        raise UserError(f"--seed must be at least 0, not {config.seed}")
    return config


def claim_folder(out: Path, meta: dict) -> None:
    """Write meta.json. The folder says how its pairs were made; others are never mixed in.

    Raises:
        UserError: the folder holds something else, which is left alone.
    """
    if (out / "meta.json").exists():
        found = read_json(out / "meta.json")
        changed = [name for name in meta if found.get(name) != meta[name]]
        if changed:
            raise UserError(
                f"{out} holds pairs made with another {', '.join(changed)}; "
                "choose another --out or delete the folder"
            )
    elif holds_files(out):
        raise UserError(f"{out} holds other files; choose another --out")
    write_json(out / "meta.json", meta)


def make_shard(
    shard: int, meta: dict, config: Config, teacher: Teacher, prompts: list[str], ranks: Ranks, bar
) -> tuple[dict[str, Tensor], dict]:
    """Solve the teacher's ODE for the pairs of one shard -> tensors, metadata.

    Raises:
        UserError: NaN or infinity.
    """
    indices, workload = shard_range(meta, shard), get_workload(config.dataset)
    z = sample_noise(config.seed, indices, teacher.image_shape)
    tensors, metadata = {"z": z, "index": torch.tensor(indices)}, {"dataset": config.dataset}
    cond = None
    if workload.num_classes:
        cond = tensors["cond"] = tensors["index"] % workload.num_classes
    elif prompts:
        cond = metadata["prompts"] = [prompts[k % len(prompts)] for k in indices]

    solutions = []
    for start in range(0, len(indices), config.batch_size):
        rows = slice(start, start + config.batch_size)
        noise = z[rows].to(ranks.device, memory_format=torch.channels_last)
        with torch.no_grad(), autocast(ranks.device, config.amp):
            encoded = teacher.encode(None if cond is None else cond[rows])
            solutions.append(teacher.solve(noise, encoded, meta["steps"]).cpu())
        bar.update(len(solutions[-1]))
    y = torch.cat(solutions)
    if not y.isfinite().all():
        raise UserError(f"the teacher gave NaN or infinity in shard {shard}; check it")
    # Latents are of unit size, so float16 rounds them by 2^-11 of that; halves 500,000 pairs.
    tensors["y"] = y.half() if workload.latent else y
    return tensors, metadata


@torch.no_grad()
def draw_preview(out: Path, teacher: Teacher, device: torch.device) -> None:
    """preview.png: the first pairs' y."""
    y = read_tensors(shard_path(out, 0))[0]["y"].float()
    count = min(len(y), 100 if y.shape[-1] <= 32 else 25)
    images = [teacher.decode(one[None].to(device)).cpu() for one in y[:count]]
    scale = 2 if y.shape[-1] <= 32 and images[0].shape[-1] <= 64 else 1
    save_grid(out / "preview.png", torch.cat(images), math.isqrt(count), scale=scale)


def main(config: Config) -> None:
    """Solve the teacher's ODE for every missing shard; ranks take turns."""
    workload = get_workload(config.dataset)
    config = check(config, workload)
    prompts = read_prompts(Path(config.prompts)) if workload.latent else []
    ranks = join_ranks(config.device)
    config.amp = pick_amp(config.amp, ranks.device)
    with ranks.first_goes_first():
        teacher = load_teacher(
            config.dataset, config.teacher, guidance=config.guidance,
            decoder=config.decoder, tiny_source=config.tiny_decoder,
        ).to(ranks.device, config.amp)  # fmt: skip
    out = Path(config.out or f"pairs/{config.dataset}")
    meta = describe(config, teacher, workload)
    if ranks.rank == 0:
        claim_folder(out, meta)
    ranks.barrier()

    missing = [s for s in range(num_shards(meta)) if not shard_path(out, s).exists()]
    ranks.barrier()  # all have looked before the first shard is written
    mine = missing[ranks.rank :: ranks.count]
    total = sum(len(shard_range(meta, s)) for s in mine)
    with tqdm(total=total, desc="pairs", unit="pair", disable=ranks.rank > 0) as bar:
        for shard in mine:
            write_tensors(
                shard_path(out, shard),
                *make_shard(shard, meta, config, teacher, prompts, ranks, bar),
            )
    ranks.barrier()
    if ranks.rank == 0:
        draw_preview(out, teacher, ranks.device)
        count = meta["num_pairs"]
        print(f"{count} pairs of {config.dataset} in {out} (preview: {out}/preview.png)")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
