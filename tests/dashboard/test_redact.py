"""How much work a job's author can make of a page: it is bounded, and the event loop does not wait for it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from finetune_operator.dashboard import views
from finetune_operator.dashboard.memory import Happening, JobMemory
from finetune_operator.dashboard.redact import HIDDEN, clean, clean_text
from finetune_operator.dashboard.source import JobRecord
from tests.dashboard import jobs
from tests.dashboard.serving import World, served

LENGTH = 9000
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"  # allow-secret: made up


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of five times: other processes only make it slower."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@pytest.mark.parametrize(
    "unit",
    [
        "eyJ-", "eyJ", "eyJaaaaaaaa.", "eyJ-" * 40 + ".", "Bearer ", "Basic  ,", "://", "://a", "a@", "password", "hf_",
        "Authorization: Bearer ", "api_key:  ", "?key=", "X-Amz-Signature=", "AKIA", "secret_",
    ],
)  # fmt: skip
def test_no_text_takes_much_longer_than_an_ordinary_one(unit: str) -> None:
    def text_of(unit: str) -> str:
        return (unit * LENGTH)[:LENGTH]

    ordinary, odd = text_of("some words "), text_of(unit)
    assert fastest(lambda: clean_text(odd)) < 6 * fastest(lambda: clean_text(ordinary))


@pytest.mark.parametrize("before", ["", "token=", "x-", "eyJ-", "eyJaaaaaaaa eyJbbbbbbbb.cccccccc ", "a.b."])
def test_a_web_token_is_hidden_wherever_it_begins(before: str) -> None:
    said = clean_text(f"{before}{JWT} after")
    assert said.endswith(f"{HIDDEN} after") and "c2lnbmF0dXJl" not in said


@pytest.mark.parametrize("text", ["eyJabcdefgh", "eyJabcdefgh.short.x", "eyJabcdefgh.ijklmnopq", "eyJ-eyJ-eyJ-eyJ-"])
def test_a_word_that_begins_like_a_web_token_stays(text: str) -> None:
    assert clean_text(text) == text


LARGE: dict[str, Any] = {
    "texts": {"x": ["word " * 1840] * 140},
    "numbers": {"x": [0] * 600_000},
    "names": {f"name-{number}": 1 for number in range(200_000)},
    "long names": {f"{number} {'x' * 9000}": 1 for number in range(140)},
    "maps": [{"a": {"b": {}}} for _ in range(100_000)],
}


@pytest.mark.parametrize("affinity", LARGE.values(), ids=list(LARGE))
def test_an_object_beyond_the_bound_is_cut_and_says_so(affinity: Any) -> None:
    whole = {
        "model": {"uri": "hf://o/m"},
        "scheduling": {"affinity": affinity, "queue": "q"},
        "training": {"epochs": 3},
    }
    found = clean(whole)
    said = json.dumps(found)
    assert len(said) < 1_100_000 and said.count(HIDDEN) < 200
    assert found["model"] == {"uri": "hf://o/m"}
    assert HIDDEN in json.dumps(found["scheduling"]["affinity"])
    # A form names what it left out.
    assert found["scheduling"]["queue"] == HIDDEN and found["training"] == HIDDEN


def test_ordinary_objects_are_whole() -> None:
    failures = [{"message": "x" * 8000, "attempt": number} for number in range(50)]
    assert clean(failures) == failures
    assert clean({"a": [1, 2.5, None, True, {"b": "c"}]}) == {"a": [1, 2.5, None, True, {"b": "c"}]}


def test_nothing_waits_for_a_page_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()

    def page(record: JobRecord) -> dict[str, Any]:
        begun.set()
        # Longer than the client waits for an answer.
        assert ended.wait(30)
        return {"name": record.job.ref.name}

    monkeypatch.setattr(views, "page", page)
    world = World()
    world.put(jobs.job("slow"))
    with served(world.dashboard.application) as client, ThreadPoolExecutor() as threads:
        asked = [threads.submit(client.ask, "api/jobs/team-a/slow") for _ in range(2)]
        try:
            assert begun.wait(10)
            assert client.ask("api/about").status == client.ask("api/jobs").status == 200
        finally:
            ended.set()
        assert [one.result().data for one in asked] == [{"name": "slow"}] * 2


def test_a_course_is_copied_for_the_thread_that_reads_it() -> None:
    memory = JobMemory()
    memory.report({"step": 1.0, "loss": 2.0})
    memory.events.append(Happening("now", "Normal", "Began", ""))
    copied = memory.copy()
    memory.report({"step": 2.0, "loss": 1.0})
    memory.events.clear()
    assert copied.curves["loss"].points() == [(1, 2.0)] and len(copied.events) == 1
    assert memory.curves["loss"].points() == [(1, 2.0), (2, 1.0)]
