"""Run and measure everything that the README says about MNIST, and write it to results/.

    python benchmarks/reproduce.py                hours on 2 CPU cores
    python benchmarks/reproduce.py --jobs 2       two runs at a time, of one core each

It measures the real digits, the teacher with several numbers of steps, minimal.py and the default
recipe. Then it measures variants of the recipe: Table 2 on MNIST, the recipe with one departure
from the paper undone at a time, other batches, and up to three times as many steps. It writes to
results/

    mnist.json      every figure, with seed, seconds, commit, machine, and what it depends on
    mnist.md        the same as tables; some are copied into the README and docs/, between markers
    *.png, *.gif    digits of minimal.py and of every variant; digits, curves and film of the
                    default run; figures and logged scalars against the number of steps

and the generator of the default run to assets/. What mnist.json already holds is not measured
again, so an interrupted run resumes. Figures made with other losses, another loop, network, recipe,
teacher or judge than today's are an error, so that they are never mixed. The last line it prints:

    wrote results/mnist.json and results/mnist.md
"""

import ast
import csv
import hashlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate
from assets.mnist import load_mnist
from benchmarks.neighbours import neighbours
from benchmarks.tables import (
    DEFAULT,
    FIVE_SEEDS,
    JUDGES,
    LONGER,
    MINIMAL,
    POINTS,
    REAL,
    ROW,
    SEEDS,
    SHORT,
    SHORT_VARIANTS,
    SOLVERS,
    STEPS,
    TABLE_2,
    VARIANTS,
    draw_steps,
    label,
    page,
)
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
from plumbing.rundir import SCALARS
from teachers import load_generator, load_teacher

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
GENERATOR = ASSETS / "mnist_generator.safetensors"

# What is appended to minimal.py.
WRITE_GENERATOR = """
from pathlib import Path
from plumbing.files import write_tensors
from teachers import generator_file
from workloads import get_workload

tensors, about = generator_file(average, get_workload(), {"sha256": ""}, STEPS)
write_tensors(Path(f"generator_{STEPS:06d}.safetensors"), tensors, about)
"""
SAMPLES = 10_000  # of each


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


def parts(name: str) -> str:
    """The keys of `dependencies` on which a run's figures depend."""
    if name == MINIMAL:
        return "losses network minimal teacher judge"
    return "losses loop network recipe teacher judge" + " steps" * (name in SHORT_VARIANTS)


@cache
def dependencies() -> dict[str, str]:
    """The parts of the project on which figures depend -> their hashes."""
    recipe = {k: v for k, v in ROW.settings().items() if k != "teacher"}
    recipe |= {"num_pairs": ROW.num_pairs, "solver_steps": ROW.solver_steps}
    judge = file_hash(ASSETS / CLASSIFIER) + file_hash(ASSETS / STATISTICS)
    judges = ["plumbing/digits.py", "benchmarks/neighbours.py", "assets/mnist.py"]
    judges.append("assets/train_classifier.py")
    return {
        "losses": code_hash("dmd_loss.py"),
        "loop": code_hash("train.py", "plumbing/optim.py", "plumbing/pairs.py"),
        "network": code_hash("edm_unet.py"),
        "minimal": code_hash("minimal.py"),
        "recipe": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16],
        "teacher": file_hash(Path(ROW.teacher)),
        "judge": judge + code_hash(*judges),
        "steps": str(SHORT),
    }


@torch.no_grad()
def forward_ms() -> float:
    """F, the time of the teacher's forward on 32 digits in milliseconds. It is the machine's speed
    just now, because a shared machine has slow hours."""
    mu_real, times = load_teacher(ROW).to(CPU).mu_real, []
    x, t, cond = torch.randn(32, 1, 28, 28), torch.full((32,), 500), torch.arange(32) % 10
    for _ in range(30):
        clock = time.perf_counter()
        mu_real(x, t, cond)
        times.append(1000 * (time.perf_counter() - clock))
    return statistics.median(times)


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
    machine = f"{os.cpu_count()} cores {platform.machine()}"
    software = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    return {"commit": commit or "unknown", "machine": f"{machine}; {software}"}


# --------------------------------------------------------------------------------------------------
# Running


def run(script: str | Path, *arguments: object, jobs: int = 1, cwd: Path | None = None) -> float:
    """Run one of the project's scripts, or a copy of one, in a folder -> seconds."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    if jobs > 1:
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    clock = time.perf_counter()
    code = subprocess.run(command, env=variables, cwd=cwd).returncode
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
        self.path, self.config = Path(config.out) / "mnist.json", config
        self.runs = read_json(self.path) if self.path.exists() else {}
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

    @cached_property
    def judge(self) -> Judge:
        """Both classifiers. The second is trained when it is needed first."""
        return Judge(self.config)

    def add(self, name: str, figures: dict, parts: str, seed: int = 0, **more) -> None:
        """Write what Judge.measure found to mnist.json.

        Args:
            parts: the keys of `dependencies` on which the figures depend.
            more: other entries to write beside the figures.
        """
        found = figures | provenance() | more
        found["made_with"] = {part: dependencies()[part] for part in parts.split()}
        self.runs.setdefault(name, {})[str(seed)] = found
        write_json(self.path, self.runs)


def draw(**options) -> tuple[Tensor, Tensor]:
    """The digits that evaluate.py measures with these options, and their labels."""
    config = evaluate.Config(samples=SAMPLES, device="cpu", **options)
    config, (row,) = evaluate.load_rows(config, CPU)
    images = torch.cat(list(evaluate.draw_share(row, config, Ranks(0, 1, CPU))))
    return images.float() / 127.5 - 1, torch.arange(SAMPLES) % 10


def folder_of(name: str, seed: int, config: Config) -> Path:
    """The folder of a training run."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path(config.runs) / f"{slug}-{seed}"


