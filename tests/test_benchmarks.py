"""The scripts in benchmarks/ run and count correctly. Nothing here tests how fast anything is."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails_in_one_line
from torch import nn

import sample
import train
from benchmarks import cost, pooling, precision, reproduce, speed, step, tables
from plumbing.options import UserError, parse
from plumbing.rundir import SCALARS
from sd_loader import sd_noise_table
from workloads import ASSETS, WORKLOADS, get_workload


def test_a_step_and_its_floor(tmp_path, capsys, monkeypatch):
    """Timed in turn: a forward of B images, one of B + R, a step."""
    numbers, times = tmp_path / "numbers.json", iter([2.0, 3.0, 38.0])
    monkeypatch.setattr(step, "milliseconds", lambda function, device: function() or next(times))
    step.main(step.Config(batch_size=8, repeats=1, resolution=32, device="cpu", json=str(numbers)))
    printed, found = capsys.readouterr().out, json.loads(numbers.read_text())
    assert "mnist, 32x32, batch 8 + 2," in printed
    last = printed.splitlines()[-1]
    assert last == "F(8) 2.0 ms, step 38.0 ms, floor 19.0 ms, ratio 2.00"  # 3 x 3 + 5 x 2
    assert (found["forward"], found["step"], found["floor"]) == (2, 38, 19)
    assert 0.1 < found["GiB"] < 16


def test_precision_of_a_small_unet(tmp_path, capsys):
    numbers = tmp_path / "numbers.json"
    precision.main(precision.Config(width=32, size=8, device="cpu", json=str(numbers)))
    found, table = json.loads(numbers.read_text()), capsys.readouterr().out
    rows = [line.split(" | ")[0] for line in table.splitlines()[2:-1]]
    assert rows == [f"| {name}" for name in found]
    assert list(found) == ["off", "bf16", "bf16, weights too", "fp16", "fp16, weights too"]
    alpha, sigma = (noise[999].item() for noise in sd_noise_table())
    for name, row in found.items():
        assert row["largest"] == pytest.approx(found["off"]["largest"], rel=0.05)
        if name != "off":  # 8 bits of precision, or 11
            least, most = (0.002, 0.05) if name.startswith("bf16") else (0.0002, 0.005)
            assert least < row["eps"] < most and least < row["mu_real"] / 14.6 < 4 * most
            assert row["x"] == pytest.approx(sigma / alpha * row["eps"])


@pytest.mark.parametrize(("script", "option", "value", "words"), [
    ("precision", "--size", 12, "multiple of 8"), ("step", "--resolution", 30, "multiple of 4"),
    ("cost", "--tflops", 0, "above 0"), ("speed", "--datasets", "sd15", "cifar10"),
])  # fmt: skip
def test_bad_options_by_command(script, option, value, words, run_here):
    fails_in_one_line(run_here(f"benchmarks/{script}.py", option, value), option, words)


def test_days_of_pairs_and_training(monkeypatch, capsys):
    """The pairs of the EDM datasets count at float32's rate, LPIPS at TF32's, all else at half
    precision's. Each image of a step costs 11 forwards: for sd15, G forward and backward 3, mu_fake
    forward 1, forward and backward 3, guided mu_real 2; with checkpointing, one more forward of G
    and of mu_fake. VGG-16 has 15.35 billion multiplications at 224x224."""
    monkeypatch.setattr(cost, "forward_flops", lambda dataset: 10**13)
    cost.print_costs(cost.Config(tflops=1000, tflops_tf32=10, tflops_float32=100, utilisation=1.0))
    rows = re.findall(r"^(\S+) .* ([\d.]+) days +([\d.]+) days$", capsys.readouterr().out, re.M)
    found = {dataset: [float(pairs), float(training)] for dataset, pairs, training in rows}
    vgg = 3 * 2 * 15.35e9 / 1e13  # seconds for a pair of images
    cifar10 = [100_000 * 35 / 10, 300_000 * (392 * 11 / 100 + 392 * vgg)]
    vgg *= (512 / 224) ** 2
    sd15 = [500_000 * 102 / 100, 20_000 * ((2304 + 1152) * 11 / 100 + 1152 * vgg)]
    for dataset, seconds in (("cifar10", cifar10), ("sd15", sd15)):
        assert found[dataset] == pytest.approx([each / 86400 for each in seconds], rel=2e-3)


def test_large_runs_stay_within_the_usual_limits():
    """sd15 has 859.5 million parameters. A step takes 30.54 PFLOP, and 0.554 for LPIPS in TF32."""

    def beyond(**options):
        return {
            (dataset, what)
            for dataset in cost.GPUS
            for what, (value, limit) in cost.demands(dataset, cost.Config(**options)).items()
            if limit is not None and value > limit
        }

    large = {name for name, row in WORKLOADS.items() if row.network} - {"mnist"}
    assert large == set(cost.GPUS) and beyond() == set()
    assert {dataset for dataset, _ in beyond(disk=0.5)} == {"sd15", "sd15-guidance8"}
    small = {what for _, what in beyond(host_memory=16)}
    assert small == {"GB of host memory, rank 0, `--shard-optimizer`"}

    sd15, guidance8 = (cost.demands(row, cost.Config()) for row in ("sd15", "sd15-guidance8"))
    assert guidance8["files of pairs"] == (12_000, None)
    assert guidance8["memory maps of a rank's shards"] == (2000, 65_530)
    y = 12_000_000 * 4 * 64 * 64 * 2 / 1e9  # and z of each file, and k and prompts
    assert y < guidance8["GB of pairs"][0] < y + 0.8 + 12_000_000 * 350 / 1e9
    wait = (30.54e15 / 312e12 + 0.554e15 / 156e12) / 0.4 / 72 + 0.8595 * 24
    for what, expected in {
        "GB of a save": 0.8595 * 28,
        "seconds from SIGTERM to a checkpoint": wait,
        "seconds from SIGTERM to a checkpoint, `--shard-optimizer`": wait + 0.8595 * 16 / 10,
    }.items():
        assert sd15[what][0] == pytest.approx(expected, abs=0.01)


def test_the_texts_have_the_numbers_of_cost_py(capsys):
    cost.main(cost.Config())
    costs, demands = capsys.readouterr().out.split("\n\n")
    texts = [(reproduce.ROOT / name).read_text(encoding="utf-8")
             for name in ("docs/large-runs.md", "benchmarks/README.md", "README.md")]  # fmt: skip
    assert demands in texts[0]
    for dataset, gpus in cost.GPUS.items():
        line = re.search(rf"^{dataset} .*", costs, re.M)[0]
        pairs, training = map(float, re.findall(r"([\d.]+) days", line))
        days = pairs + training
        needs = f"needs {float(f'{days:.2g}'):g} GPU days"
        assert needs in re.search(f"`{dataset}` .*", texts[0])[0]
        shown = re.findall(r"([\d.]+) days", re.search(rf"\| {dataset} \| .*GFLOP.*", texts[1])[0])
        assert [*map(float, shown)] == pytest.approx([pairs, training], rel=0.02)
        cards, gigabytes, least, disk = re.search(
            rf"`{dataset}`.* \| (\d+) x (\d+) GB \| ([\d.]+) \| (\d+) GB \|", texts[2]
        ).groups()
        assert int(cards) == gpus and float(least) == pytest.approx(days / gpus, rel=0.05)
        row = re.search(rf"\| {dataset} \| {gpus} \| (.*) \|", texts[0])[1].split(" | ")
        parts = dict(zip((16, 24, 40, 80), row[:4], strict=True))
        assert int(gigabytes) == min(size for size, n in parts.items() if n == "1")
        assert (disk, least) == (row[4], row[5])


def test_an_evening_of_cifar10():
    """The example in docs/large-runs.md, on one RTX 3090."""
    card = cost.Config(tflops=71, tflops_tf32=35.6, tflops_float32=35.6)
    text = (reproduce.ROOT / "docs" / "large-runs.md").read_text(encoding="utf-8")
    num_pairs, batch_size, steps = (
        int(re.search(f"--{name} (\\d+)", text.split("## CIFAR-10 in an evening")[1])[1])
        for name in ("num-pairs", "batch-size", "steps")
    )
    row = get_workload("cifar10", num_pairs=num_pairs, batch_size=batch_size, steps=steps)
    assert row.batch_size == row.batch_size_ref
    forward = cost.forward_flops("cifar10")
    minutes = card.seconds(float32=cost.pairs_flops(row, forward)) / 60
    hours = steps * card.seconds(*cost.step_flops(row, forward)) / 3600
    assert f"at least {minutes:.0f} minutes and {hours:.1f} hours" in text
    assert f"at least {sum(cost.days('cifar10', card)):.0f} days" in text
    page = (reproduce.ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    parts = re.findall(r"\| cifar10 \| (\d+) \+ \d+ \| [\d.]+ \| ([\d.]+) \|", page)
    sizes, peaks = np.array(parts, float).T
    needed = np.interp(batch_size, sizes, peaks)
    shown = float(re.search(r"memory, by `memory.py` \| ([\d.]+) GiB", text)[1])
    assert shown == pytest.approx(needed, abs=0.1) and 1.1 * shown + 1 < 22
    smaller = int(re.search(r"16 GB, use `--batch-size (\d+)`", text)[1])
    assert 1.1 * np.interp(smaller, sizes, peaks) + 1 < 15


def test_the_two_lpips_differ_in_the_pooling_alone():
    """LPIPS by hand (Zhang et al. 2018, Eq. 1), for images in [-1, 1], equals the package's with
    max pooling, and the network of pooling.py with average pooling."""
    torch.manual_seed(0)
    package = pooling.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    x, y = 2 * torch.rand(2, 2, 3, 32, 32) - 1

    def by_hand(pool: nn.Module) -> torch.Tensor:
        mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)  # ImageNet's, of [0, 1]
        std = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
        f, distance = ((torch.cat([x, y]) + 1) / 2 - mean) / std, torch.zeros(2)
        for part, linear in zip(package.net.children(), package.lins, strict=True):
            for layer in part:
                f = (pool if isinstance(layer, nn.MaxPool2d) else layer)(f)
            unit_x, unit_y = nn.functional.normalize(f, dim=1).chunk(2)
            difference = (unit_x - unit_y).square().mean((2, 3))  # (B, C), over all pixels
            distance += difference @ linear.model[-1].weight.flatten()
        return distance.reshape(2, 1, 1, 1)

    with torch.no_grad():
        ours, average = package(x, y), pooling.average_pooling(package)(x, y)
        torch.testing.assert_close(by_hand(nn.MaxPool2d(2)), ours, rtol=1e-5, atol=0)
        torch.testing.assert_close(by_hand(nn.AvgPool2d(2)), average, rtol=1e-5, atol=0)
    assert ((average / ours - 1).abs() > 0.01).all()


@pytest.mark.parametrize("by_size", [{}, {"mnist": {28: {"step": 9.0, "GiB": 1.0}}}])
def test_the_picture_of_speeds(tmp_path, by_size):
    by_batch = {"mnist": {n: {"step": 10.0 * n, "GiB": 0.1 * n} for n in (4, 8)}}
    speed.draw(tmp_path / "speed.png", by_batch, by_size, batch=8)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def commands(monkeypatch, finished_run) -> list[list[str]]:
    """reproduce.py with little to do: made-up test digits, 200 digits of each row, one solver, two
    variants, one seed; instead of running a script, it copies files. -> the scripts' commands."""
    digits, labels = torch.rand(300, 1, 28, 28) * 2 - 1, torch.arange(300) % 10
    leaves = {"train.py": finished_run, "assets/train_classifier.py": ASSETS}
    commands = []

    def run(*command, jobs=1, cwd=None):
        commands.append([*map(str, command)])
        if Path(command[0]).name == "minimal.py":
            commands[-1] += re.findall("SEED = .*", Path(command[0]).read_text())
            shutil.copy(
                ASSETS / "mnist_generator.safetensors", cwd / "generator_000002.safetensors"
            )
        if command[0] in leaves:
            out = Path(command[command.index("--out") + 1])
            shutil.copytree(leaves[command[0]], out, dirs_exist_ok=True)
            for step in (1, 2):
                shutil.copy(
                    ASSETS / "mnist_generator.safetensors",
                    out / f"generator_00000{step}.safetensors",
                )
        return 1.0

    for name, value in {
        "load_mnist": lambda folder, train: (digits, labels), "SAMPLES": 200, "run": run,
        "SOLVERS": dict(list(reproduce.SOLVERS.items())[:1]), "FIVE_SEEDS": (), "SEEDS": 1,
        "STEPS": 2, "POINTS": (1, 2), "LONGER": ("longer",), "SHORT_VARIANTS": ("no KL",),
        "VARIANTS": {
            reproduce.DEFAULT: {}, reproduce.MINIMAL: {}, "no KL": {"lambda_dm": 0, "steps": 1},
            "longer": {},
        },
        "publish": lambda config, runs: None,
        "changed": lambda: False, "forward_ms": lambda: 40.0,
    }.items():  # fmt: skip
        for module in (reproduce, tables):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    return commands


