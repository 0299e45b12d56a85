"""Noise/image pairs on disk, and everything that is drawn at random.

A folder of pairs holds `meta.json`, which says how they were made (dataset, teacher, solver, ...),
and the shards `shard_00000.safetensors`, ... of `shard_size` pairs each, with these tensors:

    z (N, C, H, W) float32      unit-variance noise
    y (N, C, H, W)              the teacher's ODE solution for it
    cond (N,) int64             class labels, if the teacher is class-conditional
    index (N,) int64            k of each pair; z is a function of (seed, k) alone

If the teacher is text-conditional, a shard's metadata holds its N prompts.
"""

import gzip
import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

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
        meta: the contents of meta.json; prompts: those of all pairs, empty without text.
    """

    def __init__(self, folder: Path, dataset: str, first: int | None = None):
        remedy = f"run: python make_pairs.py --dataset {dataset} --out {folder}"
        remedy += f" --num-pairs {first}" if first else ""
        meta = read_json(folder / "meta.json") if (folder / "meta.json").exists() else {}
        if "shard_size" not in meta:
            raise UserError(f"no pairs in {folder}; {remedy}")
        made, made_for = meta["num_pairs"], meta["dataset"]
        if made_for != dataset:
            raise UserError(f"{folder} holds pairs of {made_for}, not of {dataset}; {remedy}")
        self.folder, self.meta, self.count = folder, meta, first or made
        if self.count > made:
            raise UserError(f"{folder} holds {made} pairs, but {first} are needed now; {remedy}")
        files = shards(folder, meta)[: math.ceil(self.count / meta["shard_size"])]
        missing = sum(not path.exists() for path, _ in files)
        if missing:
            raise UserError(f"{missing} of {len(files)} shards are missing in {folder}; {remedy}")
        self.shards = [open_shard(path, len(indices)) for path, indices in files]
        self.prompts = [p for file in self.shards for p in read_metadata(file).get("prompts", [])]

    def __len__(self) -> int:
        return self.count

    def check_teacher(self, teacher: dict[str, str]) -> None:
        """Raise UserError unless the pairs were made by this teacher, {"name", "sha256"}."""
        if self.meta["teacher"]["sha256"] != teacher["sha256"]:
            raise UserError(
                f"the pairs in {self.folder} were made with another teacher than "
                f"{teacher['name']}; choose another --pairs folder or that --teacher"
            )

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | list[str] | None]:
        """Pairs k of indices -> z_ref, y_ref (R, C, H, W) float32, labels (R,), prompts or None."""
        rows = [divmod(k, self.meta["shard_size"]) for k in indices]

        def gather(name: str) -> Tensor:
            parts = [self.shards[s].get_slice(name)[i : i + 1] for s, i in rows]
            return torch.cat(parts or [self.shards[0].get_slice(name)[:0]])

        cond = gather("cond") if "cond" in self.shards[0].keys() else None
        if self.prompts:
            cond = [self.prompts[k] for k in indices]
        return gather("z"), gather("y").float(), cond


def open_shard(path: Path, count: int):
    """Open a shard to be read piece by piece, and check that it holds `count` pairs."""
    with one_line_errors(path):
        file = safe_open(str(path), framework="pt")
        found = {file.get_slice(name).get_shape()[0] for name in ("z", "y")}
    if found != {count}:
        raise UserError(f"{path} does not hold {count} pairs; delete it and rerun make_pairs.py")
    return file


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 text file (.gz: compressed) that are not blank.

    Only a newline ends a line. Unicode's other line breaks become spaces.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            lines = file.read().decode("utf-8-sig").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text, a prompt a line ({error})") from None
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt; give a text file, one prompt a line")
    return prompts
