"""The front end in real, headless Chromium: what is seen, read out, and reached with a keyboard; and hostile texts."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune_operator.cluster import Event
from finetune_operator.observed import JobRef
from finetune_operator.times import rfc3339
from tests.dashboard import jobs
from tests.dashboard.pages import JOB, opened, rows
from tests.dashboard.serving import ADMIN, NOBODY, TEAM_A, Client, World

if TYPE_CHECKING:
    from playwright.sync_api import Browser

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SHOWN = (
    "medical-qa-8b",
    "Running",
    "step 976 of 1,600",
    "held-out 0.9542",
    "ZeRO-2",
    "53.2 GiB of 80.0 GiB",
    "1.05 B of 8.03 B",
    "lowest 11 blocks",
    "NodeLost",
    "attempt 2 begins at step 500",
    "gpu-a-01",
)
SIGNS = {
    "": "tbody tr",
    JOB: ".tile",
    "jobs/team-b/support-bot": ".tile",
    "new": ".yaml:not(:empty)",
    "nowhere": ".notice",
}
"""Pages, and what is there once they are."""


def test_the_list(browser: Browser, client: Client) -> None:
    with opened(browser, client) as page:
        assert rows(page)[0] == "translation-pairs" and len(rows(page)) == 8
        cells = page.locator("tr", has_text="medical-qa-8b").locator("td").all_inner_texts()
        assert cells[1:] == [
            "Running",
            "61 %",
            "2 h 5 min",
            "0.8479",
            "41,150",
            "freeze",
            "meta-llama/Llama-3.1-8B-Instruct",
            "8",
            "2",
            cells[-1],
        ]
        page.get_by_role("button", name="Job", exact=True).click()
        assert rows(page) == sorted(rows(page))
        page.get_by_role("button", name="Job", exact=True).click()
        assert rows(page) == sorted(rows(page), reverse=True)
        page.get_by_role("button", name="1 Failed").click()
        assert rows(page) == ["code-review"]
        page.get_by_role("button", name="1 Failed").click()
        page.fill("#search", "qwen lora")
        assert rows(page) == ["support-bot"]
        page.fill("#search", "no such thing")
        assert page.get_by_text("No job matches.").is_visible()


def test_the_list_is_kept_up_to_date(browser: Browser, world: World, client: Client) -> None:
    with opened(browser, client) as page:
        row = page.locator("tr", has_text="medical-qa-8b")
        row.get_by_role("link").focus()
        changed = jobs.running()
        changed["metadata"]["resourceVersion"] = "2"
        changed["status"] |= {"phase": "Succeeded", "progress": {"percent": 100}}
        world.put(changed, jobs.job("brand-new", created="2026-11-22T12:30:00Z"))
        row.get_by_text("Succeeded").wait_for()
        assert rows(page)[0] == "brand-new"
        assert page.evaluate("document.activeElement.textContent") == "medical-qa-8b", "focus stays where it was"


def test_a_job(browser: Browser, world: World, client: Client) -> None:
    with opened(browser, client, JOB) as page:
        page.wait_for_selector(".tile")
        text = page.inner_text("main")
        for part in SHOWN:
            assert part in text, part
        parts = page.locator(".stack .part").evaluate_all("all => all.map(one => one.width.baseVal.value)")
        wanted = jobs.plan()["memoryPerGPU"]
        for index, name in ((0, "weights"), (3, "activations")):
            assert parts[index] == pytest.approx(wanted[name] / (80 * jobs.GIB) * 1000, abs=2), name
        lines = page.locator(".plot .line").evaluate_all("all => all.map(one => one.getTotalLength())")
        assert len(lines) == 5 and all(length > 300 for length in lines)
        # Held-out loss, reported every 100 steps, goes on without a step back.
        assert page.locator(".plot .restart").count() == 4
        world.report("medical-qa-8b", "team-a", {"step": 977.0, "loss": 0.4321})
        page.locator(".readout", has_text="0.4321").wait_for()


def test_a_finished_job_shows_before_and_after(browser: Browser, client: Client) -> None:
    with opened(browser, client, "jobs/team-b/support-bot") as page:
        page.wait_for_selector(".tile")
        table = page.locator("section", has_text="Result").locator("tbody tr")
        perplexity, accuracy = (row.split("\t") for row in table.all_inner_texts())
        assert perplexity[:3] == ["perplexity", "12.81", "4.02"] and perplexity[3].endswith("68.6 % better")
        assert accuracy == ["accuracy", "0.4131", "0.6624", "+60.3 % better"]
        assert page.get_by_text("Nothing reported yet.").is_visible()


def test_curves_are_read_with_a_keyboard(browser: Browser, client: Client) -> None:
    with opened(browser, client, JOB) as page:
        plot, readout = page.locator(".plot").first, page.locator(".readout").first
        plot.focus()
        page.keyboard.press("Home")
        assert "at step 1" in readout.inner_text()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("End")
        assert "training 0.8479" in readout.inner_text() and "at step 976" in readout.inner_text()
        assert "training from" in (plot.get_attribute("aria-label") or "")
        page.get_by_role("button", name="Loss: log").click()
        page.get_by_role("button", name="Loss: smooth").click()
        assert page.locator(".plot").first.locator(".raw").count() == 2


def test_hostile_texts_stay_text(browser: Browser, world: World, client: Client) -> None:
    world.put(jobs.hostile())
    with opened(browser, client) as page:
        page.wait_for_selector("text=<script>")
        for path in ("jobs/team-a/hostile", "new/team-a/hostile"):
            page.goto(f"{client.url}#/{path}")
            page.wait_for_selector("text=onerror")
            page.wait_for_timeout(200)
            assert "owned" not in page.title() and page.locator("main img, main script").count() == 0
        assert "hunter2" not in page.content() and "topsecret" not in page.content()


MARKUP = """() => {
  try {
    document.getElementById("said").innerHTML = "<img src=x onerror='document.title = 1'>";
    return "taken";
  } catch (error) {
    return error.name;
  }
}"""


def test_the_policy_holds_even_where_the_front_end_would_not(browser: Browser, client: Client) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(client.url)
    assert page.evaluate(MARKUP) == "TypeError", "trusted types refuse markup altogether"
    context.close()


def test_signing_in_and_out(browser: Browser, client: Client) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(client.url)
    page.get_by_label("Token").fill("wrong")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_text("does not know this token").wait_for()
    page.get_by_label("Token").fill(TEAM_A)
    page.keyboard.press("Enter")
    page.wait_for_selector("tbody tr")
    assert page.inner_text("#who") == "bob" and len(rows(page)) == 3
    page.reload()
    page.wait_for_selector("tbody tr")
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("Token").wait_for()
    assert page.evaluate("sessionStorage.length") == 0
    context.close()


def test_the_token_of_an_address_leaves_the_address(browser: Browser, client: Client) -> None:
    with opened(browser, client) as page:
        assert page.url == f"{client.url}#/" and ADMIN not in page.content()


def test_who_may_see_nothing_is_told_so(browser: Browser, client: Client) -> None:
    with opened(browser, client, token=NOBODY) as page:
        page.get_by_text("No FineTuneJobs here that you may see").wait_for()
    with opened(browser, client, "jobs/team-b/support-bot", TEAM_A) as page:
        page.get_by_text("or you may not see it").wait_for()


def test_a_server_that_goes_away_is_seen_to(browser: Browser, world: World, client: Client) -> None:
    with opened(browser, client) as page:
        world.leads = False
        page.wait_for_selector("#live[data-state=lost]")
        assert "does not lead" in page.inner_text("#live") and rows(page), "what was read stays"
        world.leads = True
        page.wait_for_selector("#live[data-state=live]", timeout=60_000)


def test_a_page_that_is_not_the_dashboards_is_no_news(browser: Browser, client: Client) -> None:
    """Such as the sign-in page of a proxy: the list must not go on being called live."""
    with opened(browser, client) as page:
        page.route("**/api/jobs/*/*", lambda route: route.fulfill(content_type="text/html", body="<h1>Sign in</h1>"))
        page.goto(f"{client.url}#/{JOB}")
        page.wait_for_selector("#live[data-state=lost]")
        assert "is not the dashboard" in page.inner_text("#live")


FIRST_LOOKS_FAIL = """async () => {
  const { poll } = await import("./static/api.js");
  const [tags, counts] = [[], []];
  window.fetch = async (path, { headers }) => {
    tags.push(headers["If-None-Match"] ?? "none");
    return new Response("{}", { headers: { ETag: '"x"' } });
  };
  await new Promise((done) => {
    const onData = () => {
      if (tags.length < 3) throw new Error("not now");
    };
    const onError = (error, failures) => counts.push(failures);
    const polling = poll("x", 1, { onData, onError, onAlive: () => tags.length > 3 && (polling.stop(), done()) });
  });
  return [tags, counts];
}"""


def test_what_could_not_be_shown_is_asked_for_again(browser: Browser, client: Client) -> None:
    with opened(browser, client) as page:
        assert page.evaluate(FIRST_LOOKS_FAIL) == [["none", "none", "none", '"x"'], [1, 2]]


@pytest.mark.timeout(60)
def test_ticks_of_any_bounds_are_few(browser: Browser, client: Client) -> None:
    ticks = "async (bounds) => (await import('./static/chart.js')).ticks(...bounds)"
    with opened(browser, client) as page:
        assert page.evaluate(ticks, [0, 1, 4]) == [0, 0.5, 1]
        assert page.evaluate(ticks, [3, 1600, 5]) == [500, 1000, 1500]
        for low, high in ((2.0**55, 2.0**55 + 8), (-1e300, 1e300), (1e-300, 2e-300), (1e23, 1e23 + 2**27)):
            assert 0 < len(page.evaluate(ticks, [low, high, 4])) < 12


WORDS = """async () => {
  const { short, share } = await import("./static/format.js");
  const { evaluation } = await import("./static/result.js");
  const result = evaluation({ result: { evaluation: { base: { a: 2, b: 2 }, tuned: { a: 31, b: 2 } } } });
  const changes = [...result.querySelectorAll("td:last-child")].map((cell) => cell.textContent);
  return [short(999_600_000), short(999_400_000), short(8_030_261_248), share(14), share(0.0182), ...changes];
}"""


def test_numbers_in_short_are_those_that_people_write(browser: Browser, client: Client) -> None:
    with opened(browser, client) as page:
        words = ["1 B", "999 M", "8.03 B", "1,400 %", "1.82 %", "+1,450 % better", "0 %"]
        assert page.evaluate(WORDS) == words


CHANGES = """async () => {
  const { evaluation } = await import("./static/result.js");
  const metrics = [
    ["rewardMargin", -0.31, 0.42], ["pearson", -0.05, -0.25], ["spearman", 0.02, -0.01], ["rewardMargin", 0, 0.5],
    ["loss", 0.4, -0.1], ["exactMatch", 0, 0.25], ["perplexity", 10, 5], ["accuracy", 0.5, 0.6], ["pearson", 0, 0],
  ];
  return metrics.map(([name, base, tuned]) => {
    const page = evaluation({ result: { evaluation: { base: { [name]: base }, tuned: { [name]: tuned } } } });
    const cell = page.querySelector("td:last-child span");
    return `${cell.textContent}, ${cell.className}`;
  });
}"""


def test_a_change_is_told_with_its_sign_also_below_zero(browser: Browser, client: Client) -> None:
    less = "\N{MINUS SIGN}"
    with opened(browser, client) as page:
        assert page.evaluate(CHANGES) == [
            "+0.73 better, good", f"{less}0.2 worse, bad", f"{less}0.03 worse, bad", "+0.5 better, good",
            f"{less}0.5 better, good", "+0.25 better, good", f"{less}50 % better, good", "+20 % better, good", "0, ",
        ]  # fmt: skip


def test_time_goes_on_where_nothing_else_changes(browser: Browser, world: World, client: Client) -> None:
    began = time.time()
    world.dashboard._now = lambda: began
    world.put(jobs.job("fresh", created=rfc3339(began)))
    world.dashboard.happened(JobRef("team-a", "fresh"), "uid-team-a-fresh", Event("Normal", "Training", "it trains"))
    with opened(browser, client) as page:
        for path, text in (("", "fresh"), ("jobs/team-a/fresh", "it trains")):
            page.goto(f"{client.url}#/{path}")
            shown = page.locator("tr", has_text=text).locator("time")
            before = shown.inner_text()
            page.wait_for_timeout(1100)
            # Looked at anew, which is when the server is asked.
            page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
            shown.filter(has_not_text=before).wait_for()


def test_the_address_of_another_dashboard_is_read_in_a_tab_that_is_open(browser: Browser, client: Client) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{client.url}#token=of-last-time")
    page.wait_for_selector("#token")
    page.goto(f"{client.url}#token={ADMIN}")
    page.wait_for_selector("tbody tr")
    assert page.url == f"{client.url}#/"
    context.close()


FOCUSED = """() => {
  const one = document.activeElement;
  const name = one.id || one.textContent.trim().slice(0, 20) || one.tagName;
  return [name, getComputedStyle(one).outlineStyle !== "none"];
}"""


def test_all_of_it_is_reached_with_a_keyboard(browser: Browser, client: Client) -> None:
    with opened(browser, client) as page:
        page.evaluate("document.activeElement.blur()")
        seen = []
        for _ in range(40):
            page.keyboard.press("Tab")
            seen.append(page.evaluate(FOCUSED))
            if seen[-1][0] == "translation-pairs":
                break
        names = [name for name, _ in seen]
        for wanted in ("skip", "nav-jobs", "nav-new", "theme", "1 Running", "search", "Loss"):
            assert wanted in names, names
        assert all(visible for _, visible in seen), seen
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.wait_for_url(re.compile("#/jobs/research/intents-head"))
        page.keyboard.press("Shift+Tab")
        page.goto(f"{client.url}#/")
        page.wait_for_selector("#search")
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "search"


@pytest.mark.parametrize("system", ["light", "dark"])
def test_light_and_dark(browser: Browser, client: Client, system: Any) -> None:
    other = "dark" if system == "light" else "light"
    with opened(browser, client, color_scheme=system) as page:
        ground = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate("document.documentElement.dataset.theme") == system
        before = page.evaluate(ground)
        page.get_by_role("button", name="Switch between light and dark").click()
        assert page.evaluate("document.documentElement.dataset.theme") == other and page.evaluate(ground) != before
        page.reload()
        page.wait_for_selector("tbody tr")
        assert page.evaluate("document.documentElement.dataset.theme") == other, "the choice is kept"


@pytest.mark.parametrize(("theme", "only"), [("light", None), ("dark", ["color-contrast"])])
def test_axe_finds_nothing(browser: Browser, client: Client, theme: Any, only: list[str] | None) -> None:
    from axe_playwright_python.sync_playwright import Axe

    options = {"runOnly": only} if only else None
    with opened(browser, client, color_scheme=theme) as page:
        for path, sign in SIGNS.items():
            page.goto(f"{client.url}#/{path}")
            page.wait_for_selector(sign)
            found = Axe().run(page, options=options).response["violations"]
            assert [(one["id"], one["nodes"][0]["html"]) for one in found] == [], f"{path} in {theme}"


@pytest.mark.parametrize("width", [360, 768])
def test_a_narrow_window_is_not_overrun(browser: Browser, client: Client, width: int) -> None:
    with opened(browser, client, viewport={"width": width, "height": 800}) as page:
        for path, sign in SIGNS.items():
            page.goto(f"{client.url}#/{path}")
            page.wait_for_selector(sign)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path


def test_screenshots(browser: Browser, client: Client, tmp_path: Path) -> None:
    """Of what docs/dashboard.md shows; UPDATE_IMAGES=1 puts them there."""
    folder = IMAGES if os.environ.get("UPDATE_IMAGES") else tmp_path
    folder.mkdir(exist_ok=True)
    for name, path, theme, height in (("dashboard-jobs", "", "light", 500), ("dashboard-job", JOB, "dark", 860)):
        options: dict[str, Any] = {"color_scheme": theme, "viewport": {"width": 1200, "height": height}}
        with opened(browser, client, path, **options) as page:
            page.wait_for_selector("tbody tr")
            page.wait_for_timeout(300)
            page.screenshot(path=folder / f"{name}.png")
            size = (folder / f"{name}.png").stat().st_size
            assert 20_000 < size < 150_000, f"{name}.png has {size} bytes"
