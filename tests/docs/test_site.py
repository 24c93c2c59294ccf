"""The site as it is built: nothing is warned of, nothing is fetched from elsewhere, and its search finds things."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from documentation import hook
from documentation.hook import PAGES, PARTS
from documentation.pictures import EXAMPLES
from tests.dashboard.conftest import browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser

__all__ = ["browser"]

ROOT = Path(__file__).parents[2]
LOADS = re.compile(r"<(?:script|img|iframe|link(?! rel=\"canonical\"))\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\" >]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, "WARNING" in done.stderr) == (0, False), done.stdout + done.stderr
    return folder


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in PAGES:
        assert (site / path.removesuffix(".md") / "index.html").is_file(), path
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    assert {str(path): found for path, text in pages.items() if (found := LOADS.findall(text))} == {}
    assert [str(path) for path, text in pages.items() if "<!-- generated" in text or 'class="mermaid"' in text] == []
    used = {
        name
        for name in PARTS
        for path in (ROOT / "docs").rglob("*.md")
        if f"<!-- generated: {name} -->" in path.read_text()
    }
    assert used == PARTS.keys()


def test_the_search_works_without_the_internet(browser: Browser, address: str) -> None:
    asked: list[str] = []
    page = browser.new_page()
    page.set_default_timeout(90_000)
    page.on("request", lambda request: asked.append(request.url))
    for words, title in (
        ("TrainingOperatorMissing", "Errors and what to do"),
        ("rankPattern", "Fields of FineTuneJob"),
    ):
        page.goto(address)
        # The search listens to keys and to the focus, not to a value that is set: it is typed key by key.
        page.locator("input.md-search__input").press_sequentially(words)
        page.locator(".md-search-result__item", has_text=title).first.wait_for()
    assert [url for url in asked if not url.startswith((address, "blob:", "data:"))] == []
    page.close()


def test_pictures_are_drawn_on_the_page(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.set_default_timeout(90_000)
    page.goto(f"{address}/layers/")
    figures = page.locator("figure.picture svg")
    assert figures.count() == len([one for group in EXAMPLES.values() for one in group])
    box = figures.first.bounding_box()
    assert box is not None and box["width"] > 300 and box["height"] > 150
    colours = page.evaluate(
        "[...new Set([...document.querySelectorAll('.picture rect')].map(r => getComputedStyle(r).fill))]"
    )
    assert len(colours) == 3, "trained, adapted and frozen look different"
    page.close()


def test_the_navigation_leaves_out_what_is_not_written(tmp_path: Path) -> None:
    for name in ("index.md", "adr/0002-b.md", "adr/README.md", "adr/0001-a.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    nav = [
        {"Home": "index.md"},
        {"Gone": [{"Lost": "lost.md"}]},
        {"More": [{"Lost": "lost.md"}, {"Fields": "reference/fields.md"}, {"Decisions": "adr/"}]},
    ]
    decisions = ["adr/README.md", "adr/0001-a.md", "adr/0002-b.md"]
    assert hook.written(nav, tmp_path) == [
        {"Home": "index.md"},
        {"More": [{"Fields": "reference/fields.md"}, {"Decisions": decisions}]},
    ]


def test_a_link_out_of_the_documentation_leads_to_the_repository() -> None:
    inside = "[b](../choosing.md) [c](https://example.com/../x) [d](layers.md)"
    assert hook.outward(f"[a](../../README.md#more) {inside}", "adr/0002-kopf.md") == (
        f"[a]({hook.REPOSITORY}README.md#more) {inside}"
    )
    with pytest.raises(FileNotFoundError, match=r"docs/index\.md links to nowhere\.md"):
        hook.outward("[a](../nowhere.md)", "index.md")
