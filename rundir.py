"""What every script does with the command line and the disk, in one place so that it is done right:

one-line user errors (exit code 2), a dataclass as command line, atomic writes, image grids, and
random draws that are a function of (seed, step, row) alone.
"""

import argparse
import contextlib
import csv
import dataclasses
import io
import json
import logging
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# Where the home folder cannot be written, matplotlib says so at length as it is imported, and does
# without. (So the functions that draw import it, after this line.)
logging.getLogger("matplotlib").setLevel(logging.ERROR)


class UserError(Exception):
    """Something the user can mend. The message says what is wrong and what to do, in one line."""


# --------------------------------------------------------------------------------------------------
# Command line


def option(default, help: str, choices: tuple | None = None):
    """A dataclass field that is a command-line option with a help line."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line, as for every other mistake."""

    def error(self, message: str) -> typing.NoReturn:
        """Exit with code 2."""
        self.exit(2, f"error: {message}; --help lists the options\n")


def run_script(main: Callable, config_class: type, doc: str) -> None:
    """Parse the command line into config_class, call main(config), turn UserError into exit code 2.

    Every field of the dataclass is an option: `lambda_reg: float = option(1.0, "...")` is
    `--lambda-reg X`; a bool has `--no-...` too; a tuple takes several values.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        shown = "" if field.default in (None, ()) else f" (default: {field.default})"
        arguments = {"default": field.default, "help": field.metadata["help"] + shown}
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # float | None
            kind = typing.get_args(kind)[0]
        if kind is bool:
            arguments |= {"action": argparse.BooleanOptionalAction}
            arguments["help"] = field.metadata["help"]
        elif typing.get_origin(kind) is tuple:
            arguments |= {"type": typing.get_args(kind)[0], "nargs": "+"}
        else:
            arguments |= {"type": kind, "choices": field.metadata["choices"]}
        parser.add_argument("--" + field.name.replace("_", "-"), **arguments)
    config = config_class(**vars(parser.parse_args()))
    try:
        main(config)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except UserError as error:
        rank = os.environ.get("RANK", "0")  # of several processes, see devices.py
        print(f"error: {error}" + ("" if rank == "0" else f" (rank {rank})"), file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        print(
            f"error: the GPU's memory is full ({reason}); lower --batch-size (train.py: raise "
            "--accumulate, which keeps the batch)",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# --------------------------------------------------------------------------------------------------
# Disk


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, renamed to it if the block ends without an error.

    The temporary name is a fixed one: what a killed process left is overwritten by the next.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())  # the bytes must be on disk before the name points at them
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; nothing was changed"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone already, or in a folder that is not ours
            temporary.unlink()


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def holds_files(folder: Path, but: str = "") -> bool:
    """Whether there is anything at `folder` beside `but` and hidden files, which a killed write
    leaves."""
    if not folder.is_dir():
        return folder.exists()
    return any(not path.name.startswith(".") and path.name != but for path in folder.iterdir())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_torch(path: Path, value) -> None:
    """Write with torch.save, atomically; it reports a full disk as a RuntimeError."""
    with atomic_path(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error


def write_json(path: Path, value) -> None:
    """Write a JSON file atomically."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict:
    """Read a JSON file.

    Raises:
        UserError: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it and rerun") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not what this project writes; delete it and rerun")
    return value


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows (all with the keys of the first) as a CSV file atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically. Tensors are brought to the CPU, contiguous.

    Our metadata is one JSON entry, "dmd"; the entry "format" is what other readers ask for.
    """
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = {"dmd": json.dumps(metadata, sort_keys=True), "format": "pt"}
    with atomic_path(path) as temporary:
        try:
            save_file(cpu, temporary, entries)
            temporary.chmod(0o666 & ~current_umask())  # safetensors makes private files
        except SafetensorError as error:  # a full disk
            raise OSError(str(error).splitlines()[0]) from error
        sort_header(temporary)


def sort_header(path: Path) -> None:
    """Put a safetensors file's metadata in order, in place: safetensors writes it in random order,
    and equal contents shall be equal files."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(data) <= size:  # then the rest is padded with spaces, as the format asks
            file.seek(8)
            file.write(data.ljust(size))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file -> (tensors, metadata).

    Raises:
        UserError: missing, truncated or of another format.
    """
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, read_metadata(file)


def read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """The tensors' names and the metadata of a safetensors file, without its numbers.

    Raises:
        UserError: missing, truncated or of another format.
    """
    with open_tensors(path) as file:
        return list(file.keys()), read_metadata(file)


def read_metadata(file) -> dict[str, str]:
    """What write_tensors was given with the tensors; {} for other people's files."""
    return json.loads((file.metadata() or {}).get("dmd", "{}"))


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator:
    """safe_open, with its errors as UserErrors."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}); delete it and make it again"
        ) from None


def load_strictly(
    module: torch.nn.Module, tensors: dict[str, Tensor], path: Path | str, assign: bool = False
) -> None:
    """Copy tensors into a module's parameters and buffers; every difference is an error.

    Args:
        path: where the tensors are from, for the message.
        assign: make the tensors themselves the parameters, without a copy.

    Raises:
        UserError: missing, surplus or misshapen tensors, with the first few names.
    """
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "surplus": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{name} {found[name]} instead of {expected[name]}"
            for name in sorted(expected.keys() & found.keys())
            if expected[name] != found[name]
        ],
    }
    if any(problems.values()):
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in problems.items()
            if names
        ]
        raise UserError(f"{path} holds another architecture: {'; '.join(parts)}")
    module.load_state_dict(tensors, strict=True, assign=assign)


# --------------------------------------------------------------------------------------------------
# Pictures


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, by EDM's rule x * 127.5 + 128, clamped."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def save_grid(path: Path, images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> None:
    """Write images (B, C, H, W) in [-1, 1], C = 1 or 3, as one PNG, row by row, on light grey.

    Args:
        scale: whole-number magnification, for small images.
        gap: pixels between the images.
    """
    batch, channels, height, width = images.shape
    rows = math.ceil(batch / columns)
    pixels = to_uint8(images.detach().cpu()).permute(0, 2, 3, 1).numpy()
    canvas = np.full(
        (gap + rows * (height + gap), gap + columns * (width + gap), channels), 200, np.uint8
    )
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


# --------------------------------------------------------------------------------------------------
# Randomness


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator whose stream is a function of the key alone, e.g. (seed, step).

    Trailing zeros do not count: (3,) and (3, 0) are the same key.

    Raises:
        UserError: a negative number.
    """
    if min(key) < 0:
        raise UserError(f"seeds must be at least 0, not {min(key)}")
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)
