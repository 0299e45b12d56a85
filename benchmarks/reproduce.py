"""Run and measure everything that the README says about MNIST, and write it to results/.

    python benchmarks/reproduce.py                hours on 2 CPU cores
    python benchmarks/reproduce.py --jobs 2       two runs at a time, of one core each

It measures the real digits, the teacher with several numbers of steps, minimal.py with three seeds
and the default recipe with five. Then it measures, with fewer steps (STEPS) and three seeds each,
Table 2 in small, and the recipe with one departure from the paper undone at a time. It writes to
results/

    mnist.json      every figure, with seed, seconds, commit, machine, and what it depends on
    mnist.md        the same as tables; some are copied into the README and docs/, between markers
    *.png, *.gif    digits of minimal.py and of every variant; digits, curves and film of the
                    default run

and the generator of the default run to assets/. What mnist.json already holds is not measured
again, so an interrupted run resumes. Figures made with other losses, another loop, network, recipe,
teacher or judge than today's are an error, so that they are never mixed. The last line it prints:

    wrote results/mnist.json and results/mnist.md
"""

import ast
import contextlib
import hashlib
import json
import os
import platform
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate
from assets.mnist import load_mnist
from benchmarks.neighbours import neighbours
from plumbing.devices import Ranks
from plumbing.digits import (
    ASSETS,
    CLASSIFIER,
    STATISTICS,
    class_diversity,
    classify,
    load_classifier,
    measure,
)
from plumbing.drawing import save_grid
from plumbing.files import (
    file_hash,
    read_json,
    read_tensors,
    write_bytes,
    write_json,
    write_tensors,
)
from plumbing.options import Options, UserError, option, run_script
from plumbing.pairs import sample_noise
from teachers import load_generator
from workloads import WORKLOADS

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
GENERATOR = ASSETS / "mnist_generator.safetensors"

# What is measured: minimal.py, the default recipe, and variants of it with fewer steps. A variant
# is a name -> options of train.py.
MINIMAL, DEFAULT, STEPS = "student, minimal.py", "student, default recipe", 300
TABLE_2 = {
    "full": [],
    "without distribution matching": ["--lambda-dm", "0"],
    "without regression": ["--lambda-reg", "0"],
    # As in the paper, where 1e-5 is a fifth of CIFAR-10's rate.
    "without regression, a fifth of the learning rate": [
        "--lambda-reg", "0", "--learning-rate", str(WORKLOADS["mnist"].learning_rate / 5),
    ],
    "w_t = sigma_t / alpha_t": ["--weighting", "dreamfusion"],
    "w_t = sigma_t^3 / alpha_t": ["--weighting", "prolificdreamer"],
}  # fmt: skip
DEPARTURES = {
    "T_max = 0.98 T": ["--max-dm-step", "980"],
    "mu_fake learns at G's rate": ["--fake-lr-ratio", "1"],
    "beta_1 = 0.9": ["--beta1", "0.9"],
    "no moving average of G": ["--ema", "0"],
    "lambda_reg = 0.25": ["--lambda-reg", "0.25"],
    "as many paired samples as unpaired": ["--batch-size-ref", "16"],
}
SEEDS_OF_DEFAULT, SEEDS = 5, 3  # for the default recipe, for everything else
# The teacher: name -> options of evaluate.py, evaluations of the network.
SOLVERS = {
    "untrained student (the teacher's single step)": ({"rows": ("untrained",)}, 1),
    "teacher, 5 Heun steps": ({"rows": ("teacher",), "steps": 5}, 9),
    "teacher, 10 Heun steps": ({"rows": ("teacher",), "steps": 10}, 19),
    "teacher, 18 Heun steps": ({"rows": ("teacher",), "steps": 18}, 35),
}
REAL = "training images"
SAMPLES = 10_000  # of each

