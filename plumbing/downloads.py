"""Weights by their address: downloaded once, kept under their final name only if complete."""

import hashlib
import os
import re
import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path

import huggingface_hub
from tqdm import tqdm

from plumbing.files import atomic_path, file_hash, one_line
from plumbing.options import UserError

EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
EDM_NAMES = (
    "edm-cifar10-32x32-cond-vp.pkl",
    "edm-cifar10-32x32-uncond-vp.pkl",
    "edm-imagenet-64x64-cond-adm.pkl",
)


def fetch(source: str) -> Path:
    """The local file for a path (returned as it is, existing or not), https://...,
    hf://owner/repo/file, or a name in EDM_NAMES.

    What is downloaded is kept in $DMD_CACHE, else ~/.cache/dmd; the Hub has its own cache.
    """
    if source in EDM_NAMES and not Path(source).exists():
        source = EDM_URL + source
    if source.startswith("hf://"):
        return fetch_from_hub(source)
    if not source.startswith(("https://", "http://")):
        return Path(source)
    name = re.split(r"[?#]", source)[0].rpartition("/")[2]
    if not name:
        raise UserError(f"{source} names no file; give the whole address of the file")
    # A folder per address: many files are called pytorch_model.bin.
    folder = hashlib.sha256(source.encode()).hexdigest()[:8]
    path = Path(os.environ.get("DMD_CACHE") or Path.home() / ".cache" / "dmd") / folder / name
    if not path.exists():
        download(source, path)
    return path


def fetch_from_hub(source: str) -> Path:
    """hf://owner/repo/file -> the file in huggingface_hub's cache."""
    try:
        owner, repo, file = source.removeprefix("hf://").split("/", 2)
        return Path(huggingface_hub.hf_hub_download(f"{owner}/{repo}", file))
    except (OSError, ValueError) as error:
        how = "write hf://owner/repo/file, or download it yourself and give its path instead"
        raise UserError(one_line(f"{source} cannot be had ({error}); {how}")) from error


def download(url: str, path: Path, sha256: str = "") -> None:
    """Download to `path`, which appears only when the file is there, as long as the server said,
    and (if that is given) its SHA-256 begins with `sha256`, up to 16 digits."""
    with atomic_path(path) as part:
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(part, "w+b") as file:
                size = int(response.headers.get("Content-Length", 0))  # 0: the server does not say
                with tqdm.wrapattr(response, "read", size, desc=path.name) as body:
                    shutil.copyfileobj(body, file, 1 << 20)
                have = file.tell()
                file.seek(0)
                head = file.read(64).lstrip().lower()
            if size and have != size:
                raise ValueError(f"it broke off at byte {have} of {size}")
            if not head or head.startswith((b"<!doctype", b"<html", b"<?xml")):
                raise ValueError("a web page or nothing came instead")
            if sha256 and not file_hash(part).startswith(sha256):
                raise ValueError("another file came: its SHA-256 differs")
        except (OSError, HTTPException, ValueError) as error:
            by_hand = f"download {url} yourself and put it at {path}"
            raise UserError(one_line(f"the download failed ({error}); {by_hand}")) from None
