"""The annotated source, docs/index.html: docs/build.py makes exactly this page, nothing is missing,
no link is dead, and a browser shows it correctly."""

import html
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

import toy_2d
from edm_unet import EDMDenoiser

PAGE = ROOT / "docs" / "index.html"
TEXT = PAGE.read_text(encoding="utf-8")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium to look at the page")


def load(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build():
    for package in ("jinja2", "pygments", "latex2mathml"):
        reason = f"docs/build.py needs {package}: pip install -r requirements-dev.txt"
        pytest.importorskip(package, reason=reason)
    return load("build")


def essence(text: str) -> tuple[list[str], list[str]]:
    """Words and links of a page: what does not depend on the versions of the libraries."""
    plain = re.sub(r"<style>.*?</style>|<meta.*?>|<.*?>", " ", text, flags=re.DOTALL)
    return plain.split(), re.findall(r'(?:href|src|id|data-s)="(.*?)"', text)


def test_the_page_is_what_the_source_gives(build):
    made, generator = build.build(), re.compile(r'<meta name="generator" content="(.*?)">')
    if generator.search(made)[1] == generator.search(TEXT)[1]:  # made by the same versions
        assert made == TEXT, "run: python docs/build.py"
    assert essence(made) == essence(TEXT), "run: python docs/build.py"
    assert len(TEXT.encode()) < 400_000


def test_no_equation_and_no_line_of_an_algorithm_is_missing():
    wanted = [f"eq-{n}" for n in range(1, 12)]
    wanted += [f"alg{a}-{n}" for a, lines in ((1, 10), (2, 6), (3, 2)) for n in range(1, lines + 1)]
    for name in wanted:
        assert TEXT.count(f'id="{name}"') == 1, name
        rest = TEXT[TEXT.index(f'id="{name}"') :]
        end = rest.index("</div>" if name.startswith("eq") else "</li>")
        assert ("<math" if name.startswith("eq") else 'class="line"') in rest[:end], name


def test_no_link_is_dead():
    names = re.findall(r'\bid="(.*?)"', TEXT)
    assert len(names) == len(set(names)) > 300
    links = re.findall(r'(?:href|src|srcset)="(.*?)"', TEXT)
    assert len(links) > 60
    for link in links:
        target, _, anchor = link.partition("#")
        if link.startswith("#"):
            assert anchor in names, link
        elif not link.startswith(("https://", "data:")):
            file = PAGE.parent / target
            assert file.exists(), link
            text = file.read_text(encoding="utf-8") if anchor else ""
            if file.suffix == ".md" and anchor:
                headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
                assert anchor in [slug(each) for each in headings], link
            elif anchor:
                assert 1 <= int(anchor.removeprefix("L")) <= len(text.splitlines()), link


def slug(heading: str) -> str:
    """The anchor of a heading in Markdown."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_shown_code_is_the_file():
    found = re.findall(r'id="([\w/]+\.py)-(\d+)" data-n="\2">(.*?)\n</span>', TEXT)
    assert len(found) == TEXT.count('class="l"') > 300
    for file, number, coloured in found:
        text = html.unescape(re.sub("<.*?>", "", coloured))
        line = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert text == line, (file, number)


@pytest.mark.parametrize("call", ['code("train.py", "no_such")', 'line("train.py", "no such line")',
                                  'line("train.py", "config")', 'see("train.py", "Run.no_such")',
                                  'code("train.py", "main", "main")', 'table("no such table")',
                                  'excerpt("minimal.py", "", "no such", "adam_G.step", {})',
                                  'excerpt("minimal.py", "", "mu_real =", "G =", {"no such": ""})',
                                  ])  # fmt: skip
def test_a_name_or_text_must_occur_once(call, build):
    build.shown.clear()
    with pytest.raises(LookupError):
        eval(call, vars(build))


def test_the_page_begins_with_the_loop_of_minimal():
    """Each of its comments leads to a section. (test_no_link_is_dead follows the links.)"""
    begin = TEXT.index('<h2 id="screen">')
    assert begin == TEXT.index("<h2"), "not the first section"
    comments = re.findall(
        r'<a href="#(\w+)">(# .*?)</a>', TEXT[begin : TEXT.index('<h2 id="idea"')]
    )
    text = (ROOT / "minimal.py").read_text(encoding="utf-8")
    numbered = re.findall(r"# \d\. .*", text)
    assert len(numbered) == 5 and len(comments) == 7
    assert {html.unescape(comment) for _, comment in comments} >= set(numbered)


def test_tables_are_those_of_the_questions():
    """Cell by cell, apart from how a cell is written in Markdown and in HTML."""
    text = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    for name, columns in (("healthy", 4), ("pedigree", 6)):
        rows = text.split(f"<!-- {name} -->\n")[1].split("\n<!-- end -->")[0].splitlines()
        made = TEXT[TEXT.index(f'aria-label="Table: {name}"') :].split("</table>")[0]
        made_rows = made.split("<tr>")[1:]
        assert len(made_rows) == len(rows) - 1 > 4
        for row, made_row in zip(rows[:1] + rows[2:], made_rows, strict=True):
            assert len(re.findall("<t[dh]", made_row)) == columns
            shown = html.unescape(re.sub(r"<math.*?</math>|<.*?>", " ", made_row))
            plain = re.sub(r"\$.*?\$|\]\(.*?\)|[`*|\[]", " ", row)
            assert shown.replace("*", " ").split() == plain.split()


# --------------------------------------------------------------------------------------------------
# Figure 3 to play with


@pytest.fixture(scope="module")
def figure_3() -> tuple[Image.Image, dict, dict]:
    """The picture, its text, and {(use_fake_score, lambda_reg, T_max): (its numbers, its tile)}."""
    picture = Image.open(ROOT / "docs" / "figure3.png")
    about, runs = json.loads(picture.text["runs"]), {}
    numbers, (width, height) = iter(about["runs"]), about["tile"]
    whole = picture.convert("RGB")
    for row, (fake, weight) in enumerate(product(about["use_fake_score"], about["lambda_reg"])):
        for column, t_max in enumerate(about["t_max"]):
            corner = column * width, row * height
            tile = whole.crop((*corner, corner[0] + width, corner[1] + height))
            runs[fake, weight, t_max] = next(numbers), tile
    assert next(numbers, None) is None
    return picture, about, runs


def test_the_file_of_figure_3(figure_3):
    picture, about, runs = figure_3
    script = load("figure3")
    assert (ROOT / "docs" / "figure3.png").stat().st_size < 1_000_000
    assert about["t_max"] == list(script.T_MAX) and about["lambda_reg"] == list(script.LAMBDA_REG)
    assert about["tile"] == list(script.TILE) and about["steps"] == 3000
    assert len(runs) == 2 * len(script.T_MAX) * len(script.LAMBDA_REG)
    assert picture.size == (450 * len(script.T_MAX), 400 * len(script.LAMBDA_REG))
    y, x = np.mgrid[-0.4 + 1 / 500 : 0.4 : 1 / 250, -0.9 + 1 / 500 : 0.9 : 1 / 250]  # of the pixels
    for setting, ((near, far, *_), tile) in runs.items():
        red, _, blue = np.asarray(tile).astype(int).transpose(2, 0, 1)
        assert ((red == 255) & (blue == 255)).mean() > 0.5, "no paper"
        for share, mode in ((near, -0.5), (far, 0.5)):
            inside = np.hypot(x - mode, y) < 3 * toy_2d.STD
            dots = (inside & (red > 180) & (blue < 90)).sum()
            assert (dots > 4) == (share > 0.01), (setting, share, dots)


@pytest.mark.slow
def test_figure_3_is_of_todays_toy(figure_3):
    """One of its runs, trained again."""
    script, mu_real = load("figure3"), EDMDenoiser(toy_2d.MixtureDenoiser())
    pairs = toy_2d.make_pairs(mu_real, 0)
    samples = script.train("(c) scores and regression", script.Config(), 260, mu_real, pairs)
    (near, far, *_), _ = figure_3[2][True, 1.0, 260]
    assert script.statistics(samples)[0].tolist() == pytest.approx([near, far], abs=0.05)


@pytest.mark.slow
def test_its_command_resumes(tmp_path):
    """A finished run is not trained again: here, one whose samples all lie at the far mode."""
    folder, out = tmp_path / "runs", tmp_path / "figure3.png"
    folder.mkdir()
    torch.save(
        toy_2d.MODES[1].expand(50, 2)[:, :, None, None], folder / "both scores 0.0 100 1 7.pt"
    )
    done = run("docs/figure3.py", "--steps", 1, "--seed", 7, "--runs", folder, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"wrote {out}" and not list(folder.iterdir())
    runs = json.loads(Image.open(out).text["runs"])["runs"]
    assert runs[0] == [0, 1, None, 0] and runs[1][0] > 0.9


def test_what_the_page_says_about_figure_3(figure_3):
    """The answers to its three questions."""
    runs = {setting: numbers for setting, (numbers, _) in figure_3[2].items()}
    for (fake, weight, t_max), (near, far, *_) in runs.items():
        both = min(near, far) > 0.4
        if fake and weight == 0:
            assert both if t_max >= 330 else far == 0
        if fake and t_max == 260:
            assert both if weight >= 0.5 else far == 0
        if not fake and t_max >= 600:
            assert near == far == 0  # in the middle
    assert 0.9 < runs[True, 0.3, 260][0] < 0.96  # some leave the near mode
    near, _, spread, _ = runs[False, 0, 260]
    assert near == 1 and spread < 0.05  # a peak
    near, far, *spreads = runs[False, 1, 260]
    assert min(near, far) > 0.4 and 0.05 < min(spreads) < max(spreads) < 0.15


def browse(address: str, *options: str) -> tuple[str, str]:
    """Load a page without a window -> the document after its scripts ran, and Chromium's log."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               "--virtual-time-budget=10000", *options, "--dump-dom", address]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


LOOK = """<!DOCTYPE html><title>look</title><script>
const found = {};
async function look(width) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.src = "/docs/index.html";
  await new Promise((done) => { frame.onload = done; document.documentElement.append(frame); });
  const page = frame.contentDocument, view = frame.contentWindow;
  const tip = page.getElementById("tip"), pick = (where) => page.querySelector(where);
  const say = (symbol, kind) => {
    tip.hidden = true;
    symbol.dispatchEvent(new view.Event(kind, { bubbles: true }));
    return tip.hidden ? "" : tip.textContent;
  };
  const code = [...page.querySelectorAll("pre [data-s]")].find((s) => s.textContent === "s_fake");
  const symbol = pick("#eq-8 [tabindex]");
  symbol.focus();  // this scrolls
  await new Promise((done) => setTimeout(done, 300));
  const focus = page.activeElement === symbol && !tip.hidden ? tip.textContent : "";
  page.dispatchEvent(new view.KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
  const escaped = tip.hidden;
  symbol.blur();
  return {
    width: page.documentElement.scrollWidth, inner: view.innerWidth,
    hover: say(symbol, "mouseover"), focus, escaped,
    code: say(code, "mouseover"), elsewhere: say(pick("h1"), "mouseover"),
    inside: (say(symbol, "click"),
             tip.getBoundingClientRect().right <= width && tip.getBoundingClientRect().left >= 0),
    math: pick("#eq-8 mfrac").getBoundingClientRect().height,
    columns: pick(".row").children[1].getBoundingClientRect().left > width / 3,
    pictures: [...page.images].filter((i) => i.loading !== "lazy" && !i.naturalWidth).length,
    described: pick("#" + pick("#eq-8 [tabindex]").getAttribute("aria-describedby")) !== null,
    cut: [...page.querySelectorAll(".equation .scroll")]
      .filter((s) => s.scrollWidth > s.clientWidth).map((s) => s.closest("[id]").id),
    tile: pick(".tile").getBoundingClientRect().width,
  };
}
(async () => {
  for (const width of [400, 1400]) found[width] = await look(width);
  document.documentElement.innerHTML = `<pre>${JSON.stringify(found)}</pre>`;
})();
</script>"""


@needs_browser
def test_a_browser_shows_it_on_a_phone_and_on_a_desk(tmp_path, monkeypatch):
    (tmp_path / "look.html").write_text(LOOK)
    for folder in ("docs", "assets", "results"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)  # the folder that is served
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/look.html"
        dom, log = browse(address, "--window-size=1500,1000", f"--user-data-dir={tmp_path}/user")
        server.shutdown()
    assert "CONSOLE" not in log, log
    found = json.loads(re.search(r"<pre>(\{.*\})</pre>", dom)[1].replace("&gt;", ">"))
    for width, seen in found.items():
        assert seen["width"] <= seen["inner"] == int(width), "sideways scrolling"
        assert "weight of the KL gradient" in seen["hover"] == seen["focus"]
        assert "score of diffused generated data" in seen["code"] and seen["elsewhere"] == ""
        assert seen["inside"] and seen["described"] and seen["escaped"]
        assert seen["cut"] == [], "an equation does not fit"
        assert 280 < seen["tile"] < int(width)
        assert seen["math"] > 20 and seen["pictures"] == 0 and seen["columns"] == (width == "1400")


@needs_browser
def test_it_works_from_disk(tmp_path):
    dom, log = browse(PAGE.as_uri(), f"--user-data-dir={tmp_path}")
    assert "CONSOLE" not in log, log
    assert 'aria-describedby="symbol-' in dom  # the page's script has added it


@contextmanager
def devtools(address: str, folder: Path):
    """Chromium with this page -> call(method, **parameters) of its developer tools. They listen at
    descriptor 3 and answer at descriptor 4, in JSON that ends with a zero byte."""
    (reads, ours_out), (ours_in, writes) = os.pipe(), os.pipe()
    command = ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "bash", CHROMIUM, "--headless",
               "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
               f"--user-data-dir={folder}", address]  # fmt: skip
    how = {"pass_fds": (reads, writes), "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, **how)
    os.close(reads)
    os.close(writes)
    late = threading.Timer(120, os.killpg, (process.pid, signal.SIGKILL))  # this ends the answers
    late.start()
    session = {}

    def call(method: str, **parameters) -> dict:
        message = {"id": 1, "method": method, "params": parameters, **session}
        calls.write(json.dumps(message).encode() + b"\0")
        answer = {}
        while "id" not in answer:  # the others are events
            text = b""
            while not text.endswith(b"\0"):
                byte = answers.read(1)
                assert byte, "Chromium has ended"
                text += byte
            answer = json.loads(text[:-1])
        return answer["result"]

    with open(ours_in, "rb") as answers, open(ours_out, "wb", buffering=0) as calls:
        try:
            pages = []
            while not pages:
                time.sleep(0.1)
                targets = call("Target.getTargets")["targetInfos"]
                pages = [each["targetId"] for each in targets if each["type"] == "page"]
            session |= call("Target.attachToTarget", targetId=pages[0], flatten=True)
            yield call
        finally:
            late.cancel()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


SEE = """(() => {
  const pick = (where) => document.querySelector(where);
  const every = (where) => [...document.querySelectorAll(where)];
  const box = pick(".tile").getBoundingClientRect();
  const whole = pick(".tile img").getBoundingClientRect();
  return {
    column: Math.round(100 * (box.left - whole.left) / box.width) / 100,
    row: Math.round(100 * (box.top - whole.top) / box.height) / 100,
    result: pick("#play-result").textContent, setting: pick("#play-setting").textContent,
    spoken: every(".play [type=range]").map((slider) => slider.ariaValueText),
    shown: every(".play form output").map((output) => output.value),
  };
})()"""


@needs_browser
def test_figure_3_by_keyboard_from_disk(tmp_path, figure_3):
    """Arrow keys, tab key and space bar choose the run: its tile, its numbers, what is spoken."""
    _, about, runs = figure_3
    t_max, weights = about["t_max"], about["lambda_reg"]
    codes = {"ArrowRight": 39, "ArrowLeft": 37, "Tab": 9, " ": 32}
    with devtools(PAGE.as_uri(), tmp_path) as call:

        def evaluate(text: str):
            result = call("Runtime.evaluate", expression=text, returnByValue=True)["result"]
            return result.get("value")

        def press(*keys: str):
            for key in keys:
                how = {"key": key, "windowsVirtualKeyCode": codes[key]}
                text = {"text": key} if key == " " else {}
                call("Input.dispatchKeyEvent", type="keyDown", **how, **text)
                call("Input.dispatchKeyEvent", type="keyUp", **how)

        def check(fake: bool, row: int, column: int):
            seen = evaluate(SEE)
            near, far, *_ = runs[fake, weights[row], t_max[column]][0]
            assert (seen["column"], seen["row"]) == (column, row + (not fake) * len(weights))
            result = re.sub(r" \(spread \d\.\d\d\)", "", seen["result"])
            assert result.startswith(f"near mode {near:.0%}, far mode {far:.0%}, elsewhere ")
            assert seen["spoken"] == seen["shown"] == [str(t_max[column]), f"{weights[row]:g}"]
            how = f"{'with' if fake else 'without'} the fake score."
            chosen = f"T_max = {t_max[column]}, lambda_reg = {weights[row]:g}, {how}"
            assert seen["setting"] == chosen

        while evaluate("document.readyState + location.protocol") != "completefile:":
            time.sleep(0.1)
        check(True, 0, 2)  # Figure 3's middle
        evaluate("document.getElementById('play-t').focus()")
        press("ArrowRight", "ArrowRight")
        check(True, 0, 4)
        press("Tab", "ArrowRight", "ArrowRight", "ArrowLeft")
        check(True, 1, 4)
        press("Tab", " ")
        check(False, 1, 4)
        press(" ")
        check(True, 1, 4)