JUDGES = ("convolutions", "lenet")  # architectures of assets/train_classifier.py
FIGURES = {  # a judge's figure -> its heading and its format
    "fd": ("FD", "{:.2f}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "diversity": ("diversity", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
}


@dataclass
class Config(Options):
    """Folders, and the number of jobs."""

    data: str = option("data", "folder of the MNIST files (downloaded by torchvision if missing)")
    out: str = option("results", "folder of the results")
    runs: str = option("runs/reproduce", "folder of the runs")
    jobs: int = option(1, "runs at a time, each with its share of the cores", least=1)
    uncommitted: bool = option(False, "measure even if the scripts differ from the last commit")


# --------------------------------------------------------------------------------------------------
# What figures depend on


def code_hash(*files: str) -> str:
    """A hash of what the code does. Comments, docstrings and layout do not count."""
    dumps = []
    for file in files:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                node.body = node.body[ast.get_docstring(node) is not None :]
        dumps.append(re.sub(r",? ?\w+=\[\]", "", ast.dump(tree)))  # newer Pythons omit these
    return hashlib.sha256("".join(dumps).encode()).hexdigest()[:16]


ALL_PARTS = "losses loop network recipe teacher judge"  # of a run; a variant also depends on STEPS


@cache
def dependencies() -> dict[str, str]:
    """The parts of the project on which figures depend -> their hashes."""
    workload = WORKLOADS["mnist"]
    recipe = {k: v for k, v in workload.settings().items() if k != "teacher"}
    recipe |= {"num_pairs": workload.num_pairs, "solver_steps": workload.solver_steps}
    judge = file_hash(ASSETS / CLASSIFIER) + file_hash(ASSETS / STATISTICS)
    judges = ["plumbing/digits.py", "benchmarks/neighbours.py", "assets/mnist.py"]
    judges.append("assets/train_classifier.py")
    return {
        "losses": code_hash("dmd_loss.py"),
        "loop": code_hash("train.py", "plumbing/optim.py", "plumbing/pairs.py"),
        "network": code_hash("edm_unet.py"),
        "minimal": code_hash("minimal.py"),
        "recipe": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16],
        "teacher": file_hash(Path(workload.teacher)),
        "judge": judge + code_hash(*judges),
        "steps": str(STEPS),
    }


@cache
def matmul_rate() -> float:
    """GFLOP/s of this machine before the runs start, because a shared machine has slow hours."""
    a, times = torch.randn(1024, 1024), []
    for _ in range(20):
        clock = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - clock)
    return 2 * 1024**3 / statistics.median(times) / 1e9


def git(*words: str) -> str:
    """What git says of this project, or nothing."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def changed() -> bool:
    """Whether a script differs from the last commit. (Results do, once the first is written.)"""
    return bool(git("status", "--porcelain", "--untracked-files=no", "--", "*.py"))


def provenance() -> dict[str, str]:
    """Where a figure comes from."""
    commit = git("describe", "--always", "--abbrev=12") + ("-dirty" if changed() else "")
    machine = f"{os.cpu_count()} cores {platform.machine()}, {matmul_rate():.0f} GFLOP/s"
    software = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    return {"commit": commit or "unknown", "machine": f"{machine}; {software}"}


# --------------------------------------------------------------------------------------------------
# Running


def run(script: str, *arguments: object, jobs: int = 1) -> float:
    """Run one of the project's scripts -> seconds."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    clock = time.perf_counter()
    code = subprocess.run(command, env=os.environ | threads).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"{script} failed, see above; fix that and rerun")
    return time.perf_counter() - clock


