"""Downloads: whole under their name or not there, and what a failed one says."""

import hashlib
import http.server
import os
import threading
from pathlib import Path

import huggingface_hub
import pytest

from plumbing import downloads
from plumbing.downloads import EDM_URL, download, fetch
from plumbing.options import UserError

BODY = bytes(range(256)) * 5000


class Server(http.server.BaseHTTPRequestHandler):
    """Serves BODY in the way that the first part of the path says, and notes each request."""

    asked: list[str] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        kind = self.path.split("/")[1]
        self.asked.append(kind)
        if kind == "absent":
            self.send_error(404)
            return
        body = {"page": b"<!DOCTYPE html><p>log in first", "empty": b""}.get(kind, BODY)
        self.send_response(200)
        if kind != "unsized":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:-1000] if kind == "short" else body)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The address of a server on this machine; downloads go to tmp_path."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("DMD_CACHE", str(tmp_path))
    Server.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("kind", ["full", "unsized"])
def test_download_once(server, tmp_path, kind):
    path = fetch(f"{server}/{kind}/weights.pkl?token=1")
    assert path.name == "weights.pkl" and path.read_bytes() == BODY
    assert os.listdir(path.parent) == ["weights.pkl"] and tmp_path in path.parents
    assert fetch(f"{server}/{kind}/weights.pkl?token=1") == path and Server.asked == [kind]
    assert fetch(f"{server}/full/other/weights.pkl") != path  # same name, other address


def refused(url: str, *words: str):
    with pytest.raises(UserError) as caught:
        fetch(url)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    assert all(word in message for word in words)


@pytest.mark.parametrize(("url", "words"), [
    ("{server}/absent/weights.pkl", ["404", "download {url} yourself and put it at {cache}/"]),
    ("{server}/page/weights.pkl", ["web page", "put it at"]),
    ("{server}/empty/weights.pkl", ["or nothing", "put it at"]),
    ("{server}/short/weights.pkl", ["broke off at byte 1279000 of 1280000", "put it at"]),
    ("http://127.0.0.1:9/weights.pkl", ["download failed", "put it at"]),
    ("https://no.such.host.invalid/weights.pkl", ["download failed", "put it at"]),
    ("https://[broken/weights.pkl", []),
    ("{server}/", ["names no file"]),
    ("hf://owner/repo", ["hf://owner/name/file"]),
])  # fmt: skip
def test_downloads_that_fail(server, tmp_path, url, words):
    where = {"server": server, "cache": tmp_path}
    url = url.format(**where)
    refused(url, *(word.format(**where, url=url) for word in words))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DMD_CACHE", str(tmp_path / "file"))
    refused(f"{server}/full/weights.pkl", "cannot write")


def test_the_hash_of_a_download(server, tmp_path):
    url, known = f"{server}/full/weights.pkl", hashlib.sha256(BODY).hexdigest()
    with pytest.raises(UserError, match="another file: its SHA-256 differs"):
        download(url, tmp_path / "other", "0123")
    assert not os.listdir(tmp_path)
    download(url, tmp_path / "known", known[:8])
    assert (tmp_path / "known").read_bytes() == BODY


def test_paths_names_and_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fetch("some/file.pkl") == Path("some/file.pkl")
    name = "edm-cifar10-32x32-cond-vp.pkl"
    assert EDM_URL + name == f"https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/{name}"
    monkeypatch.setattr(downloads, "EDM_URL", f"{server}/full/")
    assert fetch(name).read_bytes() == BODY
    Path(name).write_bytes(b"mine")
    assert fetch(name) == Path(name)
    monkeypatch.delenv("DMD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache = tmp_path / "home" / ".cache" / "dmd"
    assert cache in fetch(f"{server}/full/weights.pkl").parents


def test_hugging_face(monkeypatch):
    """What else the Hub answers is in test_sd_loader.py."""
    answer = lambda repo, file, local_files_only: f"{repo}:{file}"  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    assert fetch("hf://owner/repo/folder/file.bin") == Path("owner/repo:folder/file.bin")