def test_reproduce_measures_once_and_mixes_nothing(commands, tmp_path, monkeypatch):
    path = tmp_path / "mnist.json"
    config = reproduce.Config(out=str(tmp_path), runs=str(tmp_path / "runs"), jobs=2)
    reproduce.main(config)
    results = json.loads(path.read_text())
    students = [reproduce.MINIMAL, reproduce.DEFAULT, "no KL", "longer, 1 steps", "longer, 2 steps"]
    assert sorted(results) == sorted([reproduce.REAL, *reproduce.SOLVERS, *students])
    copy = reproduce.folder_of(reproduce.MINIMAL, 0, config) / "minimal.py"
    assert [str(copy), "SEED = 0"] in commands
    (entry,) = results[reproduce.DEFAULT].values()
    assert set(entry["judges"]["convolutions"]) == {*tables.FIGURES, "samples"}
    assert len(entry["diversity_by_class"]) == 10 and set(entry["seconds"]) >= {"pairs", "train"}
    (minimal,) = results[reproduce.MINIMAL].values()
    assert entry["F"] == minimal["F"] == 40
    with open(tmp_path / "runs/no-kl-0/log.csv", newline="") as file:
        first = next(csv.DictReader(file))
    (entry,) = results["no KL"].values()
    assert entry["scalars"] == {name: float(first[name]) for name in SCALARS}

    trained, made_pairs = [], str(tmp_path / "runs" / "pairs")
    for command in commands:  # the scripts know these options
        monkeypatch.setattr(sys, "argv", command)
        if command[0] == "train.py":
            made = parse(get_workload, "", train.FLAGS)
            trained.append((made.steps, made.lambda_dm, made.seed, made.pairs == made_pairs))
        elif command[0] == "sample.py":
            parse(sample.Config, "")
    assert sorted(trained) == [(1, 0, 0, True), (1000, 1, 0, True), (1000, 1, 0, True)]

    commands.clear()
    reproduce.main(config)
    assert [command[0] for command in commands] == ["make_pairs.py"]  # which resumes by itself
    assert json.loads(path.read_text()) == results
    changed = reproduce.dependencies() | {"losses": "0" * 16}
    monkeypatch.setattr(reproduce, "dependencies", lambda: changed)
    with pytest.raises(UserError, match="made with another losses than today's"):
        reproduce.main(config)
    assert json.loads(path.read_text()) == results


