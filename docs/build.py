"""Build docs/index.html, the annotated source, from docs/page.html and the source files.

    python docs/build.py

docs/page.html holds the text. It is a Jinja template with equations in LaTeX, between dollar signs.
It calls functions of this file: code(file, name) cuts a function, a class or a constant out of a
file, without docstrings, because the text beside it says the same; excerpt(file, title, first,
last) cuts out the lines from the one that contains `first` to the one that contains `last`;
see(file, name) links to a definition; line(file, text) links to the line that contains the text;
table(name) is a table of docs/questions.md. A name or text that is missing, or occurs more than
once, is an error. The page needs no network, and no file but the pictures. It prints:

    wrote docs/index.html
"""

import ast
import html
import json
import re
import sys
from functools import cache
from itertools import product
from pathlib import Path

import latex2mathml
import pygments
from jinja2 import Environment, StrictUndefined
from latex2mathml.converter import convert
from PIL import Image
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.tables import SHORT, tables

ROOT = Path(__file__).parent.parent

# LaTeX; names in the code; shape or range; meaning. The page shows these wherever the reader points
# at a symbol, in an equation or in code.
SYMBOLS = [
    (r"x_\text{ref}", "x_ref", "(R, C, H, W)", "G(z_ref), which is compared with y_ref"),
    (r"y_\text{ref}", "y_ref", "(R, C, H, W)", "the teacher's ODE solution for z_ref"),
    (r"z_\text{ref}", "z_ref", "(R, C, H, W)", "noise of the pairs"),
    (r"\mu_\text{base}", "", "(x_t, t, cond) -> (B, C, H, W)", "the teacher's denoiser, mu_real"),
    (r"\mu_\text{real}", "mu_real p_real", "(x_t, t, cond) -> (B, C, H, W)",
     "the frozen teacher's denoiser; where scores are computed, its estimate of the clean x_0"),
    (r"\mu_\text{fake}", "mu_fake p_fake", "(x_t, t, cond) -> (B, C, H, W)",
     "denoiser that is trained on G's samples; where scores are computed, its estimate"),
    (r"s_\text{real}", "s_real", "(B, C, H, W)",
     "score of diffused real data: the direction in which their density grows"),
    (r"s_\text{fake}", "s_fake", "(B, C, H, W)", "score of diffused generated data"),
    (r"p_\text{real}", "", "density", "of the data, as the teacher knows it"),
    (r"p_\text{fake}", "", "density", "of G's samples"),
    (r"\mathcal{L}_\text{KL}", "loss_kl", "number", "Algorithm 2's loss"),
    (r"\mathcal{L}_\text{reg}", "loss_reg", "number", "regression loss"),
    (r"\mathcal{L}_\text{denoise}", "loss_denoise", "number", "Algorithm 3's loss"),
    (r"\lambda_\text{reg}", "lambda_reg", "number", "weight of the regression loss"),
    (r"T_\text{min}", "T_MIN", "0.02 T", "lowest noise level of the KL gradient"),
    (r"T_\text{max}", "T_MAX max_dm_step t_max", "0.98 T", "end of the KL gradient's noise levels"),
    (r"\alpha_t", "alpha_t", "(B, 1, 1, 1) of a table (T,)", "scale of x in x_t; EDM: 1"),
    (r"\sigma_t", "sigma_t", "(B, 1, 1, 1) of a table (T,)", "size of the noise in x_t"),
    (r"w_t", "w_t", "(B, 1, 1, 1)", "weight of the KL gradient"),
    (r"x_t", "x_t", "(B, C, H, W)", "x, diffused to noise level t"),
    (r"x_0", "x_0", "(B, C, H, W)", "a clean sample"),
    (r"G_\theta", "G", "z -> x", "the one-step generator"),
    (r"D_\text{KL}", "", "number", "Kullback-Leibler divergence"),
    (r"\mathcal{D}", "pairs", "(z_ref, y_ref), ...", "the pairs, made before training"),
    (r"\epsilon", "eps", "(B, C, H, W)", "noise, or a network's prediction of it"),
    (r"\ell", "distance", "two images -> number", "LPIPS, or the squared difference"),
    (r"\theta", "", "", "the weights of G"),
    (r"\phi", "", "", "the weights of mu_fake"),
    (r"T", "T", "1000", "number of noise levels"),
    (r"t", "t", "(B,) long, 0 .. T-1", "noise level; a larger one is noisier"),
    (r"z", "z", "(B, C, H, W)", "noise, N(0, I)"),
    (r"x", "x", "(B, C, H, W)", "G(z), about [-1, 1]; for Stable Diffusion, a latent"),
    (r"y", "y", "(B, C, H, W)", "the teacher's ODE solution for z"),
    (r"c", "cond", "(B,) long, or (B, 77, 768)", "class label, or text states"),
    (r"C", "", "1, 3 or 4", "channels"),
    (r"S", "", "H W", "pixels (for Stable Diffusion, of the latent)"),
]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Equations


