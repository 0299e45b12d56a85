"""Several processes, and gradient accumulation: the result is that of one process, up to rounding.

Here two processes on the CPU, which talk through gloo; on GPUs the same code goes through NCCL.
"""

import csv
import time
from pathlib import Path

import pytest
import torch
from conftest import pairs_config, run_on_two_ranks

import make_pairs
import train
from dmd_loss import all_noise_levels, dm_noise_levels
from plumbing import rundir
from plumbing.devices import Ranks
from plumbing.options import UserError
from plumbing.pairs import draw_rows
from workloads import get_workload

ALONE = Ranks(0, 1, torch.device("cpu"))
STEPS = 3
OPTIONS = {"batch_size": 4, "batch_size_ref": 4, "device": "cpu", "save_every": 2}
OPTIONS |= {"steps": STEPS, "learning_rate": 2e-2}  # 4e-4 at the first of 50 steps of warm-up

# What rounding may do. Of one network's way from the teacher, as a fraction in the L2 norm; and of
# the losses and norms. Other samples, or a gradient of one rank alone, change either by over a
# tenth: see test_the_tolerances_tell_the_difference.
WEIGHTS, SCALARS = 0.01, 1e-3


def arguments(options):
    """The command line of a Config's fields."""
    line = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        line += [flag] if value is True else [flag, str(value)]
    return line


def train_on_two_ranks(small, out, torchrun=False, **options):
    options = arguments({**OPTIONS, **small, "out": out, **options})
    result = run_on_two_ranks("train.py", *options, torchrun=torchrun)
    assert result.returncode == 0, result.stderr
    return Path(out)


def train_alone(small, out, **options):
    train.main(get_workload(**{**OPTIONS, **small, "out": str(out), **options}))
    return Path(out)


def weights(out, part="G"):
    """The trained network's numbers, in one row."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)[part]["network"]
    return torch.cat([value.flatten() for value in state.values()])


def scalars(out):
    rows = list(csv.DictReader((out / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    return torch.tensor([[float(row[name]) for name in rundir.SCALARS] for row in rows])


def difference(first, second, teacher):
    """How far two runs are apart -> of the weights of G, of those of mu_fake, of the scalars."""
    apart = [
        ((weights(first, part) - weights(second, part)).norm()
         / (weights(first, part) - weights(teacher, part)).norm()).item()
        for part in ("G", "mu_fake")
    ]  # fmt: skip
    one, two = scalars(first), scalars(second)
    return *apart, ((one - two).abs() / (one.abs() + 1e-3)).max().item()


def agree(first, second, teacher):
    """Assert that two runs are the same up to rounding."""
    found = difference(first, second, teacher)
    assert found[0] < WEIGHTS and found[1] < WEIGHTS and found[2] < SCALARS, found


@pytest.fixture(scope="module")
def teacher(small, tmp_path_factory):
    """Where G and mu_fake start: a run with learning rate 0."""
    return train_alone(small, tmp_path_factory.mktemp("r") / "run", learning_rate=0.0, steps=1)


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """One process, without interruption."""
    return train_alone(small, tmp_path_factory.mktemp("straight") / "run")


# --------------------------------------------------------------------------------------------------
# Training


@pytest.mark.slow
def test_the_tolerances_tell_the_difference(small, straight, teacher, tmp_path, monkeypatch):
    """What the other tests would find if gradients were not averaged (rank 0 with its own rows
    alone), or if a rank drew other rows."""
    original = train.split_batch
    half = Ranks(0, 2, ALONE.device)
    with monkeypatch.context() as patch:
        patch.setattr(train, "split_batch", lambda config, _: original(config, half))
        alone = difference(straight, train_alone(small, tmp_path / "alone"), teacher)
    with monkeypatch.context() as patch:
        patch.setattr(
            train, "split_batch",
            lambda config, ranks: [(range(2, 6), rows) for _, rows in original(config, ranks)],
        )  # fmt: skip
        shifted = difference(straight, train_alone(small, tmp_path / "shifted"), teacher)
    for found in (alone, shifted):
        assert min(found[:2]) > 10 * WEIGHTS and found[2] > 10 * SCALARS, found


@pytest.mark.slow
def test_two_ranks_train_what_one_does(small, straight, teacher, tmp_path):
    """The same global batch, split over the ranks."""
    agree(straight, train_on_two_ranks(small, tmp_path / "run", torchrun=True), teacher)


@pytest.mark.slow
def test_sharded_optimizer(small, straight, teacher, tmp_path):
    """ZeRO computes the same, and leaves a checkpoint that one process can go on from."""
    out = train_on_two_ranks(small, tmp_path / "run", shard_optimizer=True, steps=2)
    train_alone(small, out)
    agree(straight, out, teacher)
    states = [
        torch.load(run / "checkpoint.pt", weights_only=True)["G"]["optimizer"]
        for run in (straight, out)
    ]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for of_parameter in states[1]["state"].values():
        assert of_parameter["step"] == STEPS


@pytest.mark.slow
def test_two_ranks_go_on_from_one(small, straight, teacher, tmp_path):
    """Processes, micro-batches and the sharding of AdamW's state may change at any checkpoint."""
    out = train_alone(small, tmp_path / "run", steps=1)
    options = {"accumulate": 2, "shard_optimizer": True}
    agree(straight, train_on_two_ranks(small, out, **options), teacher)


