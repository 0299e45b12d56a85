"""The commands as a user types them: what is wrong is said in one line."""

import json

import pytest
from conftest import fails_in_one_line, run

from plumbing.options import UserError
from workloads import WORKLOADS, get_workload


@pytest.mark.slow
def test_evaluate_by_command(finished_run, tmp_path):
    result = run(
        "evaluate.py", "--checkpoint", finished_run, "--samples", 200, "--steps", 5,
        "--json", tmp_path / "numbers.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("student: FD ")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert set(numbers) == {"student", "teacher", "untrained"}
    for row in numbers.values():
        assert {"fd", "accuracy", "diversity"} <= set(row)
    # Five Heun steps are far better than one (21 and 85); two steps of training are not.
    assert numbers["teacher"]["fd"] < 0.4 * min(numbers[r]["fd"] for r in ("untrained", "student"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["make_pairs.py", "--dataset", "mnits"], ["unknown dataset 'mnits'", "imagenet64"]),
        (
            ["make_pairs.py", "--dataset", "cifar10", "--teacher", "no.pkl"],
            ["no.pkl does not exist"],
        ),
        (["make_pairs.py", "--device", "cuda:99"], ["'cuda:99'", "--device cpu"]),
        (["train.py", "--pairs", "nowhere"], ["no pairs in nowhere", "make_pairs.py"]),
        (["sample.py", "--labels", "10"], ["--labels 10: out of range", "0-9"]),
        (["sample.py", "--seeds", "one"], ["--seeds", "0-9"]),
        (["sample.py", "--seeds", "0-3,9-7"], ["--seeds", "0-9"]),
        (["sample.py", "--seeds", str(2**64)], ["--seeds"]),
        (["train.py", "--seed", str(2**64)], ["--seed must be below 18446744073709551616"]),
        (["sample.py", "--dataset", "mnist"], ["unrecognized arguments: --dataset mnist"]),
        (["sample.py", "--steps", "9"], ["--steps is the teacher's", "--teacher"]),
        (["evaluate.py", "--rows", "pupil"], ["'pupil'", "student"]),
    ],
)  # fmt: skip
def test_bad_input_by_command(tmp_path, run_here, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    fails_in_one_line(run_here(*command), *words)
    assert not list(tmp_path.iterdir())


def test_bad_input_in_a_process_of_its_own(tmp_path):
    result = run("sample.py", "--seeds", "one", cwd=tmp_path)
    fails_in_one_line(result, "--seeds")
    assert result.stdout == "no run in runs/: using the shipped MNIST generator\n"


def test_the_workloads_are_those_of_appendix_b():
    """The numbers that decide a run's outcome, as printed in the paper."""
    found = {
        name: (w.num_pairs, w.solver_steps, w.learning_rate, w.batch_size, w.lambda_reg, w.steps)
        for name, w in WORKLOADS.items()
        if name not in ("mnist", "edm")
    }
    assert found == {
        "cifar10": (100_000, 18, 5e-5, 392, 0.25, 300_000),
        "cifar10-uncond": (500_000, 18, 5e-5, 392, 0.5, 300_000),
        "imagenet64": (25_000, 256, 2e-6, 336, 0.25, 350_000),
        "sd15": (500_000, 50, 1e-5, 2304, 0.25, 20_000),
        "sd15-guidance8": (12_000_000, 50, 1e-5, 2560, 1.0, 165_000),
    }
    for name, w in WORKLOADS.items():
        assert (w.weight_decay, w.beta2, w.grad_clip) == (0.01, 0.999, 10.0)
        if name != "mnist":
            assert (w.warmup, w.beta1, w.ema, w.fake_lr_ratio) == (500, 0.9, 0.0, 1.0)


def test_the_phases_are_those_of_table_5():
    """Until which step: million pairs, lambda_reg, T_max, decoder, samples on each of 80 GPUs."""
    table_5 = {
        5_400: (2.5, 0.1, 980, "tiny", 32, 16),
        8_600: (2.5, 0.5, 980, "tiny", 32, 16),
        21_100: (2.5, 1, 980, "tiny", 32, 16),
        56_300: (4, 1, 980, "tiny", 32, 16),
        60_100: (6, 1, 980, "tiny", 32, 16),
        68_000: (9, 1, 980, "tiny", 32, 16),
        74_000: (12, 1, 980, "tiny", 32, 16),
        80_000: (12, 1, 500, "tiny", 32, 16),
        127_000: (12, 1, 500, "full", 16, 4),
        149_500: (12, 0.75, 500, "full", 16, 4),
        162_500: (12, 0.5, 500, "full", 16, 4),
        165_000: (12, 0.25, 500, "full", 16, 4),
    }
    row = WORKLOADS["sd15-guidance8"]
    assert (row.guidance, row.steps) == (8, 165_000)
    for start, (end, expected) in zip([0, *table_5], table_5.items(), strict=False):
        for step in (start, end - 1):
            w = row.at(step)
            found = (w.num_pairs / 1e6, w.lambda_reg, w.max_dm_step, w.decoder)
            assert (*found, w.batch_size / 80, w.batch_size_ref / 80) == expected, step
    given = get_workload("sd15-guidance8", lambda_reg=0.3, batch_size=160)
    for step in table_5:  # what the command line says holds in all phases
        w = given.at(step - 1)
        assert (w.lambda_reg, w.batch_size, w.batch_size_ref) == (0.3, 160, 80)
    with pytest.raises(UserError, match="--steps of sd15-guidance8 must be at most 165000"):
        get_workload("sd15-guidance8", steps=165_001)