class Judge:
    """All figures of digits, by both classifiers."""

    def __init__(self, config: Config):
        self.folders = {JUDGES[0]: ASSETS, JUDGES[1]: Path(config.runs) / "judge"}
        if not (self.folders[JUDGES[1]] / STATISTICS).exists():
            where = ("--data", config.data, "--out", self.folders[JUDGES[1]])
            run("assets/train_classifier.py", *where, "--architecture", JUDGES[1], "--seed", 1)
        images, labels = load_mnist(config.data, train=False)
        self.diversity = class_diversity(images, labels)
        self.of_test_images = {name: self.features(name, images) for name in JUDGES}

    def features(self, name: str, images: Tensor) -> Tensor:
        """The features of images by one judge, (N, 128)."""
        return classify(load_classifier(CPU, self.folders[name]), images, CPU)[0]

    def measure(self, images: Tensor, labels: Tensor) -> dict:
        """Images (N, 1, 28, 28) in [-1, 1], made for labels (N,) long -> their figures."""
        judges = {}
        for name in JUDGES:
            judges[name] = measure(images, labels, CPU, self.folders[name])
            features = self.features(name, images)
            judges[name] |= neighbours(self.of_test_images[name], features)
        by_class = (class_diversity(images, labels) / self.diversity).tolist()
        return {"judges": judges, "diversity_by_class": by_class}


class Results:
    """mnist.json: name -> seed -> figures, and how they came about."""

    def __init__(self, config: Config):
        self.path, self.judge = Path(config.out) / "mnist.json", None
        self.config, self.runs = config, read_json(self.path) if self.path.exists() else {}
        for name, by_seed in self.runs.items():
            for seed, found in by_seed.items():
                old = [k for k, v in found["made_with"].items() if dependencies()[k] != v]
                if old:
                    raise UserError(
                        f"{self.path}: {name!r}, seed {seed}, was made with another "
                        f"{', '.join(old)} than today's, and is not mixed with it; give another "
                        "--out, or delete the file"
                    )

    def has(self, name: str, seed: int = 0) -> bool:
        """Whether this was measured before."""
        return str(seed) in self.runs.get(name, {})

    def add(
        self, name: str, images: Tensor, labels: Tensor, parts: str, seed: int = 0, **more
    ) -> None:
        """Measure images (N, 1, 28, 28) in [-1, 1], made for labels (N,) long; write mnist.json.

        Args:
            parts: the keys of `dependencies` on which the figures depend.
            more: other entries to write beside the figures.
        """
        self.judge = self.judge or Judge(self.config)
        found = self.judge.measure(images, labels) | provenance() | more
        found["made_with"] = {part: dependencies()[part] for part in parts.split()}
        self.runs.setdefault(name, {})[str(seed)] = found
        write_json(self.path, self.runs)


def draw(**options) -> tuple[Tensor, Tensor]:
    """The digits that evaluate.py measures with these options, and their labels."""
    config = evaluate.Config(samples=SAMPLES, device="cpu", **options)
    config, (row,) = evaluate.load_rows(config, CPU)
    return draw_row(row, config)


def draw_row(row: evaluate.Row, config: evaluate.Config) -> tuple[Tensor, Tensor]:
    """The digits of one row, and their labels."""
    images = torch.cat(list(evaluate.draw_share(row, config, Ranks(0, 1, CPU))))
    return images.float() / 127.5 - 1, torch.arange(SAMPLES) % 10


def run_minimal(seed: int, config: Config, results: Results) -> None:
    """Run minimal.py with its constant SEED changed, and measure its digits."""
    source, found = re.subn(
        "^SEED = .*$",
        f"SEED = {seed}",
        (ROOT / "minimal.py").read_text(encoding="utf-8"),
        flags=re.M,
    )
    assert found == 1
    copy = (Path(config.runs) / f"minimal_{seed}.py").resolve()
    write_bytes(copy, source.encode())
    clock = time.perf_counter()
    with contextlib.chdir(ROOT):
        G = runpy.run_path(str(copy))["average"].cpu()
        seconds = {"together": time.perf_counter() - clock}
        shutil.move("minimal.png", copy.with_suffix(".png"))
    row = evaluate.Row("student", G, 1, "minimal.py", "", G.mu.net)
    how = evaluate.Config(samples=SAMPLES, dataset="mnist", amp="off", batch_size=100)
    parts = "losses network minimal teacher judge"
    results.add(MINIMAL, *draw_row(row, how), parts, seed, seconds=seconds)