@pytest.mark.slow
def test_accumulation_is_one_step(small, straight, teacher, tmp_path, monkeypatch):
    """Each micro-batch has its share of the rows, and there is one update of either network."""
    rows, original = [], train.draw_batch

    def spy(run, step, unpaired, paired):
        rows.append((step, *unpaired, *(4 + row for row in paired)))
        return original(run, step, unpaired, paired)

    monkeypatch.setattr(train, "draw_batch", spy)
    agree(straight, train_alone(small, tmp_path / "run", accumulate=4), teacher)
    assert len(rows) == 4 * STEPS and {len(part) for part in rows} == {1 + 2}
    for step in range(STEPS):
        assert sorted(row for part in rows if part[0] == step for row in part[1:]) == list(range(8))
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    for part in ("G", "mu_fake"):
        assert {s["step"].item() for s in state[part]["optimizer"]["state"].values()} == {STEPS}


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (3, {}, "cannot be split evenly over 3 ranks and 1 parts each; choose multiples of 3"),
        (
            2,
            {"accumulate": 4},
            "--batch-size 4 and --batch-size-ref 4 cannot be split evenly over 2 ranks and 4",
        ),
        (2, {"batch_size": 3}, "--batch-size 3 and --batch-size-ref 4 cannot be split evenly"),
        (2, {"batch_size_ref": 3}, "--batch-size-ref 3 cannot be split evenly over 2 ranks"),
    ],
)
def test_batches_that_cannot_be_split(count, options, message):
    """Uneven parts would weigh their samples unequally."""
    with pytest.raises(UserError, match=message):
        train.split_batch(get_workload(**{**OPTIONS, **options}), Ranks(0, count, ALONE.device))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [((4, 5), (2,)), ((6, 7), (3,))]),
        ({"lambda_dm": 0.0}, [((), (2,)), ((), (3,))]),
        ({"lambda_reg": 0.0}, [((4, 5), ()), ((6, 7), ())]),
        ({"lambda_reg": 0.0, "kl_on_pairs": True}, [((4, 5), (2,)), ((6, 7), (3,))]),
    ],
)
def test_the_rows_of_the_second_of_two_ranks(options, expected):
    """The second half, in two parts; what only serves a loss of weight 0 is left out."""
    config = get_workload(**{"batch_size": 8, "batch_size_ref": 4, "accumulate": 2, **options})
    parts = train.split_batch(config, Ranks(1, 2, ALONE.device))
    assert [tuple(map(tuple, part)) for part in parts] == expected


@pytest.mark.slow
def test_a_failure_of_one_rank_ends_all(small, tmp_path):
    """Rank 0 finds something wrong while the other waits for it: one line says what, and nobody
    waits for those who are gone."""
    (tmp_path / "thesis.txt").write_text("mine")
    start = time.monotonic()
    options = arguments({**OPTIONS, **small, "out": tmp_path})
    result = run_on_two_ranks("train.py", *options, torchrun=True)
    assert result.returncode != 0 and time.monotonic() - start < 60
    assert f"error: {tmp_path} holds other files; choose another --out" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# --------------------------------------------------------------------------------------------------
# What is drawn


def test_a_row_does_not_depend_on_the_others():
    """Row i of step k is a function of (seed, k, i): of no other row, nor of how many there are."""
    shape = (3, 1, 4, 4)
    u, normal = draw_rows("unpaired", 7, 5, range(8), shape)
    some_u, some_normal = draw_rows("unpaired", 7, 5, [6, 1], shape)
    assert torch.equal(some_u, u[[6, 1]]) and torch.equal(some_normal, normal[[6, 1]])
    only_u, nothing = draw_rows("unpaired", 7, 5, [3], (3, 0))  # pairs, where no noise is needed
    assert torch.equal(only_u[0], u[3]) and nothing.shape == (1, 3, 0)
    others = [
        draw_rows("unpaired", 8, 5, range(8), shape),
        draw_rows("unpaired", 7, 6, range(8), shape),
    ]
    every = torch.cat([normal, *(n for _, n in others)]).flatten(1)
    assert (torch.cdist(every, every) + 100 * torch.eye(24)).min() > 1


def test_drawn_noise_levels():
    """KL: t in 20 .. 979, denoising: 0 .. 999, evenly, and independent of each other."""
    u, normal = draw_rows("unpaired", 0, 0, range(4000), (2,))
    t, t_fake = dm_noise_levels(u[:, 1]), all_noise_levels(u[:, 2])
    assert 20 <= t.min() < 30 and 970 < t.max() <= 979
    assert 0 <= t_fake.min() < 10 and 990 < t_fake.max() <= 999
    for levels in (t, t_fake):
        assert levels.double().mean() == pytest.approx(499.5, abs=20)  # 4 standard errors
    correlation = torch.corrcoef(torch.cat([u.T, normal.T.double()])) - torch.eye(5)
    assert correlation.abs().max() < 0.08  # 5 standard errors
    assert normal.std() == pytest.approx(1, abs=0.05)


# --------------------------------------------------------------------------------------------------
# Pairs


@pytest.mark.slow
def test_two_ranks_make_the_pairs_of_one(tmp_path, one_thread):
    """Byte by byte, with as many threads each."""
    options = {"num_pairs": 10, "steps": 3, "shard_size": 4, "device": "cpu"}
    result = run_on_two_ranks("make_pairs.py", *arguments(options), "--out", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("10 pairs of mnist in ") == 1
    make_pairs.main(pairs_config(**options, out=tmp_path / "one"))
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert len(one) == 5 and one == two
