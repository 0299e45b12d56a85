"""Table 2 in small: what each part of the method is worth, on MNIST.

    python benchmarks/ablation.py              5 variants x 3 seeds: about 45 minutes on 2 CPU cores

Every variant changes one option of train.py ("without regression" the learning rate too, as in the
paper). All have 300 steps, a third of the default recipe's (--steps 900: all of them). Runs
that are done are not repeated, an interrupted one goes on. Needs pairs (python make_pairs.py) and
leaves, in runs/ablation, a folder a run, table.md, and variants.png (one row of digits a variant,
seed 0, the same noises). The table is also printed; the last line is

    wrote runs/ablation/table.md and runs/ablation/variants.png
"""

import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from plumbing.files import read_json, save_grid, write_bytes
from plumbing.options import Options, UserError, option, run_script
from plumbing.pairs import Pairs, sample_noise
from teachers import load_generator

ROOT = Path(__file__).parent.parent
VARIANTS = {
    "full": [],
    "without distribution matching": ["--lambda-dm", "0"],
    # The paper sets 1e-5 here, for CIFAR-10 and ImageNet-64 alike: a fifth of CIFAR-10's 5e-5, and
    # so is ours of 4e-4; but five times ImageNet-64's 2e-6.
    "without regression": ["--lambda-reg", "0", "--learning-rate", "8e-5"],
    "w_t = sigma_t / alpha_t": ["--weighting", "dreamfusion"],
    "w_t = sigma_t^3 / alpha_t": ["--weighting", "prolificdreamer"],
}
FIGURES = {"fd": "FD", "accuracy": "accuracy", "diversity": "diversity"}


@dataclass
class Config(Options):
    """What to run; the variants are VARIANTS."""

    out: str = option("runs/ablation", "folder of all runs")
    pairs: str = option("pairs/mnist", "folder of the pairs")
    seeds: int = option(3, "runs per variant", least=1)
    steps: int = option(300, "generator updates of each run")
    samples: int = option(10_000, "digits to measure per run")


def run(script: str, *arguments: object) -> None:
    """Run one of the project's scripts."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    code = subprocess.run(command).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"{script} failed, see above; mend that and rerun")


def measure(variant: str, seed: int, config: Config) -> dict[str, float]:
    """Train one variant and measure it, unless that was done before -> FIGURES."""
    folder = run_folder(variant, seed, config)
    numbers = folder.with_suffix(".json")
    if not numbers.exists():
        common = ["--pairs", config.pairs, "--out", folder, "--seed", seed, "--steps", config.steps]
        run("train.py", *common, *VARIANTS[variant])
        run(
            "evaluate.py", "--checkpoint", folder, "--rows", "student",
            "--samples", config.samples, "--json", numbers,
        )  # fmt: skip
    found = read_json(numbers)["student"]
    run_of, pairs = read_json(folder / "config.json"), Pairs(Path(config.pairs), "mnist")
    trained = (run_of["steps"], run_of["made_pairs"])
    if found["samples"] != config.samples or trained != (config.steps, pairs.meta):
        raise UserError(f"{folder} was another trial; choose another --out or delete {config.out}")
    return found


def run_folder(variant: str, seed: int, config: Config) -> Path:
    """The folder of one run."""
    return Path(config.out) / f"{list(VARIANTS).index(variant)}-seed{seed}"


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean and range over the seeds, as Markdown."""
    lines = [f"| | {' | '.join(FIGURES.values())} |", "|---|" + "---|" * len(FIGURES)]
    for variant, runs in results.items():
        cells = []
        for name in FIGURES:
            values = [100 * r[name] if name == "accuracy" else r[name] for r in runs]
            digits = 1 if name == "accuracy" else 2
            low, mean, high = (
                f"{value:.{digits}f}"
                for value in (min(values), statistics.mean(values), max(values))
            )
            cells.append(f"{mean} ({low} .. {high})" + (" %" if name == "accuracy" else ""))
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@torch.no_grad()
def draw(path: Path, config: Config) -> None:
    """Twenty digits of every variant, from the same noises."""
    z, cond = sample_noise("pictures", 7, range(20), (1, 28, 28)), torch.arange(20) % 10
    rows = []
    for variant in VARIANTS:
        G, _ = load_generator(run_folder(variant, 0, config) / "generator.safetensors")
        rows.append(G(z, cond))
    save_grid(path, torch.cat(rows), columns=20, scale=2)


def main(config: Config) -> None:
    """Run what is missing, then write the table and the picture."""
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for seed in range(config.seeds):  # whoever stops early has every variant once
        for variant in VARIANTS:
            results[variant].append(measure(variant, seed, config))
    out = Path(config.out)
    write_bytes(out / "table.md", table(results).encode())
    draw(out / "variants.png", config)
    print(table(results))
    print(f"wrote {out / 'table.md'} and {out / 'variants.png'}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
