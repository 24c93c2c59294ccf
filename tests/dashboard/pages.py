"""A page of the front end, opened in real, headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.dashboard.serving import ADMIN, Client

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

JOB = "jobs/team-a/medical-qa-8b"


@contextmanager
def opened(browser: Browser, client: Client, path: str = "", token: str = ADMIN, **options: Any) -> Iterator[Page]:
    """A page on which nothing went wrong: no error, nothing that the policy had to forbid, no other host asked."""
    wrong: list[str] = []
    context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, "timezone_id": "UTC", **options})
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("request", lambda request: None if request.url.startswith(client.url) else wrong.append(request.url))
    try:
        page.goto(f"{client.url}#token={token}")
        page.wait_for_selector("#live[data-state=live]")
        if path:
            page.goto(f"{client.url}#/{path}")
            page.wait_for_selector("h1")
        yield page
        # What the browser itself says of an answer that is no success.
        assert [one for one in wrong if "Failed to load resource" not in one] == []
    finally:
        context.close()


def rows(page: Page) -> list[str]:
    return page.locator("tbody .job a").all_inner_texts()
