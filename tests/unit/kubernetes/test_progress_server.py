"""Who may report what: every answer of the progress server, over a real socket."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from finetune_operator import connections, progress
from finetune_operator.claims import MAX_TOKEN_LENGTH, Caller, claimed_caller
from finetune_operator.constants import PROGRESS_AUDIENCE
from finetune_operator.errors import AttemptEnded, ReviewFailed
from finetune_operator.kubernetes.token_review import caller_of
from finetune_operator.observed import JobRef, ProgressReport
from finetune_operator.progress import ProgressServer

BODY = {"trainerStatus": {"progressPercentage": 12, "metrics": [{"name": "loss", "value": "1.25"}]}}
MINE = Caller("team", "tune-1-master-0", "u1")
STRANGER = Caller("team", "web", "u9")
ENDED = Caller("team", "tune-0-master-0", "u0")
NOW = 1_800_000_000
GOOD_UNTIL = 4_102_444_800
"""The year 2100. Fixed, as tests are known by their parameters."""


def token(caller: Caller = MINE, signature: str = "good", **changes: Any) -> str:
    """As the API server makes them."""
    pod = {"namespace": caller.namespace, "pod": {"name": caller.pod, "uid": caller.pod_uid}}
    claims = {"aud": [PROGRESS_AUDIENCE], "exp": GOOD_UNTIL, "kubernetes.io": pod, **changes}
    middle = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"e30.{middle}.{signature}"


class Server:
    """A running progress server and what it was asked and told."""

    def __init__(self) -> None:
        self.reviews: list[str] = []
        self.accepted: list[tuple[JobRef, ProgressReport]] = []
        self.leads = True
        self.has_job = True
        self.url = ""
        self.runner: web.AppRunner

    async def review(self, token: str) -> Caller | None:
        """What is signed so is good, or another pod's, or cannot be told."""
        signature = token.rpartition(".")[2]
        self.reviews.append(signature)
        if signature == "unknown":
            raise ReviewFailed("the API server did not say whose token this is")
        return {"good": MINE, "another": Caller("team", "tune-1-worker-0", "u2")}.get(signature)

    def owner(self, caller: Caller) -> tuple[JobRef, int] | None:
        if caller == ENDED:
            raise AttemptEnded("the attempt has ended")
        return (JobRef("team", "tune"), 1) if caller == MINE and self.has_job else None


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
    running.runner = runner
    yield running
    await runner.cleanup()


async def post(server: Server, bearer: str | None, data: Any = None) -> int:
    headers = {} if bearer is None else {"Authorization": f"Bearer {bearer}"}
    body = json.dumps(BODY) if data is None else data
    async with aiohttp.ClientSession() as session, session.post(server.url, data=body, headers=headers) as answer:
        return answer.status


async def test_a_pod_of_the_job_reports(server: Server) -> None:
    assert await post(server, token()) == 200
    ref, report = server.accepted[0]
    assert (ref, report.attempt, report.percent, report.metrics) == (JobRef("team", "tune"), 1, 12, {"loss": 1.25})


@pytest.mark.parametrize(
    ("bearer", "status", "reviews"),
    [
        (None, 401, []),
        ("", 401, []),
        ("garbage", 401, []),
        (token(aud=["https://kubernetes.default.svc"]), 401, []),
        (token(exp=1_700_000_000), 401, []),
        (token(STRANGER), 403, []),
        (token(ENDED), 410, []),
        (token(signature="forged"), 401, ["forged"]),
        (token(signature="another"), 401, ["another"]),
        (token(signature="unknown"), 503, ["unknown"]),
    ],
)
async def test_others_do_not(server: Server, bearer: str | None, status: int, reviews: list[str]) -> None:
    assert await post(server, bearer) == status
    assert server.accepted == []
    assert server.reviews == reviews, "what cannot be right costs no request"


async def test_a_job_that_goes_while_its_report_is_read_has_none(server: Server) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b'{"trainerStatus":'
        while not server.reviews:
            await asyncio.sleep(0.01)
        server.has_job = False
        yield b"{}}"

    assert await post(server, token(), body()) == 410
    assert server.accepted == []


