"""Noise/image pairs on disk, and everything that is drawn at random.

A folder of pairs holds `meta.json`, which says how they were made (dataset, teacher, solver, ...),
and the shards `shard_00000.safetensors`, ... of `shard_size` pairs each, with these tensors:

    y (N, C, H, W)              the teacher's ODE solutions
    z (1, C, H, W) float32      the noise of the first pair. That of the others is drawn again
                                when it is needed. (Older folders hold all N.)
    cond (N,) int64             class labels, if the teacher is class-conditional
    index (N,) int64            k of each pair; z is a function of (seed, k) alone
    prompts (bytes,) uint8      a prompt a line, if there is text (older folders: in the metadata)
"""

import gzip
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from plumbing.files import one_line_errors, read_json, read_metadata
from plumbing.options import UserError

STREAMS = (
    "pairs",  # z of pair k
    "unpaired", "paired",  # what the two data streams of Algorithm 1 draw for row i of step k
    "pictures", "samples", "evaluation",  # z of the samples of train.py, sample.py, evaluate.py
    "toy", "assets",
)  # fmt: skip
OPEN_SHARDS = 2000  # at most, in one process; each is a memory map


def generator(stream: str, seed: int, step: int = 0, row: int = 0) -> np.random.Generator:
    """A generator for row i of step k in one of STREAMS, determined by these four numbers alone.

    Philox (Salmon et al. 2011, doi 10.1145/2063384.2063405) computes each number from a key, here
    (seed, stream), and a counter, which starts at (step, row, 0, 0). No two generators share both
    a key and a counter, whatever the seeds, so no number is used twice.
    """
    key = np.array([seed, STREAMS.index(stream)], np.uint64)
    counter = np.array([0, 0, row, step], np.uint64)  # lowest word first
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(draws: np.random.Generator, *shape: int) -> Tensor:
    """N(0, I) of this shape, float32."""
    return torch.from_numpy(draws.standard_normal(shape, np.float32))


def uniform(draws: np.random.Generator, *shape: int) -> Tensor:
    """Uniform in [0, 1), float64."""
    return torch.from_numpy(draws.random(shape))


