"""Events wait for their turn, in order, and are sent once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from finetune_operator.cluster import Event
from finetune_operator.errors import ClusterError
from finetune_operator.kubernetes import events
from finetune_operator.kubernetes.events import TRIES, EventRecorder, manifest
from finetune_operator.observed import JobRef

REF = JobRef("team", "qa")


class Server:
    """Fails as often as it is told to."""

    def __init__(self, *errors: ClusterError) -> None:
        self.errors = list(errors)
        self.asked: list[str] = []
        self.sent: list[str] = []

    async def __call__(self, event: dict[str, Any]) -> None:
        self.asked.append(event["reason"])
        if self.errors:
            raise self.errors.pop(0)
        self.sent.append(event["reason"])


async def deliver(recorder: EventRecorder, *reasons: str) -> None:
    for reason in reasons:
        recorder.put(REF, "uid", Event("Normal", reason, f"it is {reason}"))
    running = asyncio.create_task(recorder.run())
    await recorder.flush(5)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_events_are_sent_in_order() -> None:
    server = Server()
    await deliver(EventRecorder(server), "A", "B", "C")
    assert server.sent == ["A", "B", "C"]


async def reaches(server: Server, sent: list[str]) -> None:
    async with asyncio.timeout(10):
        while server.sent != sent:
            await asyncio.sleep(0.01)


async def test_jobs_go_first_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(events, "PATIENCE_SECONDS", 300.0)
    server, busy = Server(), [True]
    recorder = EventRecorder(server)
    recorder.is_busy = lambda: busy[0]
    running = asyncio.create_task(recorder.run())
    recorder.put(REF, "uid", Event("Normal", "A", "a"))
    await asyncio.sleep(0.1)
    assert server.sent == []
    monkeypatch.setattr(events, "PATIENCE_SECONDS", 0.1)
    await reaches(server, ["A"])
    monkeypatch.setattr(events, "PATIENCE_SECONDS", 300.0)
    recorder.put(REF, "uid", Event("Normal", "B", "b"))
    await asyncio.sleep(0.1)
    assert server.sent == ["A"]
    busy[0] = False
    await reaches(server, ["A", "B"])
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_last_events_wait_for_nothing() -> None:
    server = Server()
    recorder = EventRecorder(server)
    recorder.is_busy = lambda: True
    async with asyncio.timeout(2):
        await deliver(recorder, "A", "B")
    assert server.sent == ["A", "B"]


@pytest.mark.parametrize(
    ("error", "asked", "sent"),
    [
        (ClusterError("no answer"), ["A", "A", "B"], ["A", "B"]),
        (ClusterError("busy", status=503), ["A", "A", "B"], ["A", "B"]),
        (ClusterError("slow down", status=429, retry_after=0.01), ["A", "A", "B"], ["A", "B"]),
        (ClusterError("the namespace is being deleted", status=403), ["A", "B"], ["B"]),
    ],
)
async def test_what_may_pass_is_tried_again(error: ClusterError, asked: list[str], sent: list[str]) -> None:
    server = Server(error)
    await deliver(EventRecorder(server, pause=0.0), "A", "B")
    assert (server.asked, server.sent) == (asked, sent)


async def test_one_that_cannot_be_sent_does_not_hold_the_others() -> None:
    server = Server(*[ClusterError("no answer") for _ in range(TRIES)])
    await deliver(EventRecorder(server, pause=0.0), "A", "B")
    assert server.asked == ["A"] * TRIES + ["B"]


@pytest.mark.parametrize("is_busy", [True, False])
async def test_the_one_in_hand_is_not_lost_when_sending_is_cancelled(is_busy: bool) -> None:
    began, sent = asyncio.Event(), []

    async def send(event: dict[str, Any]) -> None:
        if not began.is_set():
            began.set()
            await asyncio.Event().wait()
        sent.append(event["reason"])

    recorder = EventRecorder(send)
    recorder.is_busy = lambda: is_busy
    recorder.put(REF, "uid", Event("Normal", "A", "a"))
    running = asyncio.create_task(recorder.run())
    await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    began.set()
    await deliver(recorder, "B")
    assert sent == ["A", "B"]


async def test_the_oldest_go_when_too_many_wait(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    await deliver(EventRecorder(server, limit=2), "A", "B", "C")
    assert server.sent == ["B", "C"]
    assert "is let go" in caplog.text


async def test_an_end_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    recorder = EventRecorder(Server())
    recorder.put(REF, "uid", Event("Normal", "A", "never sent: nothing runs"))
    await recorder.flush(0.01)
    assert "1 events were not sent" in caplog.text


def test_the_same_event_has_the_same_name() -> None:
    first, again, other = (
        manifest(REF, uid, Event("Warning", "Preempted", "node gone"), now)
        for uid, now in (("1", 1.0), ("1", 2.0), ("2", 1.0))
    )
    assert first["metadata"] == again["metadata"]
    assert first["metadata"]["name"] != other["metadata"]["name"], "another job of this name"
    assert (first["metadata"]["namespace"], first["involvedObject"]["uid"]) == ("team", "1")
    assert len(manifest(REF, "1", Event("Normal", "A", "x" * 5000), 1.0)["message"]) == 1024
