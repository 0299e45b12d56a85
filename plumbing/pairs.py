"""Noise/image pairs on disk, and everything that is drawn at random.

A folder of pairs holds `meta.json` (dataset, teacher, solver, ... : how they were made) and shards
`shard_00000.safetensors`, ... of `shard_size` pairs each, every one with

    z (N, C, H, W) float32      unit-variance noise
    y (N, C, H, W)              the teacher's ODE solution for it
    cond (N,) int64             class labels, only of a class-conditional teacher
    index (N,) int64            k of each pair; z is a function of (seed, k) alone

and, of a text-conditional teacher, the N prompts in its metadata.
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

# --------------------------------------------------------------------------------------------------
# Randomness: Philox (Salmon et al. 2011, doi 10.1145/2063384.2063405)

STREAMS = (
    "pairs",  # z of pair k
    "unpaired", "paired",  # what the two data streams of Algorithm 1 draw for row i of step k
    "pictures", "samples", "evaluation",  # z of what is looked at: by train.py, sample.py, ...
    "toy", "assets",
)  # fmt: skip


def generator(stream: str, seed: int, step: int = 0, row: int = 0) -> np.random.Generator:
    """What draws for row i of step k, in one of STREAMS: a function of these four numbers alone.

    Key (seed, stream), counter from (step, row, 0, 0) on: any two draw from counters, or by a key,
    that the other never has, whatever the seeds; so no number is used twice.
    """
    key = np.array([seed, STREAMS.index(stream)], np.uint64)
    return np.random.Generator(
        np.random.Philox(key=key, counter=np.array([0, 0, row, step], np.uint64))  # lowest first
    )


def normal(draws: np.random.Generator, *shape: int) -> Tensor:
    """N(0, I) of this shape, float32."""
    return torch.from_numpy(draws.standard_normal(shape, np.float32))


def uniform(draws: np.random.Generator, *shape: int) -> Tensor:
    """Uniform in [0, 1), float64."""
    return torch.from_numpy(draws.random(shape))


def sample_noise(stream: str, seed: int, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """z of samples k in indices -> (len, *shape): row k is a function of (stream, seed, k) alone,
    whatever the batch size, the number of processes or the device."""
    return torch.stack([normal(generator(stream, seed, row=k), *shape) for k in indices])


def draw_rows(
    stream: str, seed: int, step: int, rows: Sequence[int], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """For every row i of step k: three numbers uniform in [0, 1), and normal ones -> (B, 3)
    float64, (B, *shape)."""
    u, normals = torch.empty(len(rows), 3, dtype=torch.float64), torch.empty(len(rows), *shape)
    for i, row in enumerate(rows):
        draws = generator(stream, seed, step, row)
        u[i], normals[i] = uniform(draws, 3), normal(draws, *shape)
    return u, normals


# --------------------------------------------------------------------------------------------------
# Shards


def shards(folder: Path, meta: dict) -> list[tuple[Path, range]]:
    """The files of all shards, and the indices k of the pairs in each."""
    count, size = meta["num_pairs"], meta["shard_size"]
    starts = range(0, count, size)
    return [
        (folder / f"shard_{start // size:05d}.safetensors", range(start, min(start + size, count)))
        for start in starts
    ]


class Pairs:
    """The data set D of Eq. 9, read from disk as needed.

    Args:
        folder: as written by make_pairs.py.
        dataset: what the pairs must have been made for.
        first: use this many of them, from the first on; None: all.

    Attributes:
        meta: meta.json.
        prompts: of all pairs, for a text-conditional teacher, else empty.
    """

    def __init__(self, folder: Path, dataset: str, first: int | None = None):
        remedy = f"run: python make_pairs.py --dataset {dataset} --out {folder}"
        remedy += f" --num-pairs {first}" if first else ""
        if not (folder / "meta.json").exists():
            raise UserError(f"no pairs in {folder}; {remedy}")
        self.folder, self.meta = folder, read_json(folder / "meta.json")
        if self.meta.get("dataset") != dataset or "shard_size" not in self.meta:
            made_for = self.meta.get("dataset")
            raise UserError(f"{folder} holds pairs of {made_for}, not of {dataset}; {remedy}")
        made, size = self.meta["num_pairs"], self.meta["shard_size"]
        self.count = first or made
        if self.count > made:
            raise UserError(f"{folder} holds {made} pairs, but {first} are needed now; {remedy}")
        files = shards(folder, self.meta)[: math.ceil(self.count / size)]
        missing = sum(not path.exists() for path, _ in files)
        if missing:
            raise UserError(f"{missing} of {len(files)} shards miss in {folder}; {remedy}")
        self.shards = [open_shard(path, len(indices)) for path, indices in files]
        self.prompts = [p for file in self.shards for p in read_metadata(file).get("prompts", [])]

    def __len__(self) -> int:
        return self.count

    def check_teacher(self, teacher: dict[str, str]) -> None:
        """Raise UserError unless the pairs were made by this teacher, {"name", "sha256"}."""
        if self.meta["teacher"]["sha256"] != teacher["sha256"]:
            raise UserError(
                f"the pairs in {self.folder} were made with another teacher than "
                f"{teacher['name']}: choose another --pairs folder, or that --teacher"
            )

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | list[str] | None]:
        """Pairs k in indices -> z_ref, y_ref (R, C, H, W) float32, labels (R,), prompts or None."""
        rows = [divmod(k, self.meta["shard_size"]) for k in indices]

        def gather(name: str) -> Tensor:
            parts = [self.shards[s].get_slice(name)[i : i + 1] for s, i in rows]
            return torch.cat(parts or [self.shards[0].get_slice(name)[:0]])

        cond = gather("cond") if "cond" in self.shards[0].keys() else None
        if self.prompts:
            cond = [self.prompts[k] for k in indices]
        return gather("z"), gather("y").float(), cond


def open_shard(path: Path, count: int):
    """A shard's file, to be read piece by piece, if it holds `count` pairs."""
    with one_line_errors(path):
        file = safe_open(str(path), framework="pt")
        found = {file.get_slice(name).get_shape()[0] for name in ("z", "y")}
    if found != {count}:
        raise UserError(f"{path} does not hold {count} pairs; delete it and rerun make_pairs.py")
    return file


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, or of a .gz of one, that are not blank.

    Only a newline ends a line: Unicode's other line breaks may stand in a caption, as spaces.
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
