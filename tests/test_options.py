"""The disk and the command line: whole files only, one line for every user error."""

import ast
import os
import stat
import time
from dataclasses import dataclass
from graphlib import TopologicalSorter
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, in_forks
from PIL import Image
from safetensors.torch import load_file, save_file

from plumbing.devices import autocast, others_alive, pick_amp, pick_device, share, to
from plumbing.drawing import save_grid
from plumbing.files import atomic_path, read_header, read_tensors, write_bytes, write_tensors
from plumbing.options import Options, UserError, option, run_script
from plumbing.pairs import STREAMS, draw_rows, generator, normal, uniform
from plumbing.rundir import claim_folder
from workloads import WORKLOADS, get_workload


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_bytes(b"new, but only half")
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="cannot write"):
        write_bytes(path / "inside", b"data")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    os.umask(umask := os.umask(0))
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_gpu_fetches_batches_while_the_cpu_goes_on(monkeypatch):
    """From pinned memory, which must be contiguous: CUDA makes a copy of any other, and waits."""
    pinned, moved = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: (pinned.append(x), x)[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *device, **how: (moved.append(how), x)[1])
    whole = torch.randn(2, 3, 1, 4, 5)
    noise, labels, nothing = to(torch.device("cuda"), whole[:, 1], torch.arange(2), None)
    assert all(x.is_contiguous() for x in pinned) and len(pinned) == 2 and nothing is None
    assert moved == [{"non_blocking": True}] * 2
    assert noise.equal(whole[:, 1]) and labels.tolist() == [0, 1]
    assert noise.is_contiguous(memory_format=torch.channels_last)


def test_two_writers_of_one_file_leave_a_whole_one(tmp_path):
    """The second starts and ends while the first is in the middle."""
    path = tmp_path / "file"
    with atomic_path(path) as first, open(first, "wb", buffering=0) as file:
        file.write(b"the first half")
        write_bytes(path, b"the second's")
        assert path.read_bytes() == b"the second's"
        file.write(b" and the second half")
    assert path.read_bytes() == b"the first half and the second half"
    assert len(os.listdir(tmp_path)) == 1


def work_in(folder):
    """In a fork: claim the folder, and keep it until another one could not. That one ends."""
    try:
        claim_folder(folder, "meta.json", {"a": 1})
    except UserError as error:
        (folder / "refused").write_text(str(error))
    while not (folder / "refused").exists():
        time.sleep(0.01)


def test_a_second_process_in_a_folder_is_refused(tmp_path):
    assert in_forks((work_in, tmp_path), (work_in, tmp_path)) == [0, 0]
    assert (tmp_path / "refused").read_text().startswith("another process is working in ")
    claim_folder(tmp_path, "meta.json", {"a": 1})  # both have ended


def test_what_a_killed_write_left_is_deleted(tmp_path):
    """kill -9 leaves a hidden file. claim_folder deletes it, unless it may be another process's."""
    old, new = (tmp_path / f".{name}.0a1b2c3d.part" for name in ("file", "other"))
    old.write_bytes(b"half of a much longer file")
    os.utime(old, (0, 0))
    claim_folder(tmp_path, "meta.json", {"a": 1})
    claim_folder(tmp_path, "meta.json", {"a": 2})  # the folder holds nothing made with 1
    write_bytes(tmp_path / "file", b"new")
    assert sorted(os.listdir(tmp_path)) == [".lock", "file", "meta.json"]
    new.touch()
    claim_folder(tmp_path, "meta.json", {"a": 2})
    assert new.exists()
    with pytest.raises(UserError, match="another a;"):
        claim_folder(tmp_path, "meta.json", {"a": 1}, may_grow=("a",))
    (tmp_path / "meta.json").write_text('{"a": "2"}')  # of another type
    with pytest.raises(UserError, match="another a;"):
        claim_folder(tmp_path, "meta.json", {"a": 3}, may_grow=("a",))
    (tmp_path / "meta.json").write_text('{"b": 1}')  # of another program
    with pytest.raises(UserError, match="holds other files"):
        claim_folder(tmp_path, "meta.json", {"a": 1})
    assert (tmp_path / "meta.json").read_text() == '{"b": 1}'


