"""The form that builds manifests, and templates for it, in real, headless Chromium."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import yaml

from finetune_operator.api.parse import load_manifests
from tests.dashboard import jobs
from tests.dashboard.serving import Client, World

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route

from tests.dashboard.pages import JOB, opened


def test_a_form_that_comes_late_replaces_no_other_page(browser: Browser, client: Client) -> None:
    with opened(browser, client) as page:
        held: list[Route] = []
        page.route("**/api/form", lambda route: held.append(route))
        with page.expect_request("**/api/form"):
            page.click("#nav-new")
        page.click("#nav-jobs")
        page.wait_for_selector("tbody tr")
        with page.expect_response("**/api/form"):
            held[0].continue_()
        page.wait_for_timeout(200)
        assert page.inner_text("h1") == "Jobs"


def test_the_form_builds_a_manifest_that_is_valid(browser: Browser, client: Client) -> None:
    with opened(browser, client, "new", permissions=["clipboard-read", "clipboard-write"]) as page:
        page.get_by_text("to be decided or corrected").wait_for()
        page.get_by_label("metadata.name", exact=True).fill("from-the-form")
        page.get_by_label("model.uri").fill("hf://org/model")
        page.get_by_label("dataset.uri").fill("s3://data/x.jsonl")
        page.get_by_label("output.uri").fill("s3://models/x")
        page.get_by_label("method", exact=True).select_option("qlora")
        page.get_by_label("layers.last").fill("lots")
        page.locator("#f-layers\\.last-wrong", has_text="not a whole number").wait_for()
        assert page.get_by_label("layers.last").get_attribute("aria-invalid") == "true"
        page.get_by_role("button", name="layers.last").click()
        assert page.evaluate("document.activeElement.id") == "f-layers.last"
        page.get_by_label("layers.last").fill("3")
        page.locator("summary", has_text=re.compile("^training")).click()
        page.get_by_label("training.microBatchSize").fill("4")
        page.locator("summary", has_text=re.compile("^evaluation")).click()
        page.get_by_label("evaluation.metrics").fill("perplexity, bleu")
        page.get_by_label("evaluation.gates").fill('[{"metric": "perplexity", "max": 12}]')
        page.get_by_label("dataset.validation.fraction").fill("0.1")
        page.locator("summary", has_text=re.compile("^config.json")).click()
        page.fill("#config", json.dumps(jobs.LLAMA))
        page.get_by_text("Valid: the API takes it as it is.").wait_for()
        page.locator(".outcome .stack").wait_for()
        page.get_by_role("button", name="Copy manifest").click()
        page.get_by_role("button", name="Copied").wait_for()
        copied = page.evaluate("navigator.clipboard.readText()")
    job = load_manifests(copied)[0]
    assert (job.name, job.spec.method.value, job.spec.training.micro_batch_size) == ("from-the-form", "qlora", 4)
    assert job.spec.layers is not None and job.spec.layers.last == 3 and job.spec.evaluation.gates[0].max == 12


def test_a_job_is_a_template_of_another(browser: Browser, client: Client) -> None:
    with opened(browser, client, JOB) as page:
        page.get_by_role("link", name="Use as template").click()
        page.get_by_text("Valid: the API takes it as it is.").wait_for()
        text = page.inner_text(".yaml")
    job = load_manifests(text)[0]
    assert (job.name, job.spec.method.value, job.spec.resources.gpus) == ("medical-qa-8b-2", "freeze", 8)


def test_a_template_says_what_it_could_not_take_over(browser: Browser, world: World, client: Client) -> None:
    """Anything else would be another job without a word."""
    spec = {
        "method": "head",
        "head": {"labels": ["yes", "no, never", "maybe"], "dense": [64, 32]},
        "evaluation": {"metrics": []},
        "output": {"uri": "s3://models/x"},
    }
    hidden = {
        "dataset": {"uri": "s3://data/x.jsonl", "template": "{% for m in messages %}" + "x" * 20_000},
        "trainer": {"podTemplate": {"spec": {"tolerations": [{"key": "gpu"}]}}},
    }
    world.put(jobs.job("base", spec=spec | hidden))
    with opened(browser, client, "new/team-a/base") as page:
        page.wait_for_selector(".yaml:not(:empty)")
        made = yaml.safe_load(page.inner_text(".yaml"))["spec"]
        said = page.inner_text(".title")
    assert {name: made[name] for name in spec} == spec
    assert made["dataset"] == {"uri": "s3://data/x.jsonl"} and "trainer" not in made
    assert "but for what is not shown here: dataset.template, trainer.podTemplate." in said