def mathml(latex: str, display: str = "inline", named: bool = True) -> str:
    """LaTeX -> MathML. `named`: symbols carry their number in SYMBOLS as data-s."""
    text = convert(latex, display=display).replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")
    if not named:
        return text
    for number, (symbol, *_) in enumerate(SYMBOLS):  # the longest first; \0 hides what is replaced
        text = text.replace(inside(symbol), f"\0{number}\0")

    def marked(match: re.Match) -> str:
        number = match[1]
        stop = ' tabindex="0"' if display == "block" and match.start() == first[number] else ""
        return f'<mrow data-s="{number}"{stop}>{inside(SYMBOLS[int(number)][0])}</mrow>'

    first = {}  # the tab key stops once at each symbol of an equation
    for match in re.finditer("\0(\\d+)\0", text):
        first.setdefault(match[1], match.start())
    return re.sub("\0(\\d+)\0", marked, text)


@cache
def inside(latex: str) -> str:
    """A symbol's MathML, as it occurs in an equation."""
    return re.fullmatch(r"<math.*?><mrow>(.*)</mrow></math>", convert(latex))[1]


def with_equations(text: str) -> str:
    """$...$ and $$...$$ -> MathML, inline and displayed."""

    def replace(match: re.Match) -> str:
        if match[1] == "$":
            return mathml(match[2])
        return f'<span class="scroll">{mathml(match[2], "block")}</span>'

    return re.sub(r"(\$\$?)([^$<]+)\1", replace, text)


# --------------------------------------------------------------------------------------------------
# Code


@cache
def source(file: str) -> tuple[list[str], list[str], ast.Module]:
    """A file's lines, the same lines highlighted, and its syntax tree."""
    text = (ROOT / file).read_text(encoding="utf-8")
    coloured = pygments.highlight(text, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True))
    return text.split("\n"), coloured.split("\n"), ast.parse(text)


def names_of(node: ast.AST) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", [])
    targets = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def find(file: str, name: str) -> ast.stmt:
    """The definition of a function, class, method (Class.method) or constant."""
    node = source(file)[2]
    for part in name.split("."):
        found = [child for child in ast.walk(node) if part in names_of(child)]
        if len(found) != 1:
            raise LookupError(f"{file} has {len(found)} of {name}")
        node = found[0]
    return node


def first_line(file: str, name: str) -> int:
    """The first line of a definition, including its decorators and the comment above it."""
    lines, node = source(file)[0], find(file, name)
    start = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
    while lines[start - 2].startswith("# "):
        start -= 1
    return start


SYMBOL_OF = {name: str(n) for n, (_, names, *_) in enumerate(SYMBOLS) for name in names.split()}
shown: dict[str, set[int]] = {}  # file -> the lines that the page shows


def code(file: str, *names: str, but: str = "") -> str:
    """These definitions, cut out of their file, without docstrings. `but`: names that have another
    meaning there than in SYMBOLS."""
    return "".join(code_block(file, name, but.split()) for name in names)


def code_block(file: str, name: str, but: list[str]) -> str:
    """One definition."""
    node, start = find(file, name), first_line(file, name)
    left_out = set()
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part):
            left_out |= set(range(part.body[0].lineno, part.body[0].end_lineno + 1))
            if not source(file)[0][part.body[0].end_lineno]:
                left_out.add(part.body[0].end_lineno + 1)  # the empty line after it
    numbers = [n for n in range(start, node.end_lineno + 1) if n not in left_out]
    return figure(file, name, numbers, but)


def excerpt(file: str, title: str, first: str, last: str, leads: dict[str, str]) -> str:
    """The lines from the only one that contains `first` to the only one that contains `last`.
    `leads`: the comment with this text is a link to this id."""
    numbers = range(line_number(file, first), line_number(file, last) + 1)
    text = figure(file, title, list(numbers), [])
    for comment, target in leads.items():
        pattern = f'(<span class="c1">)([^<]*{re.escape(comment)}[^<]*)'
        text, found = re.subn(pattern, rf'\1<a href="#{target}">\2</a>', text)
        if found != 1:
            raise LookupError(f"{file} has {found} comments with {comment!r}")
    return text


def figure(file: str, name: str, numbers: list[int], but: list[str]) -> str:
    """These lines, which the page must not show anywhere else."""

    def symbol(match: re.Match) -> str:
        if match[1] not in SYMBOL_OF or match[1] in but:
            return match[0]
        return f'<span class="n" data-s="{SYMBOL_OF[match[1]]}">{match[1]}</span>'

    lines = ""
    for number in numbers:
        if number in shown.setdefault(file, set()):
            raise LookupError(f"{file}: line {number} is on the page twice")
        shown[file].add(number)
        line = re.sub(r'<span class="n">(\w+)</span>', symbol, source(file)[1][number - 1])
        lines += f'<span class="l" id="{file}-{number}" data-n="{number}">{line}\n</span>'
    link = f'<a href="../{file}#L{numbers[0]}">{file}</a>, line {numbers[0]}: {name}'
    pre = f'<pre tabindex="0" role="region" aria-label="{name}, {file}">{lines}</pre>'
    return f'<figure class="code"><figcaption>{link}</figcaption>{pre}</figure>'