def points(name: str) -> tuple[int, ...]:
    """The steps at which a run is measured. The last one is its end."""
    return POINTS if name in LONGER else (VARIANTS[name].get("steps", STEPS),)


def train_minimal(seed: int, config: Config, jobs: int) -> float:
    """Run a copy of minimal.py with its constant SEED changed, which also writes its generator ->
    seconds."""
    out = folder_of(MINIMAL, seed, config).resolve()
    source = (ROOT / "minimal.py").read_text(encoding="utf-8")
    for name, value in {"SEED": seed, "TEACHER": ROW.teacher}.items():
        source, found = re.subn(f"^{name} = .*$", f"{name} = {value!r}", source, flags=re.M)
        assert found == 1
    write_bytes(out / "minimal.py", (source + WRITE_GENERATOR).encode())
    return run(out / "minimal.py", jobs=jobs, cwd=out)


def train(name: str, seed: int, config: Config, jobs: int) -> float:
    """Train one variant -> its seconds. Its folder keeps the generator of every 100th step."""
    if name == MINIMAL:
        return train_minimal(seed, config, jobs)
    out = folder_of(name, seed, config)
    options = VARIANTS[name] | {"seed": seed, "keep": 100}
    flags = [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", v)]
    where = ("--pairs", Path(config.runs) / "pairs", "--out", out)
    seconds = run("train.py", *where, *flags, jobs=jobs)
    if not (out / "training.gif").exists():  # SIGTERM ends a run early, without an error
        raise KeyboardInterrupt
    return seconds


def figures_at(name: str, seed: int, step: int, config: Config, judge: Judge) -> dict:
    """The figures of a run at a step, and the means of what it logged in the 100 steps before."""
    out = folder_of(name, seed, config)
    digits = draw(checkpoint=str(out / f"generator_{step:06d}.safetensors"), rows=("student",))
    figures = judge.measure(*digits)
    if name != MINIMAL:
        with open(out / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))[max(0, step - 100) : step]
        means = {name: statistics.mean(float(row[name]) for row in rows) for name in SCALARS}
        figures["scalars"] = means
    return figures


def time_alone(config: Config, results: Results) -> None:
    """Run the README's three commands and minimal.py alone, for their time. Measure the results."""
    out, pairs = folder_of(DEFAULT, 0, config), Path(config.runs) / "pairs"
    commands = {
        DEFAULT: {
            "pairs": lambda: run("make_pairs.py", "--out", pairs),
            "train": lambda: train(DEFAULT, 0, config, jobs=1),
            "sample": lambda: run("sample.py", "--checkpoint", out, "--out", out / "digits.png"),
        },
        MINIMAL: {"together": lambda: train_minimal(0, config, jobs=1)},
    }
    for name, timed in commands.items():
        if results.has(name):
            continue
        for folder in (pairs, out) if name == DEFAULT else ():
            shutil.rmtree(folder, ignore_errors=True)  # else a command would only resume
        F, seconds = [forward_ms()], {}
        for command, call in timed.items():
            seconds[command] = call()
            F.append(forward_ms())
        figures = figures_at(name, 0, STEPS, config, results.judge)
        results.add(name, figures, parts(name), seconds=seconds, F=statistics.mean(F))


def train_all(config: Config, results: Results) -> None:
    """Train and measure what is missing."""
    time_alone(config, results)
    run("make_pairs.py", "--out", Path(config.runs) / "pairs")
    # Seed by seed, so that an early stop leaves every variant measured once.
    runs = [(n, s) for s in range(5) for n in VARIANTS if s < (5 if n in FIVE_SEEDS else SEEDS)]
    missing = {
        (name, seed): [step for step in points(name) if not results.has(label(name, step), seed)]
        for name, seed in runs
    }

    def work(name: str, seed: int, steps: list[int]) -> list[dict]:
        seconds = {"train": train(name, seed, config, config.jobs)}
        found = [figures_at(name, seed, step, config, results.judge) for step in steps]
        return [figures | {"seconds": seconds, "jobs": config.jobs} for figures in found]

    results.judge  # noqa: B018 (trained now, not in every thread)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.jobs))
    with ThreadPoolExecutor(config.jobs) as pool:
        futures = {
            pool.submit(work, *key, steps): (*key, steps) for key, steps in missing.items() if steps
        }
        try:
            for future in as_completed(futures):
                name, seed, steps = futures[future]
                for step, figures in zip(steps, future.result(), strict=True):
                    results.add(label(name, step), figures, parts(name), seed)
        finally:
            pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------
# Pictures


@torch.no_grad()
def publish(config: Config, results: dict) -> None:
    """Write tables and pictures and, if the runs with seed 0 are there, minimal.png, the default
    run's pictures and its generator in half precision, and 20 digits of every variant."""
    out, first = Path(config.out), folder_of(DEFAULT, 0, config)
    write_bytes(out / "mnist.md", page(results).encode())
    draw_steps(out / "steps.png", results)
    if (drawn := folder_of(MINIMAL, 0, config) / "minimal.png").exists():
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
    results, out = Results(config), Path(config.out)
    if not results.has(REAL):
        images, labels = load_mnist(config.data, train=True)
        figures = results.judge.measure(images[:SAMPLES], labels[:SAMPLES])
        results.add(REAL, figures, "judge")
    for name, (options, _) in SOLVERS.items():
        if not results.has(name):
            figures = results.judge.measure(*draw(dataset="mnist", **options))
            results.add(name, figures, "judge teacher network")
    train_all(config, results)
    publish(config, results.runs)
    print(f"wrote {out / 'mnist.json'} and {out / 'mnist.md'}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
