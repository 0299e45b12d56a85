"""The annotated source, docs/index.html: it is what docs/build.py gives, nothing is missing, no
link is dead, and a browser shows it as it should be."""

import functools
import html
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "index.html"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs a chromium to look at the page")


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(text: str) -> list[str]:
    """What is left without markup, which differs between versions of the libraries."""
    return re.sub(r"<style>.*?</style>|<meta.*?>|<.*?>", " ", text, flags=re.DOTALL).split()


def test_the_page_is_what_the_source_gives(page, build):
    made = build.build()
    generator = re.compile(r'<meta name="generator" content="(.*?)">')
    if generator.search(made)[1] == generator.search(page)[1]:
        assert made == page, "run: python docs/build.py"
    assert words(made) == words(page), "run: python docs/build.py"
    targets = re.compile(r'(?:href|src|id|data-s)="(.*?)"')
    assert targets.findall(made) == targets.findall(page), "run: python docs/build.py"
    assert len(page.encode()) < 400_000


def test_no_equation_and_no_line_of_an_algorithm_is_missing(page):
    wanted = [f"eq-{n}" for n in range(1, 12)]
    wanted += [f"alg{a}-{n}" for a, lines in ((1, 10), (2, 6), (3, 2)) for n in range(1, lines + 1)]
    for name in wanted:
        assert page.count(f'id="{name}"') == 1, name
        rest = page[page.index(f'id="{name}"') :]
        end = rest.index("</div>" if name.startswith("eq") else "</li>")
        assert ("<math" if name.startswith("eq") else 'class="line"') in rest[:end], name


def test_no_link_is_dead(page):
    names = re.findall(r'\bid="(.*?)"', page)
    assert len(names) == len(set(names)) > 300
    links = re.findall(r'(?:href|src|srcset)="(.*?)"', page)
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


def test_shown_code_is_the_file(page):
    """Line by line, whatever the page has of it."""
    found = re.findall(r'id="([\w/]+\.py)-(\d+)" data-n="\2">(.*?)\n</span>', page)
    assert len(found) == page.count('class="l"') > 300
    for file, number, coloured in found:
        text = html.unescape(re.sub("<.*?>", "", coloured))
        line = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert text == line, (file, number)


@pytest.mark.parametrize("call", ['code("train.py", "no_such")', 'line("train.py", "no such line")',
                                  'line("train.py", "config")', 'see("train.py", "Run.no_such")',
                                  'code("train.py", "main", "main")'])  # fmt: skip
def test_what_is_not_there_or_not_once_fails_the_build(call, build):
    build.shown.clear()
    with pytest.raises(LookupError):
        eval(call, vars(build))


# --------------------------------------------------------------------------------------------------
# In a browser


def browse(address: str, *options: str) -> tuple[str, str]:
    """Load a page without a window -> the document as it then is, what was logged."""
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
  const loaded = new Promise((done) => { frame.onload = done; });
  document.documentElement.append(frame);
  await loaded;
  const page = frame.contentDocument, tip = page.getElementById("tip");
  const say = (symbol, kind) => {
    tip.hidden = true;
    symbol.dispatchEvent(new frame.contentWindow.Event(kind, { bubbles: true }));
    return tip.hidden ? "" : tip.textContent;
  };
  const pick = (where) => page.querySelector(where);
  const code = [...page.querySelectorAll("pre [data-s]")].find((s) => s.textContent === "s_fake");
  const symbol = pick("#eq-8 [tabindex]");
  symbol.focus();  // which scrolls
  await new Promise((done) => setTimeout(done, 300));
  const focus = page.activeElement === symbol && !tip.hidden ? tip.textContent : "";
  const escape = { key: "Escape", bubbles: true };
  page.dispatchEvent(new frame.contentWindow.KeyboardEvent("keydown", escape));
  const escaped = tip.hidden;
  symbol.blur();
  return {
    width: page.documentElement.scrollWidth, inner: frame.contentWindow.innerWidth,
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


class Server(http.server.SimpleHTTPRequestHandler):
    """The repository, and LOOK."""

    def do_GET(self):
        if self.path != "/look":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(LOOK.encode())

    def log_message(self, *_):
        pass


@needs_browser
def test_a_browser_shows_it_on_a_phone_and_on_a_desk(tmp_path):
    handler = functools.partial(Server, directory=str(ROOT))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/look"
        dom, log = browse(address, "--window-size=1500,1000", f"--user-data-dir={tmp_path}")
        server.shutdown()
    assert "CONSOLE" not in log, log
    found = json.loads(re.search(r"<pre>(\{.*\})</pre>", dom)[1].replace("&gt;", ">"))
    for width, seen in found.items():
        assert seen["width"] <= seen["inner"] == int(width), "sideways scrolling"
        assert "weight of the KL gradient" in seen["hover"] == seen["focus"]
        assert "score of diffused generated data" in seen["code"] and seen["elsewhere"] == ""
        assert (
            seen["inside"]
            and seen["described"]
            and seen["escaped"]
            and seen["math"] > 20
            and seen["pictures"] == 0
        )
        assert seen["columns"] == (width == "1400")


@needs_browser
def test_it_works_from_disk(tmp_path):
    dom, log = browse(Path(PAGE).as_uri(), f"--user-data-dir={tmp_path}")
    assert "CONSOLE" not in log, log
    assert 'aria-describedby="symbol-' in dom  # which the script has added
