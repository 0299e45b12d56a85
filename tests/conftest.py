"""What several test files share: a tiny set of pairs and a way to run a script."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import make_pairs
import train
from edm_unet import EDMPrecond
from plumbing import rundir
from plumbing.files import write_tensors
from workloads import WORKLOADS, Workload, get_workload

ROOT = Path(__file__).parent.parent
# One thread, so that two processes on one machine round alike.
ONE_THREAD = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
TINY = {"batch_size": 4, "batch_size_ref": 4, "device": "cpu"}


def run(*arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user would, e.g. run("sample.py", "--seeds", "0-3")."""
    command = [sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def run_on_two_ranks(*arguments, torchrun: bool = False) -> subprocess.CompletedProcess:
    """`run` in two processes, with the outputs of both.

    Args:
        torchrun: start them by torchrun, which takes as long as most trainings here, or by telling
            them what torchrun would.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    script = [str(ROOT / arguments[0]), *map(str, arguments[1:])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if torchrun:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
        commands = {None: [sys.executable, *launcher, *script]}
    else:
        commands = {rank: [sys.executable, *script] for rank in "01"}
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            command, **pipes, cwd=ROOT,
            env=ONE_THREAD | ({} if torchrun else {"RANK": rank, "LOCAL_RANK": rank, **address}),
        )
        for rank, command in commands.items()
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    out, error = ("".join(texts) for texts in zip(*outputs, strict=True))
    code = max(abs(process.returncode) for process in processes)
    return subprocess.CompletedProcess(script, code, out, error)


def start(script, options, until):
    """Start a script with a Config's fields as options, and return once the file exists."""
    line = [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *line], env=ONE_THREAD,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    while not until.exists():
        assert process.poll() is None
        time.sleep(0.02)
    return process


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


def tiny_config(pairs, out, **options):
    """A short run with the embedded teacher and its pairs, or with `small`'s."""
    where = pairs if isinstance(pairs, dict) else {"pairs": str(pairs)}
    return get_workload(out=str(out), **where, **{**TINY, "warmup": 2, **options})


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """train.main catches Ctrl-C; give it back to pytest."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Matplotlib takes longer than a few steps do; what subprocesses and fixtures run draws."""
    monkeypatch.setattr(rundir, "draw_curves", lambda path, rows: None)


@pytest.fixture
def one_thread():
    """What runs in this process rounds as a process with ONE_THREAD does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """20 MNIST pairs in 3 shards, 6 Heun steps."""
    folder = tmp_path_factory.mktemp("pairs") / "mnist"
    make_pairs.main(pairs_config(num_pairs=20, steps=6, shard_size=8, out=folder, device="cpu"))
    return folder


@pytest.fixture(scope="session")
def finished_run(pairs, tmp_path_factory):
    """Two steps on the tiny pairs."""
    out = tmp_path_factory.mktemp("runs") / "mnist"
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
    """Options of train.py: a small teacher and 20 of its pairs, for what must be quick."""
    folder, net = tmp_path_factory.mktemp("small"), small_network()
    options = {"teacher": str(folder / "teacher.safetensors"), "pairs": str(folder / "pairs")}
    about = {"kwargs": json.dumps(net.kwargs), "dataset": "mnist"}
    write_tensors(Path(options["teacher"]), net.state_dict(), about)
    how = {"num_pairs": 20, "steps": 3, "shard_size": 8, "device": "cpu"}
    make_pairs.main(pairs_config(**how, out=options["pairs"], teacher=options["teacher"]))
    return options
