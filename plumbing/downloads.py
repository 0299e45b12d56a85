"""Weights by their address. They are downloaded once, and kept only if they are complete."""

import hashlib
import os
import re
import shutil
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from plumbing.files import atomic_path, file_hash, sweep
from plumbing.options import UserError, one_line

EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"


def fetch(source: str) -> Path:
    """The local file for a path (which need not exist), https://..., hf://owner/repo/file, or the
    name of a network that EDM released, edm-....pkl. Downloads are kept in $DMD_CACHE (default:
    ~/.cache/dmd), those from the Hub in the Hub's own cache."""
    if re.fullmatch(r"edm-[\w-]+\.pkl", source) and not Path(source).exists():
        source = EDM_URL + source
    if source.startswith("hf://"):
        parts = source.removeprefix("hf://").split("/", 2)  # owner, repository, file
        return find_on_hub("/".join(parts[:2]), parts[2:])
    if not source.startswith(("https://", "http://")):
        return Path(source)
    name = re.split(r"[?#]", source)[0].rpartition("/")[2]
    if not name:
        raise UserError(f"{source} names no file; give the address of a file")
    # One folder per address, because many files are called pytorch_model.bin.
    folder = hashlib.sha256(source.encode()).hexdigest()[:8]
    path = in_home(os.environ.get("DMD_CACHE") or "~/.cache/dmd") / folder / name
    if not path.exists():
        download(source, path)
    return path


def in_home(folder: str) -> Path:
    """A folder for downloads; `~` at its start is the user's home."""
    if (path := os.path.expanduser(folder)).startswith("~"):  # a container's user may have none
        raise UserError("no home folder; set HOME, or each of DMD_CACHE, HF_HOME and TORCH_HOME")
    return Path(path)


def find_on_hub(repo: str, names: Sequence[str]) -> Path:
    """The first of `names` in a Hub repository that is cached or can be downloaded."""
    if repo.count("/") != 1 or not any(names):
        what = "neither a local folder nor a Hub repository (owner/name)"
        raise UserError(f"{repo} is {what}; a file on the Hub is hf://owner/name/file")
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache  # slow

    in_home(constants.HF_HUB_CACHE)
    said, offline = f"gives none of {', '.join(names)}", False
    for name in names:
        try:
            if isinstance(cached := try_to_load_from_cache(repo, name), str):
                return Path(cached)
            return Path(hf_hub_download(repo, name, local_files_only=offline))
        except errors.EntryNotFoundError as error:
            if isinstance(error, errors.LocalEntryNotFoundError) and not offline:
                offline, said = True, f"{said} ({error.__cause__ or error})"  # wait only once
        except Exception as error:  # no such repository, a full disk, a lost connection
            said = f"says: {str(error) or repr(error)}"
            break
    said = one_line(f"{repo} is not a local folder, and the Hub {said}")
    raise UserError(f"{said}; check the name and the network, or try later; gated: set HF_TOKEN")


def download(url: str, path: Path, sha256: str = "") -> None:
    """Download to `path`. It appears only if the file is as long as the server announced and its
    SHA-256 begins with `sha256` (at most 16 digits)."""
    sweep(path.parent)
    with atomic_path(path) as part:
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(part, "w+b") as file:
                size = int(response.headers.get("Content-Length", 0))  # 0: not announced
                with tqdm.wrapattr(response, "read", size, desc=path.name) as body:
                    shutil.copyfileobj(body, file, 1 << 20)
                have = file.tell()
                file.seek(0)
                head = file.read(64).lstrip().lower()
            if size and have != size:
                raise ValueError(f"it broke off at byte {have} of {size}")
            if not head or head.startswith((b"<!doctype", b"<html", b"<?xml")):
                raise ValueError("the server sent a web page or nothing")
            if sha256 and not file_hash(part).startswith(sha256):
                raise ValueError("the server sent another file: its SHA-256 differs")
        except (OSError, HTTPException, ValueError) as error:
            by_hand = f"download {url} yourself and put it at {path}"
            raise UserError(one_line(f"the download failed ({error}); {by_hand}")) from None
