"""The line links, line counts and tables in README.md, docs/ and results/ are correct,
and the figures in minimal.py. `python tests/test_readme.py` corrects them."""

import ast
import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.tables import about_minimal, fill, page, tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "mnist.md"
MINIMAL = ROOT / "minimal.py"
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[`(?P<name>[\w.]+)`\]\((?P<up>(\.\./)?)(?P<file>[\w/]+\.py)#L\d+\)")
COUNT = re.compile(r"(?m)^\| \[(?P<file>[\w/]+\.py)\]\((?P<up>(\.\./)?)(?P=file)\) \| \d+ \|")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def names_of(node: ast.stmt) -> list[str | None]:
    """The names that a statement defines."""
    targets = [e for t in getattr(node, "targets", []) for e in getattr(t, "elts", [t])]
    return [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]


@cache
def line_of(name: str, file: str) -> int:
    """The line that defines a module's function, class, constant, or Class.method."""
    node = ast.parse(read(ROOT / file))
    for part in name.split("."):
        (node,) = [child for child in node.body if part in names_of(child)]  # exactly one
    return node.lineno


def corrected(path: Path) -> str:
    """What the file should hold."""
    results = json.loads(read(ROOT / "results" / "mnist.json"))
    if path == RESULTS:
        return page(results)
    if path == MINIMAL:
        return about_minimal(read(path), results)

    def link(match: re.Match) -> str:
        name, file = match["name"], match["file"]
        return f"[`{name}`]({match['up']}{file}#L{line_of(name, file)})"

    def count(match: re.Match) -> str:
        file = match["file"]
        return f"| [{file}]({match['up']}{file}) | {len(read(ROOT / file).splitlines())} |"

    return fill(COUNT.sub(count, LINK.sub(link, read(path))), tables(results))


@pytest.mark.parametrize("path", [*TEXTS, RESULTS, MINIMAL], ids=lambda path: path.name)
def test_a_text_is_up_to_date(path):
    assert corrected(path) == read(path), "run: python tests/test_readme.py"


def test_the_readme_is_short():
    text = read(ROOT / "README.md")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1100


def test_every_script_is_in_a_table_of_files():
    texts = "".join(map(read, TEXTS))
    assert len(LINK.findall(texts)) > 30
    listed = [match["file"] for match in COUNT.finditer(texts)]
    scripts = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")}
    scripts = {name for name in scripts if not name.startswith(("tests/", "."))}
    assert sorted(listed) == sorted(scripts - {"plumbing/__init__.py"})


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_to_files_and_headings_exist(path):
    links = re.findall(r"\]\((?!https?:)(.+?)\)", read(path))
    assert len(links) >= 3
    for link in links:
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), link
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", read(file), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]
            assert anchor in slugs, link


if __name__ == "__main__":
    for each in (*TEXTS, RESULTS, MINIMAL):
        each.write_text(corrected(each), encoding="utf-8")