def see(file: str, name: str) -> str:
    """A link to a definition: on the page if it is shown there, else in the file."""
    return f'<a class="see" href="\1{file}:{first_line(file, name)}\1"><code>{name}</code></a>'


def line(file: str, text: str) -> str:
    """A link to the only line that contains this text."""
    number = line_number(file, text)
    return f'<a class="line" href="\1{file}:{number}\1">{file}:{number}</a>'


def line_number(file: str, text: str) -> int:
    """The number of the only line that contains this text."""
    found = [n for n, each in enumerate(source(file)[0], start=1) if text in each]
    if len(found) != 1:
        raise LookupError(f"{file} has {len(found)} lines with {text!r}")
    return found[0]


def with_targets(text: str) -> str:
    """Turn the marks of `see` and `line` into links: to the page if it shows that line, else to the
    file."""

    def replace(match: re.Match) -> str:
        file, number = match[1], int(match[2])
        here = number in shown.get(file, ())
        return f"#{file}-{number}" if here else f"../{file}#L{number}"

    return re.sub("\1(.*?):(\\d+)\1", replace, text)


# --------------------------------------------------------------------------------------------------
# Tables and the page


def measured(name: str) -> str:
    """A table of results/mnist.json."""
    results = json.loads((ROOT / "results" / "mnist.json").read_text(encoding="utf-8"))
    return as_html(
        tables(results)[name].replace("|  |", "| 10,000 digits |", 1), f"Measured: {name}"
    )


def table(name: str) -> str:
    """The table between <!-- name --> and <!-- end --> in docs/questions.md."""
    text = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    found = re.findall(f"<!-- {name} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    if len(found) != 1:
        raise LookupError(f"docs/questions.md has {len(found)} tables {name!r}")
    return as_html(found[0], f"Table: {name}", "scroll prose")


def as_html(markdown: str, label: str, style: str = "scroll") -> str:
    """A table in Markdown -> HTML. `label`: its name for screen readers."""
    rows = [re.split(r"\s*\|\s*", inline(row.strip()))[1:-1] for row in markdown.splitlines()]

    def cells(row: list[str]) -> str:
        return f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:])

    head = "".join(f'<th scope="col">{cell}</th>' for cell in rows[0])
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows[2:])
    region = f'<div class="{style}" tabindex="0" role="region" aria-label="{label}">'
    return f"{region}<table><tr>{head}</tr>{body}</table></div>"


def inline(markdown: str) -> str:
    """`code`, **bold** and [links](to) -> HTML."""
    text = html.escape(markdown, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text)


def about(file: str) -> str:
    """The second paragraph of a file's docstring."""
    return inline(ast.get_docstring(source(file)[2]).split("\n\n")[1])


def figure_3() -> dict:
    """What docs/figure3.py computed. `rows`: whether the fake score is used, lambda_reg, and for
    every T_max the share of the far mode, and all four numbers in words."""
    with Image.open(ROOT / "docs" / "figure3.png") as picture:
        grid = json.loads(picture.text["runs"])

    def told(numbers: list[float | None]) -> tuple[str, str]:
        near, far = numbers[:2]
        spreads = ["" if n is None else f" (spread {n:.2f})" for n in numbers[2:]]
        both = f"near mode {near:.0%}{spreads[0]}, far mode {far:.0%}{spreads[1]}"
        return f"{far:.0%}", f"{both}, elsewhere {max(0, 1 - near - far):.0%}"

    runs = iter(grid["runs"])
    settings = product(grid["use_fake_score"], grid["lambda_reg"])
    rows = [(fake, weight, [told(next(runs)) for _ in grid["t_max"]]) for fake, weight in settings]
    return {**grid, "rows": rows}


def symbols() -> str:
    """SYMBOLS as the rows of a table."""
    rows = ""
    for number, (latex, names, shape, meaning) in enumerate(SYMBOLS):
        names = ", ".join(f"<code>{name}</code>" for name in names.split())
        cells = (mathml(latex, named=False), names, shape.replace("->", "→"), meaning)
        row = "".join(f"<td>{cell}</td>" for cell in cells[1:])
        rows += f'<tr id="symbol-{number}"><th scope="row">{cells[0]}</th>{row}</tr>'
    return rows


def colours(style: str) -> str:
    """CSS of a Pygments style."""
    return HtmlFormatter(style=style).get_style_defs("pre")


def build() -> str:
    """The page."""
    shown.clear()
    environment = Environment(
        variable_start_string="[[", variable_end_string="]]", undefined=StrictUndefined
    )
    template = environment.from_string((ROOT / "docs/page.html").read_text(encoding="utf-8"))
    versions = f"latex2mathml {latex2mathml.__version__}, Pygments {pygments.__version__}"
    helpers = (code, excerpt, see, line, about, measured, table, symbols, colours, figure_3)
    functions = {each.__name__: each for each in helpers}
    text = template.render(versions=versions, steps=SHORT, **functions)
    return with_targets(with_equations(text)) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/index.html").write_text(build(), encoding="utf-8")
    print("wrote docs/index.html")