async def test_what_could_not_be_told_is_asked_again(server: Server) -> None:
    assert [await post(server, token(signature="unknown")) for _ in range(2)] == [503, 503]
    assert server.reviews == ["unknown"] * 2


@pytest.mark.parametrize(
    ("data", "status"),
    [("not json", 400), ("[]", 400), ('{"trainerStatus": 1}', 400), ("x" * 100_000, 413), ("[" * 60_000, 400)],
)
async def test_what_is_no_report_is_refused(server: Server, data: str, status: int) -> None:
    assert await post(server, token(), data) == status
    assert server.accepted == []


async def test_a_replica_that_does_not_lead_says_so(server: Server) -> None:
    server.leads = False
    assert await post(server, token()) == 503
    assert server.reviews == []


async def test_a_token_is_reviewed_once_a_minute(server: Server) -> None:
    assert [await post(server, token()) for _ in range(5)] == [200] * 5
    assert server.reviews == ["good"]


async def test_a_flood_of_tokens_is_forgotten(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_REVIEWS_KEPT", 3)
    for number in range(6):
        assert await post(server, token(signature=f"bad-{number}")) == 401
    await post(server, token(signature="bad-5"))
    await post(server, token(signature="bad-0"))
    assert server.reviews == [*(f"bad-{n}" for n in range(6)), "bad-0"]


async def test_a_slow_sender_is_cut_off(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_READ_SECONDS", 0.2)

    async def dribble() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(2)
        yield b"}"

    async with asyncio.timeout(1.5):
        assert await post(server, token(), dribble()) == 408


@pytest.mark.parametrize(("most", "seconds"), [(256, 0.2), (3, 60.0)], ids=["too old", "too many"])
async def test_connections_that_say_nothing_are_cut_off(
    server: Server, monkeypatch: pytest.MonkeyPatch, most: int, seconds: float
) -> None:
    monkeypatch.setattr(connections, "_LOOK_SECONDS", 0.05)
    bounded = asyncio.create_task(connections.bound(server.runner, most=most, seconds=seconds))
    port = server.runner.addresses[0][1]
    silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
    for _, writer in silent:
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\n")
    expected = 8 if most == 256 else 5
    async with asyncio.timeout(5):
        ended = [asyncio.ensure_future(reader.read()) for reader, _ in silent]
        while sum(one.done() for one in ended) < expected:
            await asyncio.sleep(0.05)
    assert await post(server, token()) == 200
    bounded.cancel()
    assert [one.done() for one in ended][:expected] == [True] * expected, "the oldest first"
    for one, (_, writer) in zip(ended, silent, strict=True):
        one.cancel()
        writer.close()


async def test_no_connection_is_kept_for_the_next_report(server: Server) -> None:
    headers = {"Authorization": f"Bearer {token()}"}
    async with aiohttp.ClientSession() as session, session.post(server.url, json=BODY, headers=headers) as answer:
        assert answer.headers["Connection"] == "close"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a.b",
        "a.!.c",
        "a." + base64.urlsafe_b64encode(b"[]").decode() + ".c",
        "a." + base64.urlsafe_b64encode(b"[" * 5000).decode() + ".c",
        token(exp=None),
        token(exp="soon"),
        token(aud=None),
        token(**{"kubernetes.io": None}),
        token(**{"kubernetes.io": {"namespace": "team", "pod": {"name": "p"}}}),
        token(**{"kubernetes.io": {"namespace": 7, "pod": {"name": "p", "uid": "u"}}}),
        token(signature="x" * MAX_TOKEN_LENGTH),
    ],
)
def test_what_is_no_token_of_a_pod_claims_nothing(text: str) -> None:
    assert claimed_caller(text, PROGRESS_AUDIENCE, NOW) is None


@pytest.mark.parametrize("audience", [PROGRESS_AUDIENCE, [PROGRESS_AUDIENCE, "other"]])
def test_a_pods_token_names_it(audience: Any) -> None:
    assert claimed_caller(token(aud=audience), PROGRESS_AUDIENCE, NOW) == MINE


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