def folder_of(name: str, seed: int, config: Config) -> Path:
    """The folder of a training run."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path(config.runs) / f"{slug}-{seed}"


def train(name: str, seed: int, config: Config, jobs: int) -> dict[str, float]:
    """Train one variant -> its seconds."""
    out = folder_of(name, seed, config)
    where = ["--pairs", Path(config.runs) / "pairs", "--out", out]
    flags = [] if name == DEFAULT else ["--steps", STEPS, *(TABLE_2 | DEPARTURES)[name]]
    seconds = run("train.py", *where, "--seed", seed, *flags, jobs=jobs)
    if not (out / "training.gif").exists():  # SIGTERM ends a run early, without an error
        raise KeyboardInterrupt
    return {"train": seconds}


def train_all(config: Config, results: Results) -> None:
    """Train and measure what is missing. The default recipe's first run is alone, for its time."""
    first = folder_of(DEFAULT, 0, config)
    seconds = {"pairs": run("make_pairs.py", "--out", Path(config.runs) / "pairs")}
    if not results.has(DEFAULT):
        seconds |= train(DEFAULT, 0, config, jobs=1)
        seconds["sample"] = run("sample.py", "--checkpoint", first, "--out", first / "digits.png")
        digits = draw(checkpoint=str(first), rows=("student",))
        results.add(DEFAULT, *digits, ALL_PARTS, seconds=seconds)
    wanted = [(DEFAULT, seed) for seed in range(SEEDS_OF_DEFAULT)]
    # Seed by seed, so that an early stop leaves every variant measured once.
    wanted += [(name, seed) for seed in range(SEEDS) for name in TABLE_2 | DEPARTURES]
    wanted = [key for key in wanted if not results.has(*key)]
    with ThreadPoolExecutor(config.jobs) as pool:
        futures = {pool.submit(train, *key, config, config.jobs): key for key in wanted}
        try:
            for future in as_completed(futures):
                (name, seed), seconds = futures[future], future.result()
                folder = str(folder_of(name, seed, config))
                digits = draw(checkpoint=folder, rows=("student",))
                parts = ALL_PARTS if name == DEFAULT else f"{ALL_PARTS} steps"
                results.add(name, *digits, parts, seed, seconds=seconds, jobs=config.jobs)
        finally:
            pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------
# Tables and pictures


def cell(values: list[float], form: str, with_range: bool = True) -> str:
    """The mean, and the range over the seeds."""
    text = form.format(statistics.mean(values))
    if with_range and len(values) > 1:
        text += f" ({form.format(min(values))} .. {form.format(max(values))})"
    return text


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figures_table(results: dict, names: list[str], columns: list[tuple[str, str]]) -> str:
    """A table with a row per run. Columns are (judge, figure); (2) marks the second judge."""
    heads = [FIGURES[f][0] + (" (2)" if judge == JUDGES[1] else "") for judge, f in columns]
    rows = []
    for name in filter(results.__contains__, names):
        found = [entry["judges"] for entry in results[name].values()]
        cells = [
            cell([judges[judge][f] for judges in found], FIGURES[f][1], f in ("fd", "accuracy"))
            for judge, f in columns
        ]
        label = f"{name} (evaluations: {SOLVERS[name][1]})" if name in SOLVERS else name
        rows.append([label, *cells])
    return table(["", *heads], rows)


