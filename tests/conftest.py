"""What several test files share: tiny pairs and runs, and ways to start a script."""

import csv
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

# Here and in every process that a test starts: one thread, so that all round alike and nobody waits
# for others over small tensors; and no GPU. PyTorch reads this when it is imported.
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import pytest
import torch

import make_pairs
import train
from edm_unet import EDMPrecond
from plumbing import rundir
from plumbing.devices import Ranks
from plumbing.drawing import draw_curves
from plumbing.files import write_tensors
from workloads import WORKLOADS, Workload, get_workload

ROOT = Path(__file__).parent.parent
ALONE = Ranks(0, 1, torch.device("cpu"))
TINY = {"batch_size": 4, "batch_size_ref": 4, "device": "cpu"}

# Curves take longer than a few steps do; `finished_run` and `run` draw them.
rundir.draw_curves = lambda path, rows: None

# What a new process would take seconds to import; the server that forks them does so once.
SLOW_TO_IMPORT = ["pytest", "torch._dynamo", "torch.distributed.optim", "torchvision.utils"]


def run(*arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user would, e.g. run("sample.py", "--seeds", "0-3")."""
    command = [sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def flags(options: dict) -> list[str]:
    """The command line of these options."""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return words


def run_on_two_ranks(*arguments) -> subprocess.CompletedProcess:
    """`run` in two processes, told what torchrun would tell them; with the outputs of both."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    script = [str(ROOT / arguments[0]), *map(str, arguments[1:])]
    with tempfile.TemporaryDirectory() as folder:
        codes = in_forks(*((as_rank, rank, script, world, folder) for rank in "01"))
        out, error = (
            "".join(Path(folder, stream + rank).read_text() for rank in "01") for stream in "12"
        )
    return subprocess.CompletedProcess(script, max(map(abs, codes)), out, error)


def as_rank(rank: str, script: list[str], world: dict[str, str], folder: str) -> None:
    """In a fork: run a script, with its outputs 1 and 2 in files."""
    os.environ.update(world, RANK=rank, LOCAL_RANK=rank)
    for stream in "12":
        os.dup2(os.open(Path(folder, stream + rank), os.O_CREAT | os.O_WRONLY), int(stream))
    os.chdir(ROOT)
    sys.argv = script
    runpy.run_path(script[0], run_name="__main__")


def kill_in_write(main, config: Workload, name: str, time: int = 1) -> None:
    """main(config) in a fork, killed in the middle of writing this file for the n-th time."""
    assert in_forks((half_write, main, config, name, time)) == [-signal.SIGKILL]


def half_write(main, config: Workload, name: str, time: int) -> None:
    """In the fork that is killed."""
    original = os.replace

    def replace(temporary, path):
        nonlocal time
        time -= path.name == name
        if time == 0:
            os.truncate(temporary, os.path.getsize(temporary) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        original(temporary, path)

    os.replace = replace
    main(config)


def unlock() -> None:
    """Give back the folders in which this process worked, as its end would."""
    while rundir.locks:
        os.close(rundir.locks.pop())


def in_forks(*calls: tuple) -> list[int]:
    """Call functions, (function, *arguments) each, in a fork each -> the exit codes."""
    unlock()
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([*SLOW_TO_IMPORT, "make_pairs", "train", "evaluate"])
    processes = [forks.Process(target=function, args=rest) for function, *rest in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()  # if it hangs
        process.join()
    return [process.exitcode for process in processes]


@pytest.fixture
def run_here(monkeypatch, capsys):
    """`run` within this process, in a moment: for a command that ends in an error."""

    def call(*arguments) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
        return subprocess.CompletedProcess(sys.argv, end.value.code, *capsys.readouterr())

    return call


def fails_in_one_line(result: subprocess.CompletedProcess, *words: str) -> None:
    """Assert a user error: exit code 2 and one line that holds these words."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    for word in words:
        assert word in last


def pairs_config(**flags) -> Workload:
    """What make_pairs.py makes of its flags."""
    fields = {"steps": "solver_steps", "batch_size": "solver_batch", "out": "pairs"}
    fields = {fields.get(flag, flag): value for flag, value in flags.items()}
    return get_workload(**fields | {"pairs": str(fields["pairs"])})


def tiny_config(pairs, out, **options) -> Workload:
    """A short run with the embedded teacher and its pairs, or with `small`'s."""
    where = pairs if isinstance(pairs, dict) else {"pairs": str(pairs)}
    return get_workload(out=str(out), **where, **{**TINY, "warmup": 2, **options})


def start(config: Workload, ranks: Ranks = ALONE) -> train.Run:
    """A Run as train.main prepares it."""
    return train.prepare(ranks, *train.load_inputs(config, ranks))


def files(folder: Path) -> dict[str, bytes]:
    """The contents of a folder, without its lock."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


def scalars(folder: Path) -> list[list[float]]:
    """The logged losses and norms, a row per step from the first on."""
    rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [[float(row[name]) for name in rundir.SCALARS] for row in rows]


@pytest.fixture(autouse=True)
def leave_nothing_behind():
    """train.main catches Ctrl-C and locks its folder until the process ends; undo that."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    unlock()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def random_lpips(monkeypatch):
    """LPIPS with a random VGG, without a second for its linear layers, which are not used."""
    import lpips  # takes long, and the forks import this file

    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda layer: None)
    monkeypatch.setattr(torch.nn.init, "normal_", lambda weight, *_: weight)
    monkeypatch.setattr(lpips, "LPIPS", partial(lpips.LPIPS, pnet_rand=True))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """20 MNIST pairs in 3 shards, 6 Heun steps."""
    folder = tmp_path_factory.mktemp("pairs") / "mnist"
    make_pairs.main(pairs_config(num_pairs=20, steps=6, shard_size=8, out=folder, device="cpu"))
    return folder


@pytest.fixture(scope="session")
def finished_run(pairs, tmp_path_factory) -> Path:
    """The folder of a run of two steps on the tiny pairs."""
    out = tmp_path_factory.mktemp("runs") / "mnist"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rundir, "draw_curves", draw_curves)
        train.main(tiny_config(pairs, out, steps=2))
    return out


def small_network() -> EDMPrecond:
    """17,000 random weights for MNIST's images; their output is not almost 0 as at the start."""
    torch.manual_seed(0)
    net = EDMPrecond(
        **WORKLOADS["mnist"].network
        | {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": []}
    ).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> dict[str, str]:
    """Options of train.py: a small teacher and 20 of its pairs, for tests that must be quick."""
    folder, net = tmp_path_factory.mktemp("small"), small_network()
    options = {"teacher": str(folder / "teacher.safetensors"), "pairs": str(folder / "pairs")}
    about = {"kwargs": json.dumps(net.kwargs), "dataset": "mnist"}
    write_tensors(Path(options["teacher"]), net.state_dict(), about)
    how = {"num_pairs": 20, "steps": 3, "shard_size": 8, "device": "cpu"}
    make_pairs.main(pairs_config(**how, out=options["pairs"], teacher=options["teacher"]))
    return options
