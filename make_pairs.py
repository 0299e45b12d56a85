"""Make the noise/image pairs of the regression loss (Section 3.3, Eq. 9).

    python make_pairs.py

For every pair k, z ~ N(0, I) is drawn from (seed, k) and y is the teacher's deterministic ODE
solution for it (EDM's Heun solver). Labels go round the classes: pair k has class k mod classes.
MNIST: 2,000 pairs in about a minute on 2 CPU cores. Interrupt it at any time; the same command goes
on at the first missing shard. It leaves preview.png in the folder. The last line it prints:

    2000 pairs of mnist in pairs/mnist (preview: pairs/mnist/preview.png)
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from edm_unet import heun_sample
from pairs import num_shards, sample_noise, shard_path, shard_range
from rundir import (
    UserError,
    holds_files,
    option,
    pick_device,
    read_json,
    read_tensors,
    run_script,
    save_grid,
    write_json,
    write_tensors,
)
from workloads import WORKLOADS, get_workload, load_teacher


@dataclass
class Config:
    dataset: str = option("mnist", f"one of {', '.join(WORKLOADS)}")
    teacher: str | None = option(None, "teacher weights (default: the dataset's own)")
    num_pairs: int | None = option(None, "number of pairs (default: the dataset's)")
    steps: int | None = option(None, "Heun steps (default: the dataset's)")
    out: str | None = option(None, "output folder (default: pairs/DATASET)")
    seed: int = option(0, "seed: z of pair k is a function of (seed, k)")
    batch_size: int = option(250, "samples solved at a time")
    shard_size: int = option(250, "pairs per file")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")


def describe(config: Config, teacher: dict[str, str]) -> dict:
    """meta.json: everything that determines the pairs."""
    workload = get_workload(config.dataset)
    meta = {
        "dataset": config.dataset,
        "teacher": teacher,
        "solver": workload.solver,
        "steps": workload.solver_steps if config.steps is None else config.steps,
        "guidance": workload.guidance,
        "seed": config.seed,
        "num_pairs": workload.num_pairs if config.num_pairs is None else config.num_pairs,
        "shard_size": config.shard_size,
    }
    for name in ("steps", "num_pairs", "shard_size"):
        if meta[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {meta[name]}")
    if config.seed < 0:
        raise UserError(f"--seed must be at least 0, not {config.seed}")
    if config.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {config.batch_size}")
    return meta


def main(config: Config) -> None:
    """Solve the teacher's ODE for every missing shard."""
    workload, device = get_workload(config.dataset), pick_device(config.device)
    mu_real, teacher = load_teacher(config.dataset, config.teacher)
    net = mu_real.net.to(device, memory_format=torch.channels_last)
    out = Path(config.out or f"pairs/{config.dataset}")
    meta = describe(config, teacher)

    # The folder says how its pairs were made; others are never mixed in.
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

    missing = [s for s in range(num_shards(meta)) if not shard_path(out, s).exists()]
    done = meta["num_pairs"] - sum(len(shard_range(meta, s)) for s in missing)
    with tqdm(total=meta["num_pairs"], initial=done, desc="pairs", unit="pair") as progress:
        for shard in missing:
            indices = shard_range(meta, shard)
            z = sample_noise(config.seed, indices, workload.image_shape)
            tensors = {"z": z, "index": torch.tensor(indices)}
            cond = None
            if workload.num_classes:
                cond = tensors["cond"] = tensors["index"] % workload.num_classes

            solutions = []
            for start in range(0, len(indices), config.batch_size):
                rows = slice(start, start + config.batch_size)
                labels = None if cond is None else cond[rows].to(device)
                noise = z[rows].to(device, memory_format=torch.channels_last)
                solutions.append(heun_sample(net, noise, labels, meta["steps"]).cpu())
                progress.update(len(solutions[-1]))
            tensors["y"] = torch.cat(solutions)
            if not tensors["y"].isfinite().all():
                raise UserError(f"the teacher gave NaN or infinity in shard {shard}; check it")
            write_tensors(shard_path(out, shard), tensors, {"dataset": config.dataset})

    first, _ = read_tensors(shard_path(out, 0))
    count = min(100, len(first["y"]))
    save_grid(out / "preview.png", first["y"][:count], columns=min(10, count), scale=2)
    print(f"{meta['num_pairs']} pairs of {config.dataset} in {out} (preview: {out}/preview.png)")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
