"""Weights by their address: downloaded once, kept under their final name only if complete."""

import hashlib
import os
import re
import ssl
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

import torch

from plumbing.files import atomic_path, is_web_page, one_line
from plumbing.options import UserError

EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
EDM_NAMES = (
    "edm-cifar10-32x32-cond-vp.pkl",
    "edm-cifar10-32x32-uncond-vp.pkl",
    "edm-imagenet-64x64-cond-adm.pkl",
)
BY_HAND = "download it yourself and give its path instead"


def fetch(source: str, sha256: str = "") -> Path:
    """The local file for a path or an address.

    Args:
        source: a path (returned as it is, existing or not), https://..., hf://owner/repo/file, or
            a name in EDM_NAMES. Kept in $DMD_CACHE, else ~/.cache/dmd; the Hub has its own cache.
        sha256: what the SHA-256 of a download must begin with.
    """
    if source in EDM_NAMES and not Path(source).exists():
        source = EDM_URL + source
    if source.startswith("hf://"):
        return fetch_from_hub(source)
    if not source.startswith(("https://", "http://")):
        return Path(source)
    name = re.split(r"[?#]", source)[0].partition("://")[2].partition("/")[2].rpartition("/")[2]
    if name in ("", ".", ".."):
        raise UserError(f"{source} names no file; give the whole address of the file")
    # A folder per address: many files are called pytorch_model.bin.
    folder = hashlib.sha256(source.encode()).hexdigest()[:8]
    path = Path(os.environ.get("DMD_CACHE") or Path.home() / ".cache" / "dmd") / folder / name
    if not path.exists():
        download(source, path, sha256)
    return path


def fetch_from_hub(source: str) -> Path:
    """hf://owner/repo/file -> the file in huggingface_hub's cache."""
    owner, _, rest = source.removeprefix("hf://").partition("/")
    repo, _, file = rest.partition("/")
    if not (owner and repo and file):
        raise UserError(f"{source} is incomplete; write hf://owner/repo/file")
    try:
        from huggingface_hub import errors, hf_hub_download  # only needed here
    except ImportError:
        raise UserError(f"{source} needs: pip install huggingface_hub; or {BY_HAND}") from None
    try:
        return Path(hf_hub_download(f"{owner}/{repo}", file))
    except (OSError, ValueError, errors.EntryNotFoundError) as error:
        raise UserError(one_line(f"{source} cannot be had ({error}); {BY_HAND}", 400)) from error


def download(url: str, path: Path, sha256: str = "") -> None:
    """Download to `path`, which appears only when the file is there, as long as the server said,
    and (if that is given) its SHA-256 begins with `sha256`."""
    by_hand = f"download {url} yourself and put it at {path}"
    with atomic_path(path) as part:
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                size = response.headers.get("Content-Length")  # torch.hub does not compare it
            torch.hub.download_url_to_file(url, str(part), sha256 or None)
        except urllib.error.HTTPError as error:
            raise UserError(f"{url}: the server answers {error.code}; {by_hand}") from None
        except RuntimeError:  # torch.hub's, about the hash
            raise UserError(f"{url} is another file than expected: its SHA-256 differs") from None
        except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError,
                ValueError) as error:  # fmt: skip
            reason = one_line(getattr(error, "reason", error), 100)
            raise UserError(f"{url} cannot be reached ({reason}); {by_hand}") from None
        if size is not None and part.stat().st_size != int(size):
            have = part.stat().st_size
            raise UserError(f"{url} broke off at byte {have} of {size}; rerun, or {by_hand}")
        with open(part, "rb") as file:
            head = file.read(64)
        if not head or is_web_page(head):
            raise UserError(f"{url} gave a web page or nothing instead of the file; {by_hand}")
