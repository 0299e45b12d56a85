"""The measuring scripts in benchmarks/: that they run and count right, not how fast anything is."""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, fails_in_one_line, run

from plumbing.options import UserError
from sd_loader import sd_noise_table
from workloads import ASSETS, WORKLOADS


def load(name: str):
    """benchmarks/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_step_by_command(tmp_path):
    numbers = tmp_path / "numbers.json"
    options = ("--batch-size", 2, "--repeats", 1, "--resolution", 32, "--device", "cpu")
    result = run("benchmarks/step.py", *options, "--json", numbers)
    assert result.returncode == 0, result.stderr
    assert "mnist, 32x32, batch 2" in result.stdout
    found = json.loads(numbers.read_text())
    F, step, floor, ratio = map(float, re.findall(r"[\d.]+", result.stdout.splitlines()[-1]))
    assert (F, step) == (round(found["forward"], 1), round(found["step"], 1))
    assert floor == pytest.approx(11 * found["forward"], abs=0.06)
    assert ratio == pytest.approx(found["step"] / found["forward"] / 11, abs=0.006)
    assert 0.1 < found["GiB"] < 16


def test_precision_of_a_small_unet(tmp_path, capsys):
    precision, numbers = load("precision"), tmp_path / "numbers.json"
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


def test_bad_options_by_command(run_here):
    fails_in_one_line(run_here("benchmarks/precision.py", "--size", 12), "--size", "multiple of 8")
    fails_in_one_line(
        run_here("benchmarks/step.py", "--resolution", 30), "resolution", "multiple of 4"
    )
    fails_in_one_line(run_here("benchmarks/cost.py", "--tflops", 0), "--tflops", "above 0")
    fails_in_one_line(run_here("benchmarks/speed.py", "--datasets", "sd15"), "sd15", "cifar10")


def test_a_step_costs_eleven_forwards():
    cost = load("cost")
    cifar10, sd15 = WORKLOADS["cifar10"], WORKLOADS["sd15"]
    lpips = cost.step_flops(cifar10, forward=0)
    assert cost.step_flops(cifar10, forward=10**9) - lpips == 11 * cifar10.batch_size * 10**9
    B, R = sd15.batch_size, sd15.batch_size_ref
    # G forward + backward 3, mu_fake forward 1 and forward + backward 3, guided mu_real 2; with
    # checkpointing one more forward of G and of mu_fake; all of them on B + R images.
    without_lpips = cost.step_flops(sd15, forward=10**12) - cost.step_flops(sd15, forward=0)
    assert without_lpips == 11 * (B + R) * 10**12


def test_edms_pairs_are_counted_at_float32s_rate(monkeypatch, capsys):
    cost = load("cost")
    monkeypatch.setattr(cost, "forward_flops", lambda dataset: 10**13)

    def days(**peaks) -> dict[str, list[float]]:
        """Of the pairs and of the training, by dataset."""
        cost.main(cost.Config(utilisation=1.0, **peaks))
        lines = capsys.readouterr().out.splitlines()[2:]
        return {
            line.split()[0]: [float(n) for n in re.findall(r"([\d.]+) days", line)]
            for line in lines
        }

    found = days(tflops=1000, tflops_float32=100)
    assert found["cifar10"][0] == pytest.approx(100_000 * 35 * 1e13 / 100e12 / 86400, abs=0.01)
    slower = days(tflops=1000, tflops_float32=10)
    for dataset, (pairs, training) in found.items():
        factor = 1 if dataset.startswith("sd15") else 10
        assert slower[dataset] == pytest.approx([factor * pairs, training], abs=0.06)


def test_the_two_lpips_differ_in_the_pooling_alone():
    """LPIPS by hand (Zhang et al. 2018, Eq. 1) is the package's with max pooling, for images in
    [-1, 1], and with average pooling what pooling.py makes of that."""
    from lpips import LPIPS

    torch.manual_seed(0)
    package = LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    x, y = 2 * torch.rand(2, 2, 3, 32, 32) - 1

    def by_hand(pooling: torch.nn.Module) -> torch.Tensor:
        mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)  # ImageNet's, of [0, 1]
        std = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
        f_x, f_y = (((image + 1) / 2 - mean) / std for image in (x, y))
        distance = torch.zeros(2)
        for number in range(1, 6):
            for layer in getattr(package.net, f"slice{number}"):
                layer = pooling if isinstance(layer, torch.nn.MaxPool2d) else layer
                f_x, f_y = layer(f_x), layer(f_y)
            unit_x, unit_y = (f / f.square().sum(1, keepdim=True).sqrt() for f in (f_x, f_y))
            weights = package.lins[number - 1].model[-1].weight.flatten()
            difference = (unit_x - unit_y).square().mean((2, 3))  # (B, C), over all pixels
            distance += difference @ weights
        return distance.reshape(2, 1, 1, 1)

    with torch.no_grad():
        ours, average = package(x, y), load("pooling").average_pooling(package)(x, y)
        torch.testing.assert_close(by_hand(torch.nn.MaxPool2d(2)), ours, rtol=1e-5, atol=0)
        torch.testing.assert_close(by_hand(torch.nn.AvgPool2d(2)), average, rtol=1e-5, atol=0)
    assert ((average / ours - 1).abs() > 0.01).all()


@pytest.fixture
def reproduce(monkeypatch, pairs):
    """benchmarks/reproduce.py with little to do: made-up test digits, no solver but the untrained
    student's, one step of two variants, 200 digits of each."""
    module = load("reproduce")
    digits, labels = torch.rand(300, 1, 28, 28) * 2 - 1, torch.arange(300) % 10
    monkeypatch.setattr(module, "load_mnist", lambda folder, train: (digits, labels))
    monkeypatch.setattr(module, "SAMPLES", 200)
    monkeypatch.setattr(module, "SOLVERS", dict(list(module.SOLVERS.items())[:1]))
    monkeypatch.setattr(module, "TABLE_2", {"full": [], "no KL": ["--lambda-dm", "0"]})
    monkeypatch.setattr(module, "DEPARTURES", {})
    monkeypatch.setattr(module, "SEEDS_OF_DEFAULT", 1)
    monkeypatch.setattr(module, "SEEDS", 1)
    monkeypatch.setattr(module, "publish", lambda config: None)
    original = module.run

    def run_little(script, *arguments, jobs=1):
        if script == "train.py":
            where = arguments.index("--pairs") + 1
            arguments = (*arguments[:where], pairs, *arguments[where + 1 :], "--steps", 1)
        if script == "make_pairs.py":
            return 1.0
        if script == "assets/train_classifier.py":  # the second judge is the first one
            shutil.copytree(ASSETS, arguments[arguments.index("--out") + 1])
            return 1.0
        return original(script, *arguments, jobs=jobs)

    monkeypatch.setattr(module, "run", run_little)
    return module


