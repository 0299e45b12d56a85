"""The disk and the command line: nothing half-written, one line per user error."""

import ast
import os
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT
from PIL import Image

from rundir import (
    UserError,
    atomic_path,
    generator_for,
    option,
    pick_device,
    run_script,
    save_grid,
    to_uint8,
    write_bytes,
)


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_bytes(b"new, but only half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_an_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write"):
        write_bytes(tmp_path / "file" / "inside", b"data")


def test_written_files_are_readable_as_the_umask_says(tmp_path):
    write_bytes(tmp_path / "file", b"data")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


@dataclass
class Config:
    number: float | None = option(None, "a number")
    flag: bool = option(False, "a flag")
    words: tuple[str, ...] = option(("a", "b"), "some words")
    kind: str = option("x", "a kind", ("x", "y"))


def test_command_line(monkeypatch, capsys):
    seen = []
    line = ["script", "--number", "2", "--flag", "--words", "c", "d", "--kind", "y"]
    monkeypatch.setattr("sys.argv", line)
    run_script(seen.append, Config, "doc")
    assert seen == [Config(2.0, True, ["c", "d"], "y")]

    def fail(config):
        raise UserError("the disk is full; make room")

    monkeypatch.setattr("sys.argv", ["script"])
    with pytest.raises(SystemExit) as stopped:
        run_script(fail, Config, "doc")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: the disk is full; make room\n"


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="try --device cpu"):
        pick_device("toaster")


def test_random_draws_are_a_function_of_the_key():
    def draw(*key):
        return torch.randn(4, generator=generator_for(*key))

    assert torch.equal(draw(1, 2), draw(1, 2))
    different = [draw(1, 2), draw(2, 1), draw(1, 3), draw(12)]
    assert len({tuple(values.tolist()) for values in different}) == 4


def test_pixels():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255]


def test_grid(tmp_path):
    images = torch.stack([torch.full((3, 4, 5), v) for v in (-1.0, 0.0, 1.0)])
    save_grid(tmp_path / "grid.png", images, columns=2, scale=1, gap=1)
    picture = Image.open(tmp_path / "grid.png")
    assert picture.size == (1 + 2 * 6, 1 + 2 * 5)
    assert [picture.getpixel(at)[0] for at in ((1, 1), (7, 1), (1, 6), (7, 6))] == [
        0,
        128,
        255,
        200,
    ]


def test_imports_go_one_way():
    """The method and the networks import none of our files; scripts never import scripts."""
    files = {path.stem: path for path in ROOT.glob("*.py")}

    def imported(path):
        nodes = ast.walk(ast.parse(path.read_text()))
        names = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
        nodes = ast.walk(ast.parse(path.read_text()))
        names |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        return names & files.keys()

    libraries = {
        "dmd_loss",
        "edm_unet",
        "edm_weights",
        "sd_loader",
        "fid",
        "rundir",
        "workloads",
        "pairs",
    }
    assert not imported(files["dmd_loss"]) and not imported(files["edm_unet"])
    for path in files.values():
        assert imported(path) <= libraries, path
