"""The commands as a user types them, one line for what is wrong, and the paper's numbers."""

import json
import runpy
import sys

import pytest
from conftest import ROOT, fails_in_one_line

from workloads import ASSETS, WORKLOADS, get_workload


@pytest.mark.slow
def test_evaluate_by_command(tmp_path, monkeypatch, capsys):
    options = ["--checkpoint", ASSETS / "mnist_generator.safetensors", "--samples", 200]
    words = ["evaluate.py", *options, "--steps", 5, "--json", tmp_path / "numbers.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].startswith("student: FD ")
    rows = json.loads((tmp_path / "numbers.json").read_text())
    student, untrained, teacher = (rows.pop(name) for name in ("student", "untrained", "teacher"))
    assert not rows and [each["evaluations"] for each in (student, untrained, teacher)] == [1, 1, 9]
    # Digits, but of the untrained one a blur of each class.
    assert student["fd"] < 20 and teacher["fd"] < 50 < untrained["fd"] < 200
    assert min(each["accuracy"] for each in (student, untrained, teacher)) > 0.94
    assert untrained["diversity"] < 0.2 and min(student["diversity"], teacher["diversity"]) > 0.8


@pytest.mark.parametrize(("line", "words"), [
    ("make_pairs.py --dataset mnits", ["unknown dataset 'mnits'", "imagenet64"]),
    ("make_pairs.py --dataset cifar10 --teacher no.pkl", ["no.pkl does not exist"]),
    ("make_pairs.py --device cuda:99", ["'cuda:99'", "--device cpu"]),
    ("sample.py --labels 10", ["--labels 10: out of range", "0-9"]),
    ("sample.py --seeds one", ["--seeds", "0-9"]),
    ("sample.py --seeds 0-3,9-7", ["--seeds", "0-9"]),
    (f"sample.py --seeds {2**64}", ["--seeds"]),
    (f"train.py --seed {2**64}", ["--seed must be below 18446744073709551616"]),
    ("sample.py --steps 9", ["--steps is the teacher's", "--teacher"]),
])  # fmt: skip
def test_bad_input_by_command(tmp_path, run_here, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    result = run_here(*line.split())
    fails_in_one_line(result, *words)
    assert result.stdout in ("", "no run in runs/: using the shipped MNIST generator\n")
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_workloads_are_those_of_appendix_b():
    """The numbers that decide a run's result, as the paper prints them."""
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
    """End of the row: million pairs, lambda_reg, T_max, decoder, samples on each of 80 GPUs."""
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
    given = get_workload("sd15-guidance8", lambda_reg=0.3)  # which holds in all phases
    assert {given.at(step - 1).lambda_reg for step in table_5} == {0.3}
