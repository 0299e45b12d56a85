"""What is measured about MNIST, and how it is shown: the tables and the figure of mnist.json.

benchmarks/reproduce.py measures. mnist.json holds: name -> seed -> figures, where they come from
and what they depend on.
"""

import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from plumbing.drawing import write_figure
from plumbing.rundir import SCALARS
from workloads import WORKLOADS

ROW = WORKLOADS["mnist"]
STEPS, RATE = ROW.steps, ROW.learning_rate

# What is measured: minimal.py, the default recipe, and variants of it. A variant is a name ->
# options of train.py. Those of the first two tables are shorter than the default.
MINIMAL, DEFAULT, SHORT = "student, minimal.py", "student, default recipe", 300
TABLE_2 = {
    "full": {},
    "without distribution matching": {"lambda_dm": 0},
    "without regression": {"lambda_reg": 0},
    # As in the paper, where 1e-5 is a fifth of CIFAR-10's rate.
    "without regression, a fifth of the learning rate": {
        "lambda_reg": 0, "learning_rate": RATE / 5,
    },
    "w_t = sigma_t / alpha_t": {"weighting": "dreamfusion"},
    "w_t = sigma_t^3 / alpha_t": {"weighting": "prolificdreamer"},
}  # fmt: skip
DEPARTURES = {
    "T_max = 0.98 T": {"max_dm_step": 980},
    "mu_fake learns at G's rate": {"fake_lr_ratio": 1},
    "beta_1 = 0.9": {"beta1": 0.9},
    "no moving average of G": {"ema": 0},
    "lambda_reg = 0.25": {"lambda_reg": 0.25},
    "as many paired samples as unpaired": {"batch_size_ref": 16},
}
# As long as the default, by samples or by time. The learning rate goes with the root of the batch.
QUARTER = f"lambda_reg = 0.25, {STEPS} steps"
LONG = {
    QUARTER: {"lambda_reg": 0.25},
    "8 + 2 samples, twice the steps, 0.7 of the learning rate": {
        "batch_size": 8, "batch_size_ref": 2, "steps": 2 * STEPS, "learning_rate": 0.7 * RATE,
    },
    "32 + 8 samples, half the steps, 1.4 times the learning rate": {
        "batch_size": 32, "batch_size_ref": 8, "steps": STEPS // 2, "learning_rate": 1.4 * RATE,
    },
    "16 + 16 samples, 0.85 of the steps (the same time)": {
        "batch_size_ref": 16, "steps": STEPS * 17 // 20,
    },
}  # fmt: skip
# Longer than the default, and measured at every point.
POINTS = tuple(STEPS // 10 * n for n in (1, 2, 3, 5, 7, 10, 15, 20, 30))  # steps
LONGER = {
    "default recipe": {},
    "no regression": {"lambda_reg": 0},
    "no distribution matching": {"lambda_dm": 0},
}
SHORT_VARIANTS = {name: v | {"steps": SHORT} for name, v in (TABLE_2 | DEPARTURES).items()}
LONGER_VARIANTS = {name: v | {"steps": POINTS[-1]} for name, v in LONGER.items()}
VARIANTS = {DEFAULT: {}, MINIMAL: {}} | SHORT_VARIANTS | LONG | LONGER_VARIANTS
FIVE_SEEDS, SEEDS = (DEFAULT, QUARTER), 3  # SEEDS: of everything else
# The teacher: name -> options of evaluate.py, evaluations of the network.
SOLVERS = {
    "untrained student (the teacher's single step)": ({"rows": ("untrained",)}, 1),
    "teacher, 5 Heun steps": ({"rows": ("teacher",), "steps": 5}, 9),
    "teacher, 10 Heun steps": ({"rows": ("teacher",), "steps": 10}, 19),
    "teacher, 18 Heun steps": ({"rows": ("teacher",), "steps": 18}, 35),
}
REAL = "training images"

JUDGES = ("convolutions", "lenet")  # architectures of assets/train_classifier.py
FIGURES = {  # a judge's figure -> its heading and its format
    "fd": ("FD", "{:.2f}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "diversity": ("diversity", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
}


def label(name: str, step: int) -> str:
    """The name in mnist.json of a variant's figures at a step."""
    return f"{name}, {step} steps" if name in LONGER else name


# --------------------------------------------------------------------------------------------------
# Tables


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


def heading(judge: str, figure: str) -> str:
    """A figure's heading. (2) marks the second judge."""
    return FIGURES[figure][0] + (" (2)" if judge == JUDGES[1] else "")


def figures_table(results: dict, names: list[str], columns: list[tuple[str, str]]) -> str:
    """A table with a row per run. Columns are (judge, figure)."""
    heads = [heading(*column) for column in columns]
    rows = []
    for name in filter(results.__contains__, names):
        found = [entry["judges"] for entry in results[name].values()]
        cells = [
            cell([judges[judge][f] for judges in found], FIGURES[f][1], f in ("fd", "accuracy"))
            for judge, f in columns
        ]
        more = f" (evaluations: {SOLVERS[name][1]})" if name in SOLVERS else ""
        rows.append([name + more, *cells])
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
        "batch and lambda_reg": [DEFAULT, *LONG],
    } | {f"steps, {name}": [label(name, step) for step in POINTS] for name in LONGER}
    made = {"in short": in_short(results)}
    made |= {group: figures_table(results, names, short) for group, names in groups.items()}
    in_between = {label(name, step) for name in LONGER for step in POINTS}
    everything = [name for name in results if name not in in_between]
    for number, judge in enumerate(JUDGES, start=1):
        columns = [(judge, f) for f in FIGURES]
        made[f"judge {number}"] = figures_table(results, everything, columns)
    by_class = [
        [name, *(f"{statistics.mean(values):.2f}" for values in zip(*by_seed, strict=True))]
        for name in everything
        for by_seed in [[entry["diversity_by_class"] for entry in results[name].values()]]
    ]
    made["diversity by class"] = table(["", *map(str, range(10))], by_class)
    made["time"] = time_table(results)
    runs = [
        [name, seed, *(f"{entry['judges'][first][f]:.4f}" for f in FIGURES), entry["commit"],
         entry["machine"]]
        for name in results for seed, entry in results[name].items()
    ]  # fmt: skip
    made["runs"] = table(["", "seed", *FIGURES, "commit", "machine"], runs)
    return made


def time_table(results: dict) -> str:
    """The seconds of the three commands and of minimal.py. One unit, F, is the same everywhere."""
    rows = []
    timed = {name: results[name]["0"] for name in (DEFAULT, MINIMAL) if name in results}
    for name, entry in timed.items():
        seconds = {"pairs": 0, "train": 0, "sample": 0} | entry["seconds"]
        seconds["together"] = together = sum(seconds.values())
        in_seconds = [f"{value:.0f} s" if value else "" for value in seconds.values()]
        F, in_F = f"{entry['F']:.0f} ms", f"{1000 * together / entry['F']:,.0f} F"
        rows.append([name.split(", ")[1], *in_seconds, F, in_F, entry["machine"]])
    heads = ["", "pairs", "train", "sample", "together", "F", "together, in F", "machine"]
    return table(heads, rows)


def in_short(results: dict) -> str:
    """The figures of minimal.py and of its teacher, as a sentence."""

    def said(name: str) -> str:
        found = [entry["judges"][JUDGES[0]] for entry in results[name].values()]
        fd, accuracy, diversity = (
            cell([each[figure] for each in found], form, figure == "fd")
            for figure, form in (("fd", "{:.2f}"), ("accuracy", "{:.1%}"), ("diversity", "{:.2f}"))
        )
        fd = fd.replace(")", f" over {len(found)} seeds)")
        return f"FD {fd}, accuracy {accuracy}, diversity {diversity}"

    if MINIMAL not in results:
        return ""
    entry, teacher = results[MINIMAL]["0"], list(SOLVERS)[-1]
    cores = " ".join(entry["machine"].split()[:2])
    return (
        f"`G`, 1 evaluation per digit: {said(MINIMAL)}.\n"
        f"The teacher, {SOLVERS[teacher][1]} evaluations: {said(teacher)}.\n"
        f"The run took {entry['seconds']['together']:.0f} s on {cores}. One call of the teacher on "
        f"32 digits takes {entry['F']:.0f} ms there.\n"
    )


def about_minimal(text: str, results: dict) -> str:
    """minimal.py with its docstring's minutes and figures as measured."""
    by_seed = results.get(MINIMAL)
    if not by_seed:
        return text
    found = [entry["judges"][JUDGES[0]] for entry in by_seed.values()]

    def span(figure: str, form: str) -> str:
        ends = [form.format(end([each[figure] for each in found])) for end in (min, max)]
        return " to ".join(dict.fromkeys(ends))

    fd, diversity = span("fd", "{:.2f}"), span("diversity", "{:.2f}")
    accuracy = span("accuracy", "{:.1%}").replace("%", " %").replace(" % to", " to")
    said = f"Three seeds give FD {fd}, accuracy {accuracy}, diversity {diversity}."
    text = re.sub("Three seeds give .*", said, text)
    minutes = by_seed["0"]["seconds"]["together"] / 60
    return re.sub(r"in \d+ minutes", f"in {minutes:.0f} minutes", text)


def page(results: dict) -> str:
    """The text of mnist.md."""
    made = tables(results)
    text = "".join(f"\n## {name.capitalize()}\n\n{lines}" for name, lines in made.items())
    return f"# MNIST, as measured by benchmarks/reproduce.py\n{text}"


def fill(text: str, made: dict[str, str]) -> str:
    """Put the tables between their markers in a text."""
    marked = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda found: found[1] + made[found[2]] + found[3], text)


