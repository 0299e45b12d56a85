"""What several test files share: a tiny set of pairs and a way to run a script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import make_pairs
from workloads import Workload, get_workload

ROOT = Path(__file__).parent.parent
# One thread, so that two processes on one machine round alike.
ONE_THREAD = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(*arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user would, e.g. run("sample.py", "--seeds", "0-3")."""
    command = [sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


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
