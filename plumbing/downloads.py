"""Weights by their address: downloaded once, kept under their final name only if complete."""

import hashlib
import os
import re
import shutil
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from plumbing.files import atomic_path, file_hash, one_line
from plumbing.options import UserError

EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"


def fetch(source: str) -> Path:
    """The local file for a path (returned as it is, existing or not), https://...,
    hf://owner/repo/file, or the name of one of EDM's released networks, edm-....pkl.

    What is downloaded is kept in $DMD_CACHE, else ~/.cache/dmd; the Hub has its own cache.
    """
    if re.fullmatch(r"edm-[\w-]+\.pkl", source) and not Path(source).exists():
        source = EDM_URL + source
    if source.startswith("hf://"):
        owner, _, rest = source.removeprefix("hf://").partition("/")
        repo, _, file = rest.partition("/")
        return find_on_hub(f"{owner}/{repo}", [file])
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


def find_on_hub(repo: str, names: Sequence[str]) -> Path:
    """The first of these files of a Hub's repository that is in its local cache or can be had."""
    if repo.count("/") != 1 or not all(names):
        what = "neither a folder here nor a Hub repository (owner/name)"
        raise UserError(f"{repo} is {what}; a file of one is hf://owner/name/file")
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache  # slow to import

    offline = False
    for name in names:
        try:
            if isinstance(cached := try_to_load_from_cache(repo, name), str):
                return Path(cached)
            return Path(hf_hub_download(repo, name, local_files_only=offline))
        except errors.EntryNotFoundError as error:
            offline = isinstance(error, errors.LocalEntryNotFoundError)  # do not wait for it again
        except (OSError, ValueError) as error:  # no such name, no such repository, a full disk
            said = one_line(f"{repo} is no folder here, and the Hub says: {error}", 300)
            raise UserError(said) from None
    what = f"{repo} holds none of {', '.join(names)}"
    raise UserError(f"{what}; it is no folder here, and is there a network?")


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