def draw_steps(path: Path, results: dict) -> None:
    """Plot figures (above) and logged scalars (below) of LONGER against the step: the mean over the
    seeds, and their range."""
    from matplotlib.figure import Figure  # late, see options.py

    figure = Figure(figsize=(15, 6), layout="constrained")
    above, below = figure.subplots(2, 5, sharex=True)
    shown = [(judge, "fd") for judge in JUDGES]
    shown += [(JUDGES[0], name) for name in ("accuracy", "diversity", "recall")]
    panels = {heading(*key): (lambda e, j=key[0], f=key[1]: e["judges"][j][f]) for key in shown}
    panels |= {name: (lambda e, name=name: e["scalars"][name]) for name in SCALARS}
    for axis, (title, value) in zip([*above, *below], panels.items(), strict=True):
        for name in LONGER:
            steps = [step for step in POINTS if label(name, step) in results]
            found = [[value(e) for e in results[label(name, step)].values()] for step in steps]
            (line,) = axis.plot(steps, [statistics.mean(each) for each in found], label=name)
            low, high = [min(each) for each in found], [max(each) for each in found]
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.axvline(STEPS, color="grey", linestyle=":")
        axis.set(title=title, yscale="log" if title.startswith("FD") else "linear")
        if title.startswith("FD"):
            axis.minorticks_off()
            axis.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
        axis.grid(alpha=0.3)
    above[0].legend(fontsize="small")
    for axis in below:
        axis.set(xlabel="step")
    write_figure(path, figure)