def test_equal_tensors_are_equal_files(tmp_path):
    """In whatever order they are given. Others can read our files, and we theirs."""
    tensors = {name: torch.randn(3, 2) for name in "abcdefgh"}
    metadata = {"dataset": "mnist", "prompts": ["one", "zwölf"], "step": "3"}
    paths = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for path in paths:
        write_tensors(path, tensors, metadata)
        tensors, metadata = (dict(reversed(each.items())) for each in (tensors, metadata))
    assert len({path.read_bytes() for path in paths}) == 1
    write_tensors(paths[1], tensors, metadata, format="pt")
    for path in paths[:2]:
        found, about = read_tensors(path)
        assert about == metadata and read_header(path) == (sorted(tensors), metadata)
        for name, value in load_file(path).items():
            assert torch.equal(value, tensors[name]) and torch.equal(found[name], value)
    save_file({"x": torch.ones(1)}, tmp_path / "file", {"format": "pt"})
    assert read_header(tmp_path / "file") == (["x"], {})


@dataclass
class Config(Options):
    number: float | None = option(None, "a number")
    flag: bool = option(False, "a flag")
    words: tuple[str, ...] = option(("a", "b"), "some words")
    kind: str = option("x", "a kind", ("x", "y"))


def test_command_line(monkeypatch, capsys):
    def call(main, line):
        monkeypatch.setattr("sys.argv", ["script", *line.split()])
        run_script(main, Config, "doc")

    seen = []
    call(seen.append, "--number 2 --flag --words c d --kind y")
    assert seen == [Config(2.0, True, ["c", "d"], "y")]
    with pytest.raises(SystemExit) as end:
        call(seen.append, "--help")
    assert end.value.code == 0 and "a kind (default: x)\n" in capsys.readouterr().out

    full = UserError("the disk is \x1b[2J full;\nmake room")
    for error, line, words in (
        (full, "", "error: the disk is ?[2J full; make room\n"),
        (MemoryError, "", "MemoryError()"),
        (PermissionError(13, "Permission denied", "mine"), "", "Permission denied: 'mine'"),
        (torch.OutOfMemoryError("tried 8 GiB\nof 4"), "", "(tried 8 GiB); lower --batch-size"),
        (None, "--nmber 2", "--nmber 2; --help lists the options"),
        (None, "--number two", "'two'"),
        (None, "--kind z", "'z'"),
        (None, "stray", "stray"),
    ):
        with pytest.raises(SystemExit) as end:
            call(Mock(side_effect=error), line)
        error = capsys.readouterr().err
        assert end.value.code == 2 and words in error
        assert error.startswith("error: ") and error.count("\n") == 1


def test_devices():
    """TF32, a GPU's default for convolutions, is switched off: float32 is float32."""
    torch.backends.cudnn.allow_tf32 = True
    assert pick_device("cpu").type == "cpu"
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(UserError, match="try --device cpu"):
        pick_device("toaster")


def test_a_ranks_own_error_is_its_own():
    for said in ("CUDA error: device-side assert triggered", "out of memory"):
        with pytest.raises(RuntimeError, match=said), others_alive():
            raise RuntimeError(said)
    with pytest.raises(UserError, match="another rank has failed"), others_alive():
        raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:40301")


def test_precisions(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [pick_amp(name, cpu) for name in ("auto", "off", "bf16")] == ["off", "off", "bf16"]
    for has_bf16, found in ((True, ["bf16", "fp16"]), (False, ["fp16", "fp16"])):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _=has_bf16, **__: _)
        assert [pick_amp("auto", gpu, WORKLOADS[row].half) for row in ("cifar10", "sd15")] == found
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with autocast(cpu, amp):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_batch_size_alone_keeps_the_proportions_of_every_phase():
    """Table 5's decoder phases take half of the samples and a quarter of the pairs."""
    for given, tiny, full in (
        ({"batch_size": 640}, (640, 320), (320, 80)),
        ({"batch_size": 2}, (2, 1), (1, 1)),
        ({"batch_size": 640, "batch_size_ref": 9}, (640, 9), (640, 9)),
        ({"batch_size_ref": 9}, (2560, 9), (1280, 9)),
    ):
        workload = get_workload("sd15-guidance8", **given)
        for step, decoder, sizes in ((0, "tiny", tiny), (79_999, "tiny", tiny),
                                     (80_000, "full", full), (164_999, "full", full)):  # fmt: skip
            row = workload.at(step)
            assert (row.decoder, row.batch_size, row.batch_size_ref) == (decoder, *sizes)


