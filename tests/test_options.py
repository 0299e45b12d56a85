"""The disk and the command line: nothing half-written, one line per user error."""

import ast
import os
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from plumbing.devices import autocast, others_alive, pick_amp, pick_device, share
from plumbing.drawing import save_grid, to_uint8
from plumbing.files import (
    atomic_path,
    read_header,
    read_tensors,
    write_bytes,
    write_tensors,
)
from plumbing.options import Options, UserError, option, run_script
from plumbing.pairs import STREAMS, generator, normal
from plumbing.rundir import claim_folder
from workloads import WORKLOADS


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_bytes(b"new, but only half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_what_a_killed_write_left_is_overwritten(tmp_path):
    """A kill -9 leaves a .part, which must neither grow in number nor count as a file of ours."""
    path = tmp_path / "file"
    with atomic_path(path) as left:
        name = left.name
        left.write_bytes(b"")
    path.unlink()
    (tmp_path / name).write_bytes(b"half of a much longer file")
    claim_folder(tmp_path, "meta.json", {"a": 1})
    claim_folder(tmp_path, "meta.json", {"a": 2})  # nothing is there that was made with 1
    write_bytes(path, b"new")
    assert sorted(os.listdir(tmp_path)) == ["file", "meta.json"] and path.read_bytes() == b"new"
    with pytest.raises(UserError, match="another a;"):
        claim_folder(tmp_path, "meta.json", {"a": 1}, may_grow=("a",))
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UserError, match="holds other files"):
        claim_folder(tmp_path, "meta.json", {"a": 1})


def test_equal_tensors_are_equal_files(tmp_path):
    """Metadata and tensors are in order, whatever order they were given in; others can read it."""
    tensors = {name: torch.randn(3, 2) for name in "abcdefgh"}
    metadata = {"dataset": "mnist", "prompts": ["one", "zwölf"], "step": "3"}
    paths = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for path in paths:
        write_tensors(path, tensors, metadata)
        tensors = dict(reversed(tensors.items()))
        metadata = dict(reversed(metadata.items()))
    assert len({path.read_bytes() for path in paths}) == 1
    write_tensors(paths[1], tensors, metadata, format="pt")
    for path in paths[:2]:
        found, about = read_tensors(path)
        assert about == metadata and read_header(path) == (sorted(tensors), metadata)
        for name, value in load_file(path).items():
            assert torch.equal(value, tensors[name]) and torch.equal(found[name], value)


def test_metadata_of_other_peoples_files(tmp_path):
    """They have none of ours, which is no error."""
    save_file({"x": torch.ones(1)}, tmp_path / "file", {"format": "pt"})
    assert read_header(tmp_path / "file") == (["x"], {})


def test_an_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write"):
        write_bytes(tmp_path / "file" / "inside", b"data")


def test_written_files_are_readable_as_the_umask_says(tmp_path):
    write_bytes(tmp_path / "file", b"data")
    write_tensors(tmp_path / "tensors", {"x": torch.ones(2)}, {})
    umask = os.umask(0)
    os.umask(umask)
    for name in ("file", "tensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


@dataclass
class Config(Options):
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

    for mistake in (["--nmber", "2"], ["--number", "two"], ["--kind", "z"], ["stray"]):
        monkeypatch.setattr("sys.argv", ["script", *mistake])
        with pytest.raises(SystemExit) as stopped:
            run_script(fail, Config, "doc")
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and mistake[-1] in error


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="try --device cpu"):
        pick_device("toaster")


def test_float32_is_float32():
    """TF32 is a GPU's default for convolutions."""
    torch.backends.cudnn.allow_tf32 = True
    pick_device("cpu")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("said", ["CUDA error: device-side assert triggered", "out of memory"])
def test_a_ranks_own_error_is_its_own(said):
    with pytest.raises(RuntimeError, match=said), others_alive():
        raise RuntimeError(said)
    with pytest.raises(UserError, match="another rank has failed"), others_alive():
        raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:40301")


def test_precisions(monkeypatch):
    cpu = torch.device("cpu")
    assert [pick_amp(name, cpu) for name in ("auto", "off", "bf16", "fp16")] == [
        "off", "off", "bf16", "fp16",
    ]  # fmt: skip
    for has_bf16, found in ((True, ["bf16", "fp16"]), (False, ["fp16", "fp16"])):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _=has_bf16, **__: _)
        gpu = torch.device("cuda")
        assert [pick_amp("auto", gpu, WORKLOADS[row].half) for row in ("cifar10", "sd15")] == found
    x = torch.ones(2, 2)
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with autocast(cpu, amp):
            assert (x @ x).dtype == dtype


@pytest.mark.parametrize(("n", "count"), [(12, 3), (7, 3), (2, 4), (0, 2)])
def test_ranks_share_everything_once(n, count):
    shares = [share(n, part, count) for part in range(count)]
    assert [row for part in shares for row in part] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= (n % count > 0)


def test_no_two_draws_share_a_number():
    """By construction: Philox's key and counter hold the four numbers as they are, and the longest
    row that anybody draws stays below the words that do. No seed is folded into fewer bits."""
    assert len(set(STREAMS)) == len(STREAMS)
    for i, stream in enumerate(STREAMS):
        for seed, step, row in ((0, 0, 0), (5, 3, 7), (5 + 2**32, 2**40, 2**63), (2**64 - 1, 1, 1)):
            draws = generator(stream, seed, step, row)
            for count in (0, 10**6):
                draws.standard_normal(count, "f4")
                state = draws.bit_generator.state["state"]
                assert state["key"].tolist() == [seed, i]
                assert state["counter"][2:].tolist() == [row, step]


def test_draws_are_a_function_of_the_key():
    def draw(*key):
        return normal(generator(*key), 4)

    assert torch.equal(draw("pairs", 1, 2, 3), draw("pairs", 1, 2, 3))
    others = [("pairs", 1, 2, 3), ("pairs", 1, 3, 2), ("pairs", 2, 1, 3), ("samples", 1, 2, 3)]
    assert len({tuple(draw(*key).tolist()) for key in others}) == 4
    # Should another numpy ever draw other numbers, pairs that are half made would not go on.
    expected = [0.05991, 0.01556, -1.16444, -0.13265]
    torch.testing.assert_close(draw("pairs", 0), torch.tensor(expected), rtol=0, atol=1e-5)


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
    """The losses import none of our files; scripts never import scripts; there is no circle."""
    folders = ("plumbing", "assets", "benchmarks")
    paths = [*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).glob("*.py"))]
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}

    def imported(name):
        tree = ast.parse(files[name].read_text())
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names = {f"{n.module}.{a.name}" for n in nodes for a in n.names} | {n.module for n in nodes}
        modules = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
        return (names | {a.name for node in modules for a in node.names}) & files.keys()

    scripts = {name for name, path in files.items() if '__name__ == "__main__"' in path.read_text()}
    assert len(scripts) > 8 and not imported("dmd_loss")
    arrows = {name: imported(name) for name in files}
    for name, others in arrows.items():
        assert name.startswith("benchmarks.") or not others & scripts, name
    while arrows:  # take away what imports nothing that is left
        ends = {name for name, others in arrows.items() if not others & arrows.keys()}
        assert ends, f"a circle among {', '.join(arrows)}"
        arrows = {name: others for name, others in arrows.items() if name not in ends}
