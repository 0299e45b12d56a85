"""Noise/image pairs on disk: what make_pairs.py writes and train.py reads.

A folder holds `meta.json` (dataset, teacher, solver, ... : how the pairs were made) and shards
`shard_00000.safetensors`, ... of `shard_size` pairs each, every one with

    z (N, C, H, W) float32      unit-variance noise
    y (N, C, H, W) float32      the teacher's ODE solution for it
    cond (N,) int64             class labels, absent for an unconditional teacher
    index (N,) int64            k of each pair; z is drawn from (seed, k) alone
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rundir import UserError, generator_for, read_json


def shard_path(folder: Path, shard: int) -> Path:
    """The file of one shard."""
    return folder / f"shard_{shard:05d}.safetensors"


def shard_range(meta: dict, shard: int) -> range:
    """The indices k of the pairs in one shard."""
    start = shard * meta["shard_size"]
    return range(start, min(start + meta["shard_size"], meta["num_pairs"]))


def num_shards(meta: dict) -> int:
    """How many shards hold all pairs."""
    return -(-meta["num_pairs"] // meta["shard_size"])


def sample_noise(seed: int, indices, shape: tuple[int, ...]) -> Tensor:
    """z of samples k in indices -> (len, *shape): each a function of (seed, k) alone.

    So sample k is the same whatever the batch size, the number of processes or the device.
    """
    return torch.stack([torch.randn(shape, generator=generator_for(seed, k)) for k in indices])


class Pairs:
    """The data set D of Eq. 9, read from disk as needed.

    Args:
        folder: as written by make_pairs.py.
        dataset, teacher: what the pairs must have been made for: a workload, {"name", "sha256"}.

    Raises:
        UserError: missing, incomplete or damaged pairs, or pairs made for something else.
    """

    def __init__(self, folder: Path, dataset: str, teacher: dict[str, str]):
        remedy = f"run: python make_pairs.py --dataset {dataset} --out {folder}"
        if not (folder / "meta.json").exists():
            raise UserError(f"no pairs in {folder}; {remedy}")
        self.folder, self.meta = folder, read_json(folder / "meta.json")
        try:
            made_for = self.meta["dataset"], self.meta["teacher"]["sha256"]
            shards = range(num_shards(self.meta))
        except (KeyError, TypeError, ZeroDivisionError):
            raise UserError(f"{folder}/meta.json is not one of make_pairs.py's; {remedy}") from None
        if made_for != (dataset, teacher["sha256"]):
            raise UserError(
                f"the pairs in {folder} were made for {made_for[0]} with another teacher or "
                f"dataset than {dataset} and {teacher['name']}; choose another --pairs folder"
            )
        missing = [s for s in shards if not shard_path(folder, s).exists()]
        if missing:
            raise UserError(f"{len(missing)} of {len(shards)} shards miss in {folder}; {remedy}")
        self.shards = [self._open(s) for s in shards]

    def _open(self, shard: int):
        path, expected = shard_path(self.folder, shard), len(shard_range(self.meta, shard))
        try:
            file = safe_open(str(path), framework="pt")
            found = file.get_slice("z").get_shape()[0], file.get_slice("y").get_shape()[0]
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is damaged ({error}); delete it and run make_pairs.py again"
            ) from None
        if found != (expected, expected):
            raise UserError(f"{path} holds {found[0]} pairs instead of {expected}; delete it")
        return file

    def __len__(self) -> int:
        return self.meta["num_pairs"]

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pairs k in indices -> z_ref, y_ref (B, C, H, W), cond (B,) or None."""
        rows = [divmod(k, self.meta["shard_size"]) for k in indices]

        def gather(name: str) -> Tensor:
            return torch.cat([self.shards[s].get_slice(name)[i : i + 1] for s, i in rows])

        cond = gather("cond") if "cond" in self.shards[0].keys() else None
        return gather("z"), gather("y"), cond
