"""Several processes, and gradient accumulation: the result is that of one process, up to rounding.

Here two processes on the CPU talk through gloo; on GPUs the same code goes through NCCL.
"""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ALONE, ROOT, flags, run_on_two_ranks, scalars, start

import train
from plumbing.devices import Ranks
from plumbing.options import UserError
from workloads import get_workload

STEPS = 5
OPTIONS = {"batch_size": 4, "batch_size_ref": 4, "device": "cpu", "save_every": 2}
OPTIONS |= {"steps": STEPS, "learning_rate": 2e-2}  # 4e-4 at the first of 50 steps of warm-up


def config(small, out, **options):
    return get_workload(**{**OPTIONS, **small, "out": str(out), **options})


def weights(networks):
    """The numbers of G and of mu_fake, in one row each."""
    return [torch.cat([value.flatten() for value in net.values()]) for net in networks]


def train_here(small, out, **options):
    """The run of one process -> weights before and after it, logged (STEPS, 5), the Run."""
    run = start(config(small, out, **options))
    networks = run.G.network, run.mu_fake.network
    before = weights(net.state_dict() for net in networks)
    logged = torch.stack([torch.stack(train.training_step(run, k)) for k in range(STEPS)])
    return before, weights(net.state_dict() for net in networks), logged, run


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    return train_here(small, tmp_path_factory.mktemp("straight") / "run")


def agree(straight, after, logged):
    """Assert that a run is the straight one up to rounding: in the weights of G and of mu_fake, by
    their way from the teacher, and in the scalars. Other samples, or the gradient of one rank
    alone, change each of these by over a tenth."""
    before, expected, logged_expected, _ = straight
    for origin, one, two in zip(before, expected, after, strict=True):
        assert (one - two).norm() < 0.01 * (one - origin).norm()
    torch.testing.assert_close(logged, logged_expected, rtol=1e-3, atol=1e-6)


def test_one_and_two_ranks_take_turns(small, straight, tmp_path):
    """Processes, parts of the batch and sharding (ZeRO) may change at any checkpoint."""
    out = tmp_path / "run"
    sharded = {"shard_optimizer": True}
    turns = [(2, sharded), (1, sharded), (2, {"accumulate": 2}), (2, sharded)]
    for steps, (count, options) in enumerate(turns, start=1):
        options = {"steps": steps, **options}
        if count == 1:
            train.main(config(small, out, **options))
        else:
            line = flags({**OPTIONS, **small, "out": out, **options})
            result = run_on_two_ranks("train.py", *line)
            assert result.returncode == 0, result.stderr
            assert result.stdout.count("wrote ") == 1  # rank 0 alone prints
            assert "Warning" not in result.stderr  # of DistributedDataParallel
    train.main(config(small, out))

    state = torch.load(out / "checkpoint.pt", weights_only=True)
    after = weights(state[name]["network"] for name in ("G", "mu_fake"))
    agree(straight, after, torch.tensor(scalars(out)))
    of_parameters = state["G"]["optimizer"]["state"]
    assert of_parameters.keys() == straight[-1].G.optimizer.state_dict()["state"].keys()
    assert {values["step"].item() for values in of_parameters.values()} == {STEPS}


SHARE = """
import json, sys, train, workloads
from plumbing.devices import join_ranks

ranks, config = join_ranks("cpu"), workloads.get_workload(**json.loads(sys.argv[1]))
run = train.prepare(ranks, *train.load_inputs(config, ranks))
train.training_step(run, 0)
gathered = run.G.state_dict()["optimizer"].get("state", {}).values()
held = run.G.optimizer.state.values()
print([sum(v["exp_avg"].numel() for v in values) for values in (gathered, held)])
"""


def test_each_rank_holds_its_share_of_adamws_state(small, tmp_path):
    """Even after the whole has gone to rank 0 for a checkpoint."""
    (tmp_path / "share.py").write_text(SHARE)
    options = {**OPTIONS, **small, "out": str(tmp_path / "run"), "shard_optimizer": True}
    result = run_on_two_ranks(tmp_path / "share.py", json.dumps(options))
    assert result.returncode == 0, result.stderr
    (whole, first), (nothing, second) = map(json.loads, result.stdout.splitlines())
    assert nothing == 0 and first + second == whole and abs(first - second) < 0.2 * whole


def test_accumulation_is_one_step(small, straight, tmp_path):
    """Micro-batches give the same gradients, and either network is updated once."""
    _, after, logged, run = train_here(small, tmp_path / "run", accumulate=4)
    agree(straight, after, logged)
    for learner in (run.G, run.mu_fake):
        assert {state["step"].item() for state in learner.optimizer.state.values()} == {STEPS}


@pytest.mark.parametrize(("count", "options", "message"), [
    (3, {}, "cannot be split evenly over 3 ranks and 1 parts each; choose multiples of 3"),
    (2, {"accumulate": 4}, "-size 4 and --batch-size-ref 4 cannot be split evenly over 2 .* 4"),
    (2, {"batch_size": 3}, "--batch-size 3 and --batch-size-ref 4 cannot be split evenly"),
    (2, {"batch_size_ref": 3}, "--batch-size-ref 3 cannot be split evenly over 2 ranks"),
])  # fmt: skip
def test_batches_that_cannot_be_split(count, options, message):
    """Uneven parts would weigh their samples unequally."""
    with pytest.raises(UserError, match=message):
        train.split_batch(get_workload(**{**OPTIONS, **options}), Ranks(0, count, ALONE.device))


@pytest.mark.parametrize(("dataset", "options", "expected"), [
    ("mnist", {}, [((4, 5), (2,)), ((6, 7), (3,))]),
    ("mnist", {"lambda_dm": 0.0}, [((), (2,)), ((), (3,))]),
    ("mnist", {"lambda_reg": 0.0}, [((4, 5), ()), ((6, 7), ())]),
    ("sd15", {"lambda_dm": 0.0}, [((), (2,)), ((), (3,))]),
    ("sd15", {"lambda_reg": 0.0}, [((4, 5), (2,)), ((6, 7), (3,))]),
])  # fmt: skip
def test_the_rows_of_the_second_of_two_ranks(dataset, options, expected):
    """The second half, in two parts, without the rows that only serve a loss of weight 0. (Line 4
    of Algorithm 1, for sd15: the paired rows serve the KL gradient too.)"""
    options = {"batch_size": 8, "batch_size_ref": 4, "accumulate": 2, **options}
    parts = train.split_batch(get_workload(dataset, **options), Ranks(1, 2, ALONE.device))
    assert [tuple(map(tuple, part)) for part in parts] == expected


def test_a_failure_of_one_rank_ends_all(small, tmp_path):
    """Rank 0 says what is wrong in one line. The other, which waits for it, ends as well."""
    (tmp_path / "thesis.txt").write_text("mine")
    line = flags({**OPTIONS, **small, "out": tmp_path})
    two = run_on_two_ranks("train.py", *line)
    assert two.returncode == 2 and "error: another rank has failed; see its message" in two.stderr
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "train.py", *line]
    torchrun = subprocess.run(command, capture_output=True, text=True, timeout=120)
    for result in (two, torchrun):
        assert result.returncode != 0
        assert f"error: {tmp_path} holds other files; choose another --out" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
