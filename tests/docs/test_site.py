"""The documentation site: it builds without a warning, which a broken link would be, and a browser shows it.

The screenshots in build/shots are for the eye: light, dark, and in a narrow window.
"""

import html
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from testing import ROOT

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sphinx", "furo", "myst_parser", "latex2mathml"))),
    reason="the tools of the dependency group docs are not installed; make test installs them into .venv",
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; apt install chromium")
SHOTS = ROOT / "build" / "shots"


def build(source, folder):
    """The command of make docs, with other folders."""
    (arguments,) = re.findall(r"^\t\$\(PYTHON\) -m sphinx (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    command = [sys.executable, "-m", "sphinx", *arguments.replace("build/", f"{folder}/").split()]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_every_page_is_built(site):
    pages = {
        path.relative_to(ROOT).with_suffix(".html") for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    }
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}
    assert (site / "search.html").exists() and "epsilon" in (site / "searchindex.js").read_text()


def test_no_raw_markup_is_shown(site):
    """Neither roles nor directives nor formulas of the docstrings, and no marks of Markdown."""
    for path in (site / "docs").rglob("*.html"):
        article = path.read_text().split("<article")[1].split("</article>")[0]
        shown = html.unescape(re.sub(r"<pre>.*?</pre>|<code.*?</code>|<[^>]+>", "", article, flags=re.DOTALL))
        assert not re.search(r":(func|class|math|mod|meth):|\.\. \w+::|\\frac|`|\*\*|\]\(", shown), path
        assert "api" not in path.parts or "<ol" not in article, path  # initials of a name would begin a list
    assert (site / "docs" / "api" / "functional.html").read_text().count("<math") > 20


def test_a_broken_link_fails(tmp_path):
    """The twin of the strict build: one planted link is reported."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for page in ROOT.glob("*.md"):
        shutil.copy(page, tmp_path)
    with open(tmp_path / "docs" / "install.md", "a") as page:
        page.write("\n[A link](no_such_page.md).\n")
    done = build(tmp_path, tmp_path)
    assert done.returncode != 0 and "no_such_page.md" in done.stderr


@pytest.fixture(scope="module")
def address(site):
    """The site as a server of this machine shows it."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = partial(Handler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def browse(*options):
    """What headless Chromium prints. The virtual time passes at once, but for what the page loads."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000"]
    done = subprocess.run([CHROMIUM, *flags, *options], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@needs_browser
def test_the_front_page_leads_to_the_api_and_to_search(address):
    page = browse("--dump-dom", f"{address}/")  # which leads to docs/index.html
    (api,) = set(re.findall(r'href="([^"]+)"[^>]*>API reference<', page))
    assert "topk_fast.functional" in browse("--dump-dom", f"{address}/docs/{api}")
    found = browse("--dump-dom", f"{address}/search.html?q=linear_sampled_cross_entropy")
    assert "docs/api/functional.html" in found.split('id="search-results"')[1]


CHECK = """
<iframe id="frame" width="400" height="900"></iframe><pre id="found"></pre>
<script>
const canScroll = part => getComputedStyle(part).overflowX == "auto"
const scrolls = part => part.tagName != "ARTICLE" && (canScroll(part) || scrolls(part.parentElement))
const tooWide = part => part.getBoundingClientRect().right > 400 && !scrolls(part.parentElement);
(async () => {
  for (const page of PAGES) {
    frame.src = page
    await new Promise(loaded => frame.onload = loaded)
    const shown = frame.contentDocument
    const broken = [...shown.images].filter(image => !image.naturalWidth).map(image => image.src)
    const wide = [...shown.querySelectorAll("article *")].filter(tooWide).map(part => part.textContent)
    found.textContent += JSON.stringify([page, wide, broken]) + "\\n"
  }
})()
</script>
"""


@needs_browser
def test_pages_fit_a_narrow_window_and_show_their_pictures(address, site):
    """Tables, code and formulas scroll in place: no page is wider than a window of 400 pixels."""
    pages = [str(path.relative_to(site)) for path in (site / "README.html", *sorted((site / "docs").rglob("*.html")))]
    (site / "check.html").write_text(CHECK.replace("PAGES", json.dumps(pages)))
    dom = browse("--dump-dom", f"{address}/check.html")
    lines = html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]).splitlines()
    found = [json.loads(line) for line in lines]
    assert [page for page, _, _ in found] == pages
    assert not [one for one in found if one[1] or one[2]]


# A page, its window, and whether it is dark.
VIEWS = {
    "front": ("docs/index.html", "1280,1000", False),
    "front-dark": ("docs/index.html", "1280,1000", True),
    "api": ("docs/api/functional.html", "1280,1400", False),
    "api-dark": ("docs/api/functional.html", "1280,1400", True),
    "plot": ("README.html", "1280,1000", False),
    "plot-dark": ("docs/algorithm.html", "1280,1000", True),
    "narrow": ("docs/choosing.html", "400,1400", False),
}


@needs_browser
@pytest.mark.parametrize("name", VIEWS)
def test_screenshots(name, address):
    """A light page is light and a dark one dark, and both have something on them."""
    image = pytest.importorskip("matplotlib.image", reason="matplotlib reads the screenshots")
    page, window, dark = VIEWS[name]
    SHOTS.mkdir(parents=True, exist_ok=True)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    browse(f"--screenshot={SHOTS / name}.png", f"--window-size={window}", scheme, f"{address}/{page}")
    brightness = image.imread(SHOTS / f"{name}.png")[..., :3].mean(2)
    assert brightness.mean() < 0.3 if dark else brightness.mean() > 0.8
    assert brightness.std() > 0.05
