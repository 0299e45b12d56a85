"""Make the noise/image pairs of the regression loss (Section 3.3, Eq. 9).

    python make_pairs.py                                                MNIST, 2 min on 2 CPU cores
    torchrun --nproc-per-node 8 make_pairs.py --dataset imagenet64      on eight GPUs
    python make_pairs.py --dataset sd15 --prompts captions.txt --guidance 3

Pair k is z ~ N(0, I), drawn from (seed, k), and y, the teacher's deterministic ODE solution for z.
The solver is EDM's Heun method or, for Stable Diffusion, guided PNDM, which gives latents. Classes
are used in turn (k mod their number), and so are the lines of --prompts. After an interruption, the
same command resumes at the first missing shard. The last line it prints:

    1000 pairs of mnist in pairs/mnist (preview: pairs/mnist/preview.png)
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from plumbing.devices import Ranks, autocast, join_ranks, pick_amp
from plumbing.drawing import only_to_look_at, save_grid
from plumbing.files import file_hash, read_tensors, write_tensors
from plumbing.options import UserError, run_script
from plumbing.pairs import count_pairs, read_prompts, sample_noise, shards
from plumbing.rundir import claim_folder
from teachers import Teacher, load_teacher
from workloads import Workload, get_workload

# The options of this command; workloads.py defines them.
FLAGS = """
    dataset teacher num_pairs solver_steps prompts guidance decoder out=pairs seed solver_amp
    solver_batch shard_size device
"""


def describe(config: Workload, record: dict[str, str]) -> dict:
    """meta.json: everything that determines the pairs."""
    meta = {"dataset": config.dataset, "teacher": record, "solver": config.solver}
    meta |= {"steps": config.solver_steps, "guidance": config.guidance, "amp": config.solver_amp}
    meta |= {"seed": config.seed, "num_pairs": config.num_pairs, "shard_size": config.shard_size}
    if config.latent:
        prompts = Path(config.prompts)
        meta["prompts"] = {"name": prompts.name, "sha256": file_hash(prompts)}
    return meta


def make_shard(
    indices: range, config: Workload, teacher: Teacher, prompts: list[str], ranks: Ranks, bar: tqdm
) -> tuple[dict[str, Tensor], dict]:
    """Solve the teacher's ODE for the pairs k in `indices` -> the shard's tensors and metadata."""
    z = sample_noise("pairs", config.seed, indices, teacher.image_shape)
    # The noise of the other pairs is drawn again when they are read.
    tensors, metadata = {"z": z[:1], "index": torch.tensor(indices)}, {"dataset": config.dataset}
    cond = None
    if teacher.num_classes:
        cond = tensors["cond"] = tensors["index"] % teacher.num_classes
    elif prompts:
        cond = [prompts[k % len(prompts)] for k in indices]
        tensors["prompts"] = torch.tensor(list("\n".join(cond).encode()), dtype=torch.uint8)

    solutions = []
    for start in range(0, len(indices), config.solver_batch):
        rows = slice(start, start + config.solver_batch)
        noise = z[rows].to(ranks.device, memory_format=torch.channels_last)
        with torch.no_grad(), autocast(ranks.device, config.solver_amp):
            encoded = teacher.encode(None if cond is None else cond[rows])
            solutions.append(teacher.solve(noise, encoded, config.solver_steps).cpu())
        bar.update(len(solutions[-1]))
    y = torch.cat(solutions)
    if not y.isfinite().all():
        raise UserError(f"NaN or infinity in pairs {indices[0]}-{indices[-1]}; check the teacher")
    # float16 halves y. It rounds latents, which have unit scale, by about 2^-11.
    tensors["y"] = y.half() if config.latent else y
    return tensors, metadata


@only_to_look_at("preview.png")
@torch.no_grad()
def draw_preview(path: Path, shard: Path, teacher: Teacher, device: torch.device) -> None:
    """Draw the first solutions y of a shard."""
    y = read_tensors(shard)[0]["y"].float()
    y = y[: 100 if y.shape[-1] <= 32 else 25]
    images = torch.cat([teacher.decode(one.to(device)).cpu() for one in y.split(1)])
    save_grid(path, images, math.isqrt(len(y)), scale=max(1, 64 // images.shape[-1]))


def report_too_long(cut_off: dict[str, str], ranks: Ranks) -> None:
    """Print how many prompts were too long, over all ranks, and what was cut off from one."""
    number = ranks.sum(torch.tensor(len(cut_off))).item()
    if ranks.rank == 0 and number:
        example = f": {next(iter(cut_off.values()))!r}, for example" if cut_off else ""
        print(f"{number} prompts were too long, and their ends are cut off{example}")


def main(config: Workload) -> None:
    """Solve the teacher's ODE for every missing shard. The ranks take the shards in turn."""
    prompts = read_prompts(Path(config.prompts)) if config.latent else []
    ranks = join_ranks(config.device)
    config = replace(config, solver_amp=pick_amp(config.solver_amp, ranks.device, config.half))
    with ranks.first_goes_first():
        teacher = load_teacher(config).to(ranks.device, config.solver_amp)
    out, meta = Path(config.pairs), describe(config, teacher.record)
    if ranks.rank == 0:
        claim_folder(out, "meta.json", meta, may_grow=("num_pairs",))
        if prompts and config.num_pairs > len(prompts):
            print(f"{config.num_pairs} pairs share {len(prompts)} prompts; --prompts gives others")
    ranks.barrier()

    missing = [(path, k) for path, k in shards(out, meta) if count_pairs(path) < len(k)]
    ranks.barrier()  # every rank has listed the missing shards before one is written
    mine = missing[ranks.rank :: ranks.count]
    total = sum(len(indices) for _, indices in mine)
    with tqdm(total=total, desc="pairs", unit="pair", disable=ranks.rank > 0) as bar:
        for path, indices in mine:
            write_tensors(path, *make_shard(indices, config, teacher, prompts, ranks, bar))
    ranks.barrier()
    if config.latent:
        report_too_long(teacher.sd.tokenizer.too_long, ranks)
    if ranks.rank == 0:
        first_shard, _ = shards(out, meta)[0]
        draw_preview(out / "preview.png", first_shard, teacher, ranks.device)
        print(f"{config.num_pairs} pairs of {config.dataset} in {out} (preview: {out}/preview.png)")
    ranks.barrier()  # no rank leaves early


if __name__ == "__main__":
    run_script(main, get_workload, __doc__, FLAGS)
