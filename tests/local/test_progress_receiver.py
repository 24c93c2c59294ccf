"""The progress receiver over real sockets."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator

import pytest

from finetune_operator.local.progress_receiver import ProgressReceiver, Reporter
from finetune_operator.observed import JobRef, ProgressReport
from finetune_operator.progress_protocol import MAX_BODY_BYTES

REF = JobRef("default", "job")
BODY = json.dumps({"trainerStatus": {"progressPercentage": 7}}).encode()


class Received:
    """A receiver and what came in."""

    def __init__(self) -> None:
        self.reports: list[tuple[JobRef, ProgressReport]] = []
        self.receiver = ProgressReceiver(lambda ref, report: self.reports.append((ref, report)), lambda: 9.0)

    async def post(self, body: bytes = BODY, *, token: str | None = None, method: str = "POST") -> int:
        def send() -> int:
            request = urllib.request.Request(f"{self.receiver.url}/any/path", data=body, method=method)
            if token is not None:
                request.add_header("Authorization", f"Bearer {token}")
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code

        return await asyncio.to_thread(send)

    async def raw(self, data: bytes) -> bytes:
        host, port = self.receiver.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        await writer.wait_closed()
        return answer


@pytest.fixture
async def received() -> AsyncIterator[Received]:
    found = Received()
    await found.receiver.start()
    yield found
    await found.receiver.stop()


async def test_a_report_counts_for_the_job_of_its_token(received: Received) -> None:
    other = received.receiver.token_for(Reporter(JobRef("default", "other"), 1))
    token = received.receiver.token_for(Reporter(REF, 3))
    assert token != other
    assert await received.post(token=token) == 200
    assert received.reports == [(REF, ProgressReport(received_at=9.0, attempt=3, percent=7))]


@pytest.mark.parametrize("token", [None, "", "wrong", "a" * 5000])
async def test_nobody_else_may_report(received: Received, token: str | None) -> None:
    received.receiver.token_for(Reporter(REF, 1))
    assert await received.post(token=token) == 401
    assert received.reports == []


async def test_what_is_wrong_is_answered(received: Received) -> None:
    token = received.receiver.token_for(Reporter(REF, 1))
    assert await received.post(b"{}", token=token) == 400
    assert await received.post(b"x" * (MAX_BODY_BYTES + 1), token=token) == 413
    assert await received.post(token=token, method="PUT") == 405
    assert received.reports == []


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", b"400"),
        (b"\x00\xff" * 20_000, b"400"),
        (b"POST / HTTP/1.1\r\n\r\n", b"401"),
        (b"POST / HTTP/1.1\r\nAuthorization: Bearer TOKEN\r\n\r\n", b"411"),
        (b"POST / HTTP/1.1\r\nAuthorization: Bearer TOKEN\r\nContent-Length: -1\r\n\r\n", b"411"),
        (b"POST / HTTP/1.1\r\nAuthorization: Bearer TOKEN\r\nContent-Length: 9999999999\r\n\r\n", b"413"),
        (b"POST / HTTP/1.1\r\nAuthorization: Bearer TOKEN\r\nContent-Length: 50\r\n\r\n{}", b"400"),
    ],
)
async def test_broken_requests_are_answered_and_the_next_one_is_served(
    received: Received, data: bytes, status: bytes
) -> None:
    token = received.receiver.token_for(Reporter(REF, 1))
    answer = await received.raw(data.replace(b"TOKEN", token.encode()))
    assert answer.split(b" ", 2)[1] == status
    assert await received.post(token=token) == 200
