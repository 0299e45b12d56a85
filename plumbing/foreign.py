"""Files of weights that others have made: which format, and read without running what they say."""

import contextlib
import io
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from plumbing.options import UserError

MAGIC = 0x1950A86A20F9469CFC6C  # opens every file in torch.save's older format

# What reading a damaged or hostile file can end in, apart from UserError.
DAMAGE = (
    pickle.UnpicklingError, EOFError, struct.error, ValueError, TypeError, LookupError,
    AttributeError, ArithmeticError, MemoryError, RuntimeError, AssertionError,
)  # fmt: skip


@contextlib.contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Whatever goes wrong while reading `path` becomes a UserError of one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except UserError as error:
        named = str(error).startswith(str(path))
        raise UserError(one_line(error if named else f"{path} is refused: {error}")) from error
    except (*DAMAGE, OSError) as error:
        what = "is damaged or not a file of weights; delete it and get it again"
        raise UserError(one_line(f"{path} {what} ({type(error).__name__}: {error})")) from error


def one_line(text: object, limit: int = 500) -> str:
    """Text of unknown origin, fit to be printed: one line, printable, not endless."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= limit else line[:limit] + " ..."


def restricted_load(file: Path | io.BytesIO) -> Any:
    """torch.load of tensors and plain containers only, which says which name it refuses.

    A file is mapped where its format allows: what is never asked for is then never read.
    """
    mmap = isinstance(file, Path) and zipfile.is_zipfile(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise
        raise UserError(
            f"it names {one_line(named[1], 80)}, which no state dict needs; nothing was run"
        ) from error


def file_format(path: Path) -> str:
    """ "pickle" (NVIDIA's), "torch" (zip or older) or "safetensors", by the file's first bytes."""
    with one_line_errors(path):
        with open(path, "rb") as file:
            head = file.read(64)
        if head.startswith(b"PK\x03\x04") or MAGIC.to_bytes(10, "little") in head[:16]:
            return "torch"
        # First the length of a header: its low byte may well be the one that opens a pickle.
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
            return "safetensors"
        if head.startswith(b"\x80"):
            return "pickle"
        if not head:
            raise UserError("it is empty; get it again")
        if is_web_page(head):
            raise UserError(
                "it is a web page, not weights; open the address in a browser to see why"
            )
        raise UserError("it is neither an EDM pickle nor a file of torch.save nor safetensors")


def is_web_page(head: bytes) -> bool:
    """Whether a file that begins like this is HTML or XML, e.g. a server's error message."""
    head = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith((b"<!doctype", b"<html", b"<?xml"))
