"""The built pages, as a crawler and a browser see them; run `make book` first."""

import functools
import http.server
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

from svae_lib.verify import EQUATIONS

HTML = Path(__file__).parent.parent / "_build" / "html"
PAGES = [
    path.relative_to(HTML).as_posix() for path in sorted([*HTML.glob("book/**/*.html"), *HTML.glob("notebooks/*.html")])
]
CRAWLED = [path for path in HTML.rglob("*.html") if "_static" not in path.parts]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()

pytestmark = pytest.mark.skipif(not PAGES, reason="there are no pages to look at: run make book first")


@functools.cache
def soup(path):
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@functools.cache
def anchors(path):
    return {element["id"] for element in soup(path).find_all(id=True)}


def references(path):
    for tag, attribute in (("a", "href"), ("link", "href"), ("img", "src"), ("script", "src")):
        for element in soup(path).find_all(tag, **{attribute: True}):
            yield tag, element[attribute]


def test_every_internal_link_and_anchor_exists():
    broken = []
    for page in CRAWLED:
        for _, reference in references(page):
            parts = urlsplit(reference)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            fragment = unquote(parts.fragment)
            if not target.is_file() or fragment and target.suffix == ".html" and fragment not in anchors(target):
                broken.append(f"{page.relative_to(HTML)}: {reference}")
    assert not broken


def test_the_pages_load_nothing_from_elsewhere():
    outside = {
        reference
        for page in CRAWLED
        for tag, reference in references(page)
        if tag != "a" and urlsplit(reference).netloc
    }
    assert not outside


def test_all_equations_of_the_papers_stand_somewhere_and_show_the_papers_numbers():
    found = set()
    for page in HTML.glob("notebooks/*.html"):
        for equation in soup(page).select("div.math[id^=equation-]"):
            label, number = equation["id"].removeprefix("equation-"), equation.select_one(".eqno").text
            if label[0] in "sa" and label[1:].isdigit():
                assert number.startswith(f"({label.upper()})")
                found.add(label.upper())
    assert found == set(EQUATIONS)


@pytest.fixture(scope="module")
def address():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=HTML))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def context():
    """One for all pages, so that what they share is loaded once."""
    if not CHROMIUM:
        pytest.skip("there is no Chromium on the path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS).new_context()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_reads_well(context, address, name):
    page = context.new_page()
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address + name, wait_until="load")
    page.evaluate("() => window.MathJax && MathJax.startup.promise")

    for width in (1400, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the window"
    formulas = page.locator(".math")
    assert page.locator(".math:has(mjx-container)").count() == formulas.count(), "some mathematics is not rendered"
    assert page.locator('[data-mml-node="merror"]').count() == 0, "MathJax does not understand some mathematics"
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    assert said == []
    page.close()
