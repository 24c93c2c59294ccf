"""A dashboard that is served, and Chromium, or the reason why the tests that need it are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.dashboard.serving import Client, World, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def world() -> World:
    """Jobs of every phase."""
    made = World()
    made.fill()
    return made


@pytest.fixture
def client(world: World) -> Iterator[Client]:
    """Asks the world's dashboard."""
    with served(world.dashboard.application) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium, for a module whose tests are all synchronous: playwright keeps a loop in this thread."""
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one in CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # CI is root, whose processes Chromium's own sandbox does not take.
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()
