"""The annotated source, docs/index.html: docs/build.py makes exactly this page, nothing is missing,
no link is dead, and a browser shows it correctly."""

import html
import importlib.util
import json
import re
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "index.html"
TEXT = PAGE.read_text(encoding="utf-8")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium to look at the page")


@pytest.fixture(scope="module")
def build():
    for package in ("jinja2", "pygments", "latex2mathml"):
        reason = f"docs/build.py needs {package}: pip install -r requirements-dev.txt"
        pytest.importorskip(package, reason=reason)
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
            if anchor:
                lines = file.read_text(encoding="utf-8").splitlines()
                assert 1 <= int(anchor.removeprefix("L")) <= len(lines), link


def test_shown_code_is_the_file():
    found = re.findall(r'id="([\w/]+\.py)-(\d+)" data-n="\2">(.*?)\n</span>', TEXT)
    assert len(found) == TEXT.count('class="l"') > 300
    for file, number, coloured in found:
        text = html.unescape(re.sub("<.*?>", "", coloured))
        line = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert text == line, (file, number)


@pytest.mark.parametrize("call", ['code("train.py", "no_such")', 'line("train.py", "no such line")',
                                  'line("train.py", "config")', 'see("train.py", "Run.no_such")',
                                  'code("train.py", "main", "main")'])  # fmt: skip
def test_a_name_or_text_must_occur_once(call, build):
    build.shown.clear()
    with pytest.raises(LookupError):
        eval(call, vars(build))


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
        assert seen["math"] > 20 and seen["pictures"] == 0 and seen["columns"] == (width == "1400")


@needs_browser
def test_it_works_from_disk(tmp_path):
    dom, log = browse(PAGE.as_uri(), f"--user-data-dir={tmp_path}")
    assert "CONSOLE" not in log, log
    assert 'aria-describedby="symbol-' in dom  # the page's script has added it
