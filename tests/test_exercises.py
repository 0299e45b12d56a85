"""docs/exercises.md: a marking script fails as long as its exercise is not done, and the numbers
among the answers are right."""

import ast
import csv
import math
import os
import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import ROOT, in_forks
from test_readme import LINK, line_of

from dmd_loss import denoising_weight
from edm_unet import heun_sample, karras_sigmas
from sd_loader import sd_noise_table
from toy_2d import STD


def read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


TEXT = read("docs/exercises.md")
# Title -> marking script, and title, file and name of each function to empty.
SCRIPTS, TASKS = {}, []
for title, section in re.findall(r"(?ms)^## \d+\. (.*?) \(.*?\)$(.*?)(?=^## )", TEXT):
    for script in re.findall(r"(?m)^\*\*Marked by:\*\* `python -m pytest (.*)`$", section):
        SCRIPTS[title] = script
    for line in re.findall(r"(?m)^\*\*Empty:\*\* .*", section):
        TASKS += [(title, link["file"], link["name"]) for link in LINK.finditer(line)]


def emptied(file: str, name: str) -> str:
    """The file without the body of a function. The docstring stays: it says what to write."""
    source, line = read(file), line_of(name, file)
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    (function,) = [each for each in functions if each.lineno == line]
    assert ast.get_docstring(function)
    first, lines = function.body[1], source.splitlines(keepends=True)
    body = slice(first.lineno - 1, function.end_lineno)
    lines[body] = [" " * first.col_offset + "raise NotImplementedError\n"]
    return "".join(lines)


def as_fork(folder: Path, script: str) -> None:
    """In a fork: run a marking script in this folder until a test fails, without the slow ones."""
    os.dup2(os.open(folder / "output", os.O_CREAT | os.O_WRONLY), 1)
    os.chdir(folder)
    # Only libraries stay imported. What the fork has from here is imported from the folder again.
    ours = {path.stem for where in (ROOT, ROOT / "tests") for path in where.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests")]
    sys.dont_write_bytecode = True
    how = ["-x", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", "--tb=short"]
    sys.exit(pytest.main([*shlex.split(script), *how, f"--basetemp={folder / 'temporary'}"]))


def mark(title: str, file: str, source: str, folder: Path) -> str:
    """What the marking script of an exercise prints, in a copy where a file has this source."""
    top, *below = Path(file).parts
    for path in ROOT.iterdir():
        if path.name != top:
            (folder / path.name).symlink_to(path)
    if below:
        shutil.copytree(ROOT / top, folder / top)
    (folder / file).write_text(source, encoding="utf-8")
    codes, output = in_forks((as_fork, folder, SCRIPTS[title])), (folder / "output").read_text()
    assert codes == [1], output  # tests were found, and one failed
    return output


@pytest.mark.parametrize(("title", "file", "name"), TASKS)
def test_an_empty_function_is_noticed(title, file, name, tmp_path):
    output = mark(title, file, emptied(file, name), tmp_path)
    assert re.search(r"(?m)^E +NotImplementedError$", output), output


def test_a_loop_that_is_not_there_is_noticed(tmp_path):
    source = read("minimal.py")
    start, end = source.index("    with autocast:\n        # 2. "), source.index("\n# Rows: ")
    without = source[:start] + "    raise NotImplementedError\n" + source[end:]
    assert "NotImplementedError" in mark("The loop", "minimal.py", without, tmp_path)


def test_a_weighting_that_is_only_in_the_code_is_noticed(tmp_path):
    table, entry = "WEIGHTINGS = {\n", '    "unnormalised": lambda alpha_t, sigma_t, m: m,\n'
    source = read("dmd_loss.py").replace(table, table + entry)
    output = mark("Another weighting", "dmd_loss.py", source, tmp_path)
    assert "test_weightings_in_terms_of_the_predictions" in output


def test_every_exercise_is_there():
    assert len(re.findall(r"(?m)^## \d+\. ", TEXT)) == TEXT.count("\n**Read:**") == 11
    assert len(SCRIPTS) == 10 and len(TASKS) == TEXT.count("**Empty:**") + 3 == 11
    page = read("docs/index.html")
    sections = re.findall(r"\(index\.html#(.*?)\)", TEXT)
    assert len(sections) >= 9 and all(f'id="{section}"' in page for section in sections)


def test_the_numbers_among_the_answers():
    levels, (alpha, sigma) = karras_sigmas(1000), sd_noise_table()
    weight = denoising_weight(1.0, levels, 0.5)
    far = (-1 / (2 * (STD**2 + levels**2))).sigmoid()  # the modes are 1 apart

    def heun(steps):
        def net(x, sigma, labels):
            return 0.3 + 0.25 / (0.25 + sigma**2) * (x - 0.3)

        return heun_sample(net, torch.ones(1, 1, 1, 1), steps=steps).item()

    def euler(steps):
        sigmas = [*karras_sigmas(steps).flip(0).tolist(), 0.0]
        return 0.3 + 79.7 * math.prod(1 + (b - a) * a / (0.25 + a**2) for a, b in pairwise(sigmas))

    exact = 0.3 + 79.7 * math.sqrt(0.25 / (0.25 + 80**2))
    h, e = ([abs(f(n) - exact) for n in ns] for f, ns in ((heun, (18, 36)), (euler, (35, 70))))
    with open(ROOT / "assets" / "mnist_teacher.csv") as file:
        log = torch.tensor([float(row["loss"]) for row in csv.DictReader(file)])
    for answer in (
        f"{weight.max():,.0f} and {weight.min():.4f}; at {(weight > 65_504).sum()} levels",
        f" {1 / alpha[979]:.1f}, which is 1 / alpha_t",
        f" {0.5 * 16 * 28 * 28:,.0f}. No",
        f" {sigma[999] / alpha[999]:.1f}, which",
        f"exact solution is {exact:.5f}.",
        f"Heun {h[0]:.3f}, Euler {e[0]:.3f}. ",
        f"Heun {h[1]:.4f} (about a quarter) and Euler {e[1]:.3f} (half)",
        f"{far[260]:.5f} and {far[400]:.2f}. ",
        f"log 2 = {math.log(2):.2f}, ",
        f"a factor of {levels[979] / levels[20]:,.0f}, ",
        f"is {log[900:1000].mean():.3f} over steps 901 to 1,000",
        f"and {log[-500:].mean():.3f} over the last 500.",
    ):
        assert answer in " ".join(TEXT.split()), answer