def tables(results: dict) -> dict[str, str]:
    """The name of a marker -> the table to put there."""
    first, second = JUDGES
    short = [(first, f) for f in ("fd", "accuracy", "diversity", "recall", "coverage")]
    short += [(second, "fd"), (second, "accuracy")]
    untrained, *teachers = SOLVERS
    groups = {
        "what comes out": [untrained, MINIMAL, DEFAULT, *teachers, REAL],
        "table 2": list(TABLE_2),
        "departures": ["full", *DEPARTURES],
    }
    made = {group: figures_table(results, names, short) for group, names in groups.items()}
    everything = list(results)
    for number, judge in enumerate(JUDGES, start=1):
        columns = [(judge, f) for f in FIGURES]
        made[f"judge {number}"] = figures_table(results, everything, columns)
    by_class = [
        [name, *(f"{statistics.mean(values):.2f}" for values in zip(*by_seed, strict=True))]
        for name in everything
        for by_seed in [[entry["diversity_by_class"] for entry in results[name].values()]]
    ]
    made["diversity by class"] = table(["", *map(str, range(10))], by_class)
    seconds = results[DEFAULT]["0"]["seconds"]
    seconds = seconds | {"together": sum(seconds.values())}
    row = [*(f"{value:.0f} s" for value in seconds.values()), results[DEFAULT]["0"]["machine"]]
    made["time"] = table([*seconds, "machine"], [row])
    runs = [
        [name, seed, *(f"{entry['judges'][first][f]:.4f}" for f in FIGURES), entry["commit"],
         entry["machine"]]
        for name in everything for seed, entry in results[name].items()
    ]  # fmt: skip
    made["runs"] = table(["", "seed", *FIGURES, "commit", "machine"], runs)
    return made


def page(results: dict) -> str:
    """The text of mnist.md."""
    made = tables(results)
    text = "".join(f"\n## {name.capitalize()}\n\n{lines}" for name, lines in made.items())
    return f"# MNIST, as measured by benchmarks/reproduce.py\n{text}"


def fill(text: str, made: dict[str, str]) -> str:
    """Put the tables between their markers in a text."""
    marked = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda found: found[1] + made[found[2]] + found[3], text)


@torch.no_grad()
def publish(config: Config) -> None:
    """Write what is shown of seed 0, if its runs are there: minimal.png, the default run's pictures
    and its generator in half precision, and 20 digits of every variant."""
    out, first = Path(config.out), folder_of(DEFAULT, 0, config)
    if (drawn := Path(config.runs) / "minimal_0.png").exists():
        shutil.copyfile(drawn, out / "minimal.png")
    if (first / "training.gif").exists():
        tensors, metadata = read_tensors(first / "generator.safetensors")
        write_tensors(GENERATOR, {name: value.half() for name, value in tensors.items()}, metadata)
        for name in ("training.gif", "curves.png"):
            shutil.copyfile(first / name, out / name)
        beside = ("--checkpoint", first, "--teacher", "--seeds", "0-39", "--columns", 20)
        run("sample.py", *beside, "--out", out / "digits.png")
    files = [folder_of(name, 0, config) / "generator.safetensors" for name in TABLE_2]
    if all(file.exists() for file in files):
        z, cond = sample_noise("pictures", 7, range(20), (1, 28, 28)), torch.arange(20) % 10
        rows = [load_generator(file)[0](z, cond) for file in files]
        save_grid(out / "variants.png", torch.cat(rows), columns=20, scale=2)


def main(config: Config) -> None:
    """Measure what is missing, then write tables and pictures."""
    if changed() and not config.uncommitted:
        raise UserError("the scripts differ from the last commit; commit first")
    matmul_rate()
    results, out = Results(config), Path(config.out)
    if not results.has(REAL):
        images, labels = load_mnist(config.data, train=True)
        results.add(REAL, images[:SAMPLES], labels[:SAMPLES], "judge")
    for name, (options, _) in SOLVERS.items():
        if not results.has(name):
            results.add(name, *draw(dataset="mnist", **options), "judge teacher network")
    for seed in range(SEEDS):
        if not results.has(MINIMAL, seed):
            run_minimal(seed, config, results)
    train_all(config, results)
    write_bytes(out / "mnist.md", page(results.runs).encode())
    publish(config)
    print(f"wrote {out / 'mnist.json'} and {out / 'mnist.md'}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
