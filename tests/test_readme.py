"""Line links, line counts and tables of the README and of docs/ are true.
`python tests/test_readme.py` mends them."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / name for name in ("README.md", "docs/details.md", "docs/large-runs.md")]
LINK = re.compile(r"\[`(?P<name>[\w.]+)`\]\((?P<up>(\.\./)?)(?P<file>[\w/]+\.py)#L\d+\)")
COUNT = re.compile(
    r"^\| \[(?P<file>[\w/]+\.py)\]\((?P<up>(\.\./)?)(?P=file)\) \| \d+ \|", re.MULTILINE
)


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
    """A text with right numbers."""

    def link(match: re.Match) -> str:
        name, file = match["name"], match["file"]
        return f"[`{name}`]({match['up']}{file}#L{line_of(name, file)})"

    def count(match: re.Match) -> str:
        file = match["file"]
        return f"| [{file}]({match['up']}{file}) | {length(file)} |"

    from benchmarks.reproduce import fill, tables  # late: found by pytest, or by the last lines

    results = json.loads((ROOT / "results" / "mnist.json").read_text(encoding="utf-8"))
    return fill(COUNT.sub(count, LINK.sub(link, text)), tables(results))


def all_texts() -> str:
    return "".join(text.read_text(encoding="utf-8") for text in TEXTS)


def test_links_point_at_definitions_and_counts_are_right():
    assert len(LINK.findall(all_texts())) > 30 and len(COUNT.findall(all_texts())) > 25
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        assert mended(text) == text, "run: python tests/test_readme.py"


def test_the_page_of_results_is_what_the_file_gives():
    from benchmarks.reproduce import page

    results = json.loads((ROOT / "results" / "mnist.json").read_text(encoding="utf-8"))
    assert page(results) == (ROOT / "results" / "mnist.md").read_text(encoding="utf-8")


def test_every_script_is_in_a_table_of_files():
    listed = [match["file"] for match in COUNT.finditer(all_texts())]
    scripts = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")}
    scripts = {name for name in scripts if not name.startswith(("tests/", "."))}
    assert sorted(listed) == sorted(scripts - {"plumbing/__init__.py"})


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_to_files_and_headings_exist(path):
    links = re.findall(r"\]\((?!https?:)(.+?)\)", path.read_text(encoding="utf-8"))
    assert len(links) >= 3
    for link in links:
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), link
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]
            assert anchor in slugs, link


def test_the_readme_is_short():
    assert len(TEXTS[0].read_text(encoding="utf-8").splitlines()) <= 200


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for each in TEXTS:
        each.write_text(mended(each.read_text(encoding="utf-8")), encoding="utf-8")