def test_reproduce_measures_once_and_mixes_nothing(reproduce, tmp_path, monkeypatch):
    config = reproduce.Config(out=str(tmp_path / "results"), runs=str(tmp_path / "runs"), jobs=2)
    reproduce.main(config)
    path = tmp_path / "results" / "mnist.json"
    results = json.loads(path.read_text())
    assert set(results) == {
        reproduce.REAL, *reproduce.SOLVERS, reproduce.DEFAULT, "full", "no KL",
    }  # fmt: skip
    (entry,) = results[reproduce.DEFAULT].values()
    assert set(entry["judges"]["convolutions"]) == {*reproduce.FIGURES, "samples"}
    assert len(entry["diversity_by_class"]) == 10 and set(entry["seconds"]) >= {"pairs", "train"}

    def nothing_to_run(script, *arguments, jobs=1):
        assert script == "make_pairs.py", f"{script} is run again"
        return 1.0

    monkeypatch.setattr(reproduce, "run", nothing_to_run)
    reproduce.main(config)
    assert json.loads(path.read_text()) == results
    changed = reproduce.dependencies() | {"losses": "0" * 16}
    monkeypatch.setattr(reproduce, "dependencies", lambda: changed)
    with pytest.raises(UserError, match="made with another losses than today's"):
        reproduce.main(config)
    assert json.loads(path.read_text()) == results


def test_what_reproduce_depends_on(tmp_path, monkeypatch):
    """Comments and docstrings do not count, numbers do."""
    reproduce = load("reproduce")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)

    def hash_of(text: str) -> str:
        (tmp_path / "code.py").write_text(text)
        return reproduce.code_hash("code.py")

    one = hash_of('"""Module."""\n\ndef f(x):\n    """What."""\n    return 2 * x  # twice\n')
    assert hash_of("def f(x):\n    return 2 * x\n") == one
    assert hash_of("def f(x):\n    return 3 * x\n") != one


def test_tables_show_mean_and_range_and_fill_the_markers():
    reproduce = load("reproduce")
    assert reproduce.cell([1.0, 3.0, 2.0], "{:.1f}") == "2.0 (1.0 .. 3.0)"
    assert reproduce.cell([0.98], "{:.1%}") == "98.0%"
    text = "a\n<!-- table: x -->\nold\n<!-- end -->\nb\n"
    filled = reproduce.fill(text, {"x": "| new |\n"})
    assert filled == "a\n<!-- table: x -->\n| new |\n<!-- end -->\nb\n"
    assert reproduce.fill(filled, {"x": "| new |\n"}) == filled


@pytest.mark.parametrize("by_size", [{}, {"mnist": {28: {"step": 9.0, "GiB": 1.0}}}])
def test_the_picture_of_speeds(tmp_path, by_size):
    by_batch = {"mnist": {n: {"step": 10.0 * n, "GiB": 0.1 * n} for n in (4, 8)}}
    load("speed").draw(tmp_path / "speed.png", by_batch, by_size, batch=8)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
