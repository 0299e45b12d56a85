"""The README's line links, line counts and tables are true. `python tests/test_readme.py` mends
them."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
LINK = re.compile(r"\[`(?P<name>[\w.]+)`\]\((?P<file>[\w/]+\.py)#L(?P<line>\d+)\)")
COUNT = re.compile(r"^\| \[(?P<file>[\w/]+\.py)\]\((?P=file)\) \| (?P<lines>\d+) \|", re.MULTILINE)


def line_of(name: str, file: str) -> int:
    """The line on which a module's function, class, method or constant is defined."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    *owner, name = name.split(".")
    start = line_of(owner[0], file) if owner else 0
    pattern = re.compile(
        rf"    def {name}\b" if owner else rf"(def|class) {name}\b|{name}(, \w+)* = "
    )
    found = [i for i, line in enumerate(lines, start=1) if pattern.match(line) and i > start]
    assert len(found) == 1 or (owner and found), name
    return found[0]


def length(file: str) -> int:
    """How many lines a file has."""
    return len((ROOT / file).read_text(encoding="utf-8").splitlines())


def mended(text: str) -> str:
    """The README with right numbers."""

    def link(match: re.Match) -> str:
        name, file, _ = match.groups()
        return f"[`{name}`]({file}#L{line_of(name, file)})"

    def count(match: re.Match) -> str:
        file = match["file"]
        return f"| [{file}]({file}) | {length(file)} |"

    from benchmarks.reproduce import fill, tables  # late: found by pytest, or by the last lines

    results = json.loads((ROOT / "results" / "mnist.json").read_text(encoding="utf-8"))
    return fill(COUNT.sub(count, LINK.sub(link, text)), tables(results))


def test_links_point_at_definitions_and_counts_are_right():
    text = README.read_text(encoding="utf-8")
    assert len(LINK.findall(text)) > 15 and len(COUNT.findall(text)) > 12
    assert mended(text) == text, "run: python tests/test_readme.py"


def test_the_page_of_results_is_what_the_file_gives():
    from benchmarks.reproduce import page

    results = json.loads((ROOT / "results" / "mnist.json").read_text(encoding="utf-8"))
    assert page(results) == (ROOT / "results" / "mnist.md").read_text(encoding="utf-8")


def test_every_script_is_in_the_reading_order():
    listed = {match["file"] for match in COUNT.finditer(README.read_text(encoding="utf-8"))}
    scripts = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")}
    scripts = {name for name in scripts if not name.startswith(("tests/", "."))}
    assert listed == scripts - {"plumbing/__init__.py"}


def test_links_to_files_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    README.write_text(mended(README.read_text(encoding="utf-8")), encoding="utf-8")
