"""Atomic writing, which leaves a whole file or none at all, and strict reading."""

import contextlib
import csv
import hashlib
import io
import json
import os
import pickle
import re
import secrets
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from plumbing.options import UserError, one_line


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds. No other
    process uses it. See sweep for what a killed process leaves."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())  # the bytes must be on disk before the name points at them
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter when the disk is full
        reason = getattr(error, "strerror", None) or f"is the disk full? ({one_line(error, 200)})"
        raise UserError(f"cannot write {path}: {reason}; it is left as it was") from error
    finally:
        with contextlib.suppress(OSError):  # already renamed, or in a folder that is not ours
            temporary.unlink()


def sweep(folder: Path) -> None:
    """Delete the temporary files of killed processes: those to which nobody wrote for an hour."""
    for left in folder.glob(".*.part"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value) -> None:
    """Write a JSON file atomically."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows, all with the keys of the first, as a CSV file atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict, **others: str) -> None:
    """Write a safetensors file atomically.

    The metadata is a single JSON entry, "dmd", so that equal contents give equal files: safetensors
    writes several entries in random order. `others` are for other readers, such as format="pt".
    """
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = {"dmd": json.dumps(metadata, sort_keys=True), **others}
    write_bytes(path, safetensors.torch.save(cpu, entries))


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    with one_line_errors(path):
        return json.loads(path.read_text(encoding="utf-8")) | {}  # an error if it is no object


# What the machine lacks, in words that torch and safetensors put into errors of their own.
MACHINE = "[Mm]emory|Too many open|No space|Permission|Input/output|Stale|unable to (open|mmap)"


@contextlib.contextmanager
def one_line_errors(
    path: Path, fault: str = "is damaged or of another kind; download it or make it again"
) -> Iterator[None]:
    """Whatever goes wrong while reading `path` becomes a one-line UserError that names it. `fault`
    is said if the file itself is to blame, and not the machine."""
    try:
        yield
    except FileNotFoundError as error:
        name = error.filename or path
        # safetensors says so, too, if the process has too many open files.
        what = "cannot be opened now" if os.path.exists(name) else "does not exist; check the path"
        raise UserError(f"{name} {what}") from None
    except UserError as error:
        named = str(error).startswith(str(path))
        raise UserError(one_line(error if named else f"{path} is refused: {error}")) from error
    except Exception as error:  # pickles, zip files, safetensors and torch raise a dozen types
        text = f"{type(error).__name__}: {error}"
        fault = "cannot be read" if re.search(MACHINE, text) else fault
        raise UserError(one_line(f"{path} {fault} ({text})")) from error


def torch_load(source: Path | io.BytesIO) -> Any:
    """torch.load for tensors and plain containers only. Zip files are mapped, not read whole."""
    mmap = isinstance(source, Path) and zipfile.is_zipfile(source)
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:  # its own text advises trusting the file
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {named[1]}, which no state dict needs" if named else "it is no state dict"
        raise UserError(f"{what}; nothing was run") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """A safetensors file's tensors and our metadata ({} in other people's files)."""
    with one_line_errors(path), safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, read_metadata(file)


def read_header(path: Path) -> tuple[list[str], dict]:
    """A safetensors file's tensor names and our metadata, without reading the tensors."""
    with one_line_errors(path), safe_open(str(path), framework="pt") as file:
        return list(file.keys()), read_metadata(file)


def read_metadata(file) -> dict:
    """The metadata given to write_tensors, from a file opened with safe_open."""
    return json.loads((file.metadata() or {}).get("dmd", "{}"))


def load_strictly(
    module: torch.nn.Module, tensors: dict[str, Tensor], path: Path | str, assign: bool = False
) -> None:
    """Load tensors into a module; any difference in names or shapes is a UserError.

    Args:
        path: where the tensors come from, for the message.
        assign: make the tensors themselves the parameters, without a copy.
    """
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    other = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
    parts = []
    for kind, names in (
        ("missing", expected.keys() - found.keys()),
        ("surplus", found.keys() - expected.keys()),
        ("misshapen", [f"{name} {found[name]} instead of {expected[name]}" for name in other]),
    ):
        if names:
            shown = sorted(names)[:3] + ["..."] * (len(names) > 3)
            parts.append(f"{len(names)} {kind} ({', '.join(shown)})")
    if parts:
        raise UserError(f"{path} holds another architecture: {'; '.join(parts)}")
    module.load_state_dict(tensors, strict=True, assign=assign)


def file_hash(path: Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