def test_pndm_starts_near_pure_noise():
    """At t = 1 + (steps - 1) (1000 // steps); a few steps start as low as 1000 / steps must."""
    for steps in (2, 5, 10, 50, 100, 250, 300, 999):
        assert get_workload("sd15", solver_steps=steps).solver_steps == steps
    for steps in (334, 501, 600):
        with pytest.raises(UserError, match=f"--steps {steps} of sd15 .*; choose a divisor of"):
            get_workload("sd15", solver_steps=steps)


@pytest.mark.parametrize(("n", "count"), [(12, 3), (7, 3), (2, 4), (0, 2)])
def test_ranks_share_everything_once(n, count):
    shares = [share(n, part, count) for part in range(count)]
    assert [row for part in shares for row in part] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= (n % count > 0)


def test_draws_are_a_function_of_the_key_and_share_no_number():
    """Philox's key and counter hold the four numbers, which the longest row does not reach."""
    assert len(set(STREAMS)) == len(STREAMS)
    for i, stream in enumerate(STREAMS):
        for seed, step, row in ((0, 0, 0), (5, 3, 7), (5 + 2**32, 2**40, 2**63), (2**64 - 1, 1, 1)):
            draws = generator(stream, seed, step, row)
            draws.standard_normal(10**6, "f4")
            state = draws.bit_generator.state["state"]
            assert state["key"].tolist() == [seed, i]
            assert state["counter"][2:].tolist() == [row, step]
    # If another version of numpy drew other numbers, half-made pairs could not be resumed.
    draw, expected = normal(generator("pairs", 0), 4), [0.05991, 0.01556, -1.16444, -0.13265]
    torch.testing.assert_close(draw, torch.tensor(expected), rtol=0, atol=1e-5)
    draws, rows = generator("paired", 1, 2, 3), draw_rows("paired", 1, 2, [3], (4,))
    assert all(map(torch.equal, rows, (uniform(draws, 1, 3), normal(draws, 1, 4))))


def test_grid(tmp_path):
    """EDM's rule x * 127.5 + 128, clamped; light grey between the images and in the empty place."""
    images = torch.stack([torch.full((3, 4, 5), x) for x in (-2.0, -1.0, 0.0, 0.5, 2.0)])
    save_grid(tmp_path / "grid.png", images, columns=2, scale=1, gap=1)
    picture = Image.open(tmp_path / "grid.png")
    assert picture.size == (1 + 2 * 6, 1 + 3 * 5)
    corners = [(x, y) for y in (1, 6, 11) for x in (1, 7)]
    pixels = [picture.getpixel(corner)[0] for corner in [(0, 0), *corners]]
    assert pixels == [200, 0, 0, 128, 191, 255, 200]


def test_imports_go_one_way():
    """The losses import none of our files, scripts never import scripts, and there is no circle."""
    texts = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text()
        for folder in (".", "plumbing", "assets", "benchmarks")
        for path in (ROOT / folder).glob("*.py")
    }

    def modules(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (node.module, *(f"{node.module}.{name.name}" for name in node.names))

    arrows = {
        name: {*modules(ast.walk(ast.parse(text)))} & texts.keys() for name, text in texts.items()
    }
    scripts = {name for name, text in texts.items() if '__name__ == "__main__"' in text}
    assert len(scripts) > 8 and not arrows["dmd_loss"]
    for name, others in arrows.items():
        assert name.startswith("benchmarks.") or not others & scripts, name
    TopologicalSorter(arrows).prepare()  # or CycleError, which names the circle