def test_figures_come_from_commits(monkeypatch):
    """reproduce.py does not measure what nobody can check out."""
    results = json.loads((reproduce.ROOT / "results" / "mnist.json").read_text())
    for by_seed in results.values():
        assert all(re.fullmatch("[0-9a-f]{12}", entry["commit"]) for entry in by_seed.values())
    monkeypatch.setattr(reproduce, "git", lambda *words: " M train.py")
    with pytest.raises(UserError, match="commit first"):
        reproduce.main(reproduce.Config())
    assert reproduce.provenance()["commit"].endswith("-dirty")


def test_reproduce_stops_with_its_scripts(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / "leave.py").write_text("import sys; sys.exit(int(sys.argv[1]))")
    assert reproduce.run("leave.py", 0) > 0
    for code, error in ((2, UserError), (130, KeyboardInterrupt)):
        with pytest.raises(error):
            reproduce.run("leave.py", code)


def test_comments_and_docstrings_do_not_count_as_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    hashes, code = [], "def f(x):\n    return {} * x\n"
    commented = '"""Module."""\n\ndef f(x):\n    """What."""\n    return 2 * x  # twice\n'
    for text in (commented, code.format(2), code.format(3)):
        (tmp_path / "code.py").write_text(text)
        hashes.append(reproduce.code_hash("code.py"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_tables_show_mean_and_range_and_fill_the_markers():
    assert tables.cell([1.0, 3.0, 2.0], "{:.1f}") == "2.0 (1.0 .. 3.0)"
    assert tables.cell([0.98], "{:.1%}") == "98.0%"
    text = "a\n<!-- table: x -->\n{}\n<!-- end -->\nb\n"
    assert tables.fill(text.format("old"), {"x": "| new |\n"}) == text.format("| new |")


def test_the_figure_of_steps_shows_means(monkeypatch, tmp_path):
    """Every figure and every logged scalar against the step, for the runs that are there."""
    figures, drawn = [], tables.draw_steps
    monkeypatch.setattr(tables, "write_figure", lambda path, figure: figures.append(figure))
    (name, *_), steps = tables.LONGER, tables.POINTS[:2]

    def entry(value: float) -> dict:
        judged = {judge: dict.fromkeys(tables.FIGURES, value) for judge in tables.JUDGES}
        return {"judges": judged, "scalars": dict.fromkeys(SCALARS, value)}

    drawn(tmp_path / "steps.png", {
        tables.label(name, step): {"0": entry(step), "1": entry(3 * step)} for step in steps
    })  # fmt: skip
    titles = [axis.get_title() for axis in figures[0].axes]
    assert titles == ["FD", "FD (2)", "accuracy", "diversity", "recall", *SCALARS]
    for axis in figures[0].axes:
        line, *_, default = axis.lines
        assert list(line.get_xdata()) == list(steps)
        assert list(line.get_ydata()) == [2 * step for step in steps]
        assert set(default.get_xdata()) == {tables.STEPS}


def test_minimal_py_says_what_was_measured():
    judged = [{"fd": fd, "accuracy": 0.98 + fd / 500, "diversity": 0.97} for fd in (1.5, 1.0)]
    results = {
        tables.MINIMAL: {
            str(seed): {"judges": {tables.JUDGES[0]: found}, "seconds": {"together": 250.0}}
            for seed, found in enumerate(judged)
        }
    }
    text = "It takes in 9 minutes on.\nThree seeds give nothing.\n"
    said = "Three seeds give FD 1.00 to 1.50, accuracy 98.2 to 98.3 %, diversity 0.97."
    assert tables.about_minimal(text, results) == f"It takes in 4 minutes on.\n{said}\n"
    assert tables.about_minimal(text, {}) == text
