"""Weights by their names and addresses: downloaded once, then read from the cache."""

import hashlib
import os
import re
import tempfile
from http.client import HTTPException
from pathlib import Path

import torch

from plumbing.foreign import is_web_page, one_line
from plumbing.options import UserError

EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
EDM_URLS = {
    name: EDM_URL + name
    for name in (
        "edm-cifar10-32x32-cond-vp.pkl",
        "edm-cifar10-32x32-uncond-vp.pkl",
        "edm-imagenet-64x64-cond-adm.pkl",
    )
}


def fetch(source: str) -> Path:
    """The local file for a path or an address.

    Args:
        source: a path (returned as it is, existing or not), https://..., hf://owner/repo/file on
            Hugging Face, or a name in EDM_URLS. What is downloaded goes to $DMD_CACHE, else
            ~/.cache/dmd; from Hugging Face to its own cache.
    """
    if source in EDM_URLS and not Path(source).exists():
        source = EDM_URLS[source]
    if source.startswith("hf://"):
        return fetch_from_hub(source)
    if not source.startswith(("https://", "http://")):
        return Path(source)
    _host, _, address = re.split(r"[?#]", source)[0].partition("://")[2].partition("/")
    name = address.rpartition("/")[2]
    if name in ("", ".", ".."):
        raise UserError(f"{source} names no file; give the whole address of the file")
    # A folder per address: many files are called pytorch_model.bin.
    folder = hashlib.sha256(source.encode()).hexdigest()[:8]
    cache = Path(os.environ.get("DMD_CACHE") or Path.home() / ".cache" / "dmd")
    return download(source, cache / folder / name)


def fetch_from_hub(source: str) -> Path:
    """hf://owner/repo/file -> the file in huggingface_hub's cache."""
    owner, _, rest = source.removeprefix("hf://").partition("/")
    repo, _, file = rest.partition("/")
    if not (owner and repo and file):
        raise UserError(f"{source} is incomplete; write hf://owner/repo/file")
    from huggingface_hub import hf_hub_download  # slow to import, and only needed here
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(f"{owner}/{repo}", file))
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise UserError(
            one_line(f"{source} cannot be had ({error}); download it and give its path", 400)
        ) from error


def download(url: str, path: Path, sha256: str = "") -> Path:
    """Download to `path`, unless it is there -> `path`. One process at a time.

    PyTorch writes under another name, shows a progress bar, and renames what came in whole.

    Args:
        sha256: the beginning of the file's hash, in hexadecimal digits.
    """
    if path.exists():
        return path
    by_hand = f"download it yourself and put it at {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            new = Path(folder) / path.name
            torch.hub.download_url_to_file(url, str(new), hash_prefix=sha256)
            with open(new, "rb") as file:
                head = file.read(64)
            if not head or is_web_page(head):
                raise UserError(f"{url} gave a web page or nothing instead of weights; {by_hand}")
            new.replace(path)
    except (OSError, HTTPException, RuntimeError, ValueError) as error:
        raise UserError(f"{url} cannot be had ({one_line(error, 200)}); {by_hand}") from error
    return path