def sample_noise(stream: str, seed: int, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """z of the samples k in `indices`, (len, *shape). It depends on (stream, seed, k) alone, not on
    the batch size, the number of processes or the device."""
    return torch.stack([normal(generator(stream, seed, row=k), *shape) for k in indices])


def draw_rows(
    stream: str, seed: int, step: int, rows: Sequence[int], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """For every row i of step k, draw three uniform numbers in [0, 1) -> (B, 3) float64, and normal
    ones -> (B, *shape) float32."""
    u, normals = torch.empty(len(rows), 3, dtype=torch.float64), torch.empty(len(rows), *shape)
    for i, row in enumerate(rows):
        draws = generator(stream, seed, step, row)
        u[i], normals[i] = uniform(draws, 3), normal(draws, *shape)
    return u, normals


def shards(folder: Path, meta: dict) -> list[tuple[Path, range]]:
    """The files of all shards, and the indices k of the pairs in each."""
    count, size = meta["num_pairs"], meta["shard_size"]
    return [
        (folder / f"shard_{start // size:05d}.safetensors", range(start, min(start + size, count)))
        for start in range(0, count, size)
    ]


class Pairs:
    """The data set D of Eq. 9, read from disk as needed.

    Args:
        folder: as written by make_pairs.py.
        dataset: the dataset that the pairs must belong to.
        first: the number of pairs to use, from the first one on; None: all.

    Attributes:
        meta: the contents of meta.json; text: whether the pairs have prompts.
    """

    def __init__(self, folder: Path, dataset: str, first: int | None = None):
        remedy = f"run: python make_pairs.py --dataset {dataset} --out {folder}"
        remedy += f" --num-pairs {first}" if first else ""
        file = folder / "meta.json"
        meta = read_json(file) if file.exists() else {}
        if "shard_size" not in meta:
            raise UserError(f"no pairs in {folder}; {remedy}")
        for name, least in {"num_pairs": 1, "shard_size": 1, "seed": 0, "guidance": 0}.items():
            value, kind = meta.get(name), float | int if name == "guidance" else int
            if not isinstance(value, kind) or not value >= least:
                raise UserError(f"{file}: {name} cannot be {value!r}; {remedy}")
        made, made_for = meta["num_pairs"], meta.get("dataset")
        if made_for != dataset:
            raise UserError(f"{folder} holds pairs of {made_for}, not of {dataset}; {remedy}")
        self.folder, self.meta, self.text = folder, meta, "prompts" in meta
        self.count, self.size = first or made, meta["shard_size"]
        if self.count > made:
            raise UserError(f"{folder} holds {made} pairs, but {first} are needed now; {remedy}")
        files = shards(folder, meta | {"num_pairs": self.count})
        missing = sum(count_pairs(path) < len(indices) for path, indices in files)
        if missing:
            what = f"{missing} of {len(files)} shards are missing in {folder}, or too short"
            raise UserError(f"{what}; {remedy}")
        self.shard = lru_cache(OPEN_SHARDS)(lambda s: open_shard(*files[s], meta["seed"]))

    def __len__(self) -> int:
        return self.count

    def check_teacher(self, teacher: dict[str, str]) -> None:
        """Raise UserError unless the pairs were made by this teacher, {"name", "sha256"}."""
        made_by = self.meta.get("teacher")
        if not isinstance(made_by, dict) or made_by.get("sha256") != teacher["sha256"]:
            what = f"the pairs in {self.folder} were made with another teacher than"
            advice = "choose another --pairs folder or that --teacher"
            raise UserError(f"{what} {teacher['name']}; {advice}")

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | list[str] | None]:
        """Pairs k of indices -> z_ref, y_ref (R, C, H, W) float32, labels (R,), prompts or None."""
        rows = [(self.shard(k // self.size)[0], k % self.size) for k in indices]
        first = self.shard(0)[0]

        def gather(name: str) -> Tensor:
            parts = [file.get_slice(name)[i : i + 1] for file, i in rows]
            return torch.cat(parts or [first.get_slice(name)[:0]])

        y = gather("y").float()
        z, seed = torch.empty_like(y), self.meta["seed"]
        for row, k, (file, i) in zip(z, indices, rows, strict=True):
            stored = file.get_slice("z")[i : i + 1]
            row[:] = (stored if len(stored) else sample_noise("pairs", seed, [k], row.shape))[0]
        cond = gather("cond") if "cond" in first.keys() else None
        return z, y, self.prompts(indices) if self.text else cond

    def prompts(self, indices: Sequence[int]) -> list[str]:
        """The prompts of pairs k of indices."""
        return [self.shard(k // self.size)[1][k % self.size] for k in indices]


def open_shard(path: Path, indices: range, seed: int) -> tuple[Any, list[str]]:
    """Open the shard of pairs k in `indices`, to be read piece by piece -> the file, its prompts.
    The noise that it does not hold must still be what NumPy draws: that of the first pair tells."""
    with one_line_errors(path):
        file = safe_open(str(path), framework="pt")
        z = file.get_slice("z")[:2]
        if len(z) == 1 and not z.equal(sample_noise("pairs", seed, indices[:1], z.shape[1:])):
            raise UserError("this version of NumPy draws other noise; make the pairs again")
        prompts = read_metadata(file).get("prompts", [])
        if "prompts" in file.keys():
            prompts = bytes(file.get_tensor("prompts").numpy()).decode().split("\n")
        return file, prompts


def count_pairs(path: Path) -> int:
    """The number of pairs in a shard, 0 if it does not exist."""
    if not path.exists():
        return 0
    with one_line_errors(path, "is damaged; delete it and run make_pairs.py again"):
        return safe_open(str(path), framework="pt").get_slice("y").get_shape()[0]


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 text file (.gz: compressed) that are not blank.

    Only a newline ends a line. Unicode's other line breaks become spaces.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with one_line_errors(path, "is no UTF-8 text, a prompt a line"), opened(path, "rb") as file:
        lines = file.read().decode("utf-8-sig").split("\n")
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt; give a text file, one prompt a line")
    return prompts
