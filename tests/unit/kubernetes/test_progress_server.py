"""Who may report what: every answer of the progress server, over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from finetune_operator import progress
from finetune_operator.constants import PROGRESS_AUDIENCE
from finetune_operator.kubernetes.token_review import caller_of
from finetune_operator.observed import JobRef, ProgressReport
from finetune_operator.progress import Caller, ProgressServer

BODY = {"trainerStatus": {"progressPercentage": 12, "metrics": [{"name": "loss", "value": "1.25"}]}}
MINE = Caller("team", "tune-1-master-0", "u1")


class Server:
    """A running progress server and what it was asked and told."""

    def __init__(self) -> None:
        self.reviews: list[str] = []
        self.accepted: list[tuple[JobRef, ProgressReport]] = []
        self.leads = True
        self.url = ""

    async def review(self, token: str) -> Caller | None:
        self.reviews.append(token)
        return {"good": MINE, "stranger": Caller("team", "web", "u9")}.get(token)

    def owner(self, caller: Caller) -> tuple[JobRef, int] | None:
        return (JobRef("team", "tune"), 1) if caller == MINE else None


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    running = Server()
    app = ProgressServer(
        running.review,
        running.owner,
        lambda ref, report: running.accepted.append((ref, report)),
        active=lambda: running.leads,
    ).application()
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    running.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    yield running
    await runner.cleanup()


async def post(server: Server, token: str | None, data: Any = None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    body = json.dumps(BODY) if data is None else data
    async with aiohttp.ClientSession() as session, session.post(server.url, data=body, headers=headers) as answer:
        return answer.status


async def test_a_pod_of_the_job_reports(server: Server) -> None:
    assert await post(server, "good") == 200
    ref, report = server.accepted[0]
    assert (ref, report.attempt, report.percent, report.metrics) == (JobRef("team", "tune"), 1, 12, {"loss": 1.25})


@pytest.mark.parametrize(
    ("token", "status"),
    [(None, 401), ("", 401), ("expired", 401), ("stranger", 403)],
)
async def test_others_do_not(server: Server, token: str | None, status: int) -> None:
    assert await post(server, token) == status
    assert server.accepted == []


@pytest.mark.parametrize(
    ("data", "status"),
    [("not json", 400), ("[]", 400), ('{"trainerStatus": 1}', 400), ("x" * 100_000, 413), ("[" * 60_000, 400)],
)
async def test_what_is_no_report_is_refused(server: Server, data: str, status: int) -> None:
    assert await post(server, "good", data) == status
    assert server.accepted == []


async def test_a_replica_that_does_not_lead_says_so(server: Server) -> None:
    server.leads = False
    assert await post(server, "good") == 503
    assert server.reviews == []


async def test_a_token_is_reviewed_once_a_minute(server: Server) -> None:
    assert [await post(server, "good") for _ in range(5)] == [200] * 5
    assert server.reviews == ["good"]


async def test_a_flood_of_tokens_is_forgotten(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_REVIEWS_KEPT", 3)
    for number in range(6):
        assert await post(server, f"bad-{number}") == 401
    await post(server, "bad-5")
    await post(server, "bad-0")
    assert server.reviews == [*(f"bad-{n}" for n in range(6)), "bad-0"]


async def test_a_slow_sender_is_cut_off(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_READ_SECONDS", 0.2)

    async def dribble() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(2)
        yield b"}"

    async with asyncio.timeout(1.5):
        assert await post(server, "good", dribble()) == 408


def status(**changes: Any) -> dict[str, Any]:
    user = {
        "username": "system:serviceaccount:team:default",
        "extra": {"authentication.kubernetes.io/pod-name": ["p"], "authentication.kubernetes.io/pod-uid": ["u"]},
    }
    return {"authenticated": True, "audiences": [PROGRESS_AUDIENCE], "user": user} | changes


@pytest.mark.parametrize(
    ("review", "caller"),
    [
        (status(), Caller("team", "p", "u")),
        (status(authenticated=False), None),
        (status(audiences=["https://kubernetes.default.svc"]), None),
        (status(audiences=None), None),
        (status(user={"username": "system:serviceaccount:team:default"}), None),
        (status(user=status()["user"] | {"username": "alice"}), None),
        ({}, None),
    ],
)
def test_only_a_pods_token_for_our_audience_names_a_caller(review: dict[str, Any], caller: Caller | None) -> None:
    assert caller_of(review) == caller
