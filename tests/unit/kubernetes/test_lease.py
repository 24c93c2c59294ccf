"""What an API server's refusals do to the replica that holds the Lease."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any, cast

import httpx2 as httpx
import pytest
from lightkube import ApiError, AsyncClient

from finetune_operator.kubernetes.lease import Lease, LeaseLost, LeaseTimes

TIMES = LeaseTimes(duration=0.6, renew=0.05, retry=0.05, margin=0.2)


class Server:
    """Keeps one Lease; refuses a request where it is given a status to refuse it with."""

    def __init__(self, *refusals: int) -> None:
        self.refusals: Iterator[int] = iter(refusals)
        self.renewals = 0
        self.lease: dict[str, Any] = {"metadata": {"resourceVersion": "1"}, "spec": {"holderIdentity": "me"}}

    async def get(self, *_: object, **__: object) -> dict[str, Any]:
        status = next(self.refusals, 200)
        if status != 200:
            request = httpx.Request("GET", "https://server/lease")
            body = {"kind": "Status", "apiVersion": "v1", "code": status, "message": "no"}
            raise ApiError(request=request, response=httpx.Response(status, json=body, request=request))
        return self.lease

    async def replace(self, lease: dict[str, Any]) -> None:
        self.lease = lease
        self.renewals += 1


def lease_of(server: Server) -> Lease:
    return Lease(cast(AsyncClient, server), namespace="system", name="lease", identity="me", times=TIMES)


@pytest.mark.parametrize("status", [401, 403, 409, 429, 500, 503])
async def test_a_holder_outlives_an_answer_of_a_server_that_has_just_started(status: int) -> None:
    server = Server(status, status)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(lease_of(server).hold(), 0.5)
    assert server.renewals >= 2


async def test_a_renewal_that_failed_is_tried_again_before_its_time() -> None:
    server = Server(503, 503)
    times = LeaseTimes(duration=1.2, renew=0.5, retry=0.05, margin=0.2)
    lease = Lease(cast(AsyncClient, server), namespace="system", name="lease", identity="me", times=times)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(lease.hold(), 0.9)
    assert server.renewals == 1


@pytest.mark.parametrize("status", [403, 500])
async def test_a_holder_that_is_refused_for_too_long_stops(status: int) -> None:
    server = Server(*[status] * 1000)
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(lease_of(server).hold(), 2)
    assert server.renewals == 0


async def test_missing_rights_are_an_error_for_one_that_never_held_it() -> None:
    with pytest.raises(ApiError):
        await lease_of(Server(*[403] * 1000)).acquire()


async def test_a_holder_that_finds_another_stops_at_once_and_says_who_it_is() -> None:
    """Its own record ran out while it stood still, and the other one's is new."""
    server = Server()
    server.lease["spec"]["holderIdentity"] = "other"
    with pytest.raises(LeaseLost, match="system/lease is held by other"):
        await asyncio.wait_for(lease_of(server).hold(), TIMES.renew * 4)
    assert server.renewals == 0


async def test_a_holder_takes_a_lease_that_was_let_go_again() -> None:
    server = Server()
    server.lease["spec"]["holderIdentity"] = ""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(lease_of(server).hold(), 0.3)
    assert server.lease["spec"]["holderIdentity"] == "me"


async def test_one_that_waits_takes_over_what_ran_out() -> None:
    server = Server()
    server.lease["spec"]["holderIdentity"] = "other"
    lease = lease_of(server)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(lease.acquire(), TIMES.duration / 2)
    await asyncio.wait_for(lease.acquire(), TIMES.duration * 2)
    assert server.lease["spec"] == {**server.lease["spec"], "holderIdentity": "me", "leaseTransitions": 1}


class Slow(Server):
    """Lets the first requests wait: reads until it is opened, writes for so many seconds."""

    def __init__(self, *refusals: int, hangs: int = 0, seconds: float = 0.0) -> None:
        super().__init__(*refusals)
        self.hangs, self.seconds = hangs, seconds
        self.opened = asyncio.Event()

    async def get(self, *_: object, **__: object) -> dict[str, Any]:
        if self.hangs:
            self.hangs -= 1
            await self.opened.wait()
        return await super().get()

    async def replace(self, lease: dict[str, Any]) -> None:
        if self.seconds:
            await asyncio.sleep(self.seconds)
        await super().replace(lease)


async def test_one_connection_that_hangs_does_not_cost_the_lease() -> None:
    server = Slow(hangs=1)
    times = LeaseTimes(duration=1.0, renew=0.05, retry=0.05, margin=0.2, answer=0.2)
    lease = Lease(cast(AsyncClient, server), namespace="system", name="lease", identity="me", times=times)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(lease.hold(), 1.2)
    assert server.renewals >= 1


def test_after_a_renewal_that_hangs_another_fits() -> None:
    times = LeaseTimes()
    left = times.duration - times.margin - times.renew
    assert left >= 2 * times.answer + times.retry


async def test_a_cancellation_that_comes_together_with_the_answer_is_not_lost() -> None:
    server = Slow(hangs=1)
    holding = asyncio.create_task(lease_of(server).hold())
    await asyncio.sleep(TIMES.renew * 2)
    assert server.hangs == 0
    server.opened.set()
    holding.cancel()
    done, _ = await asyncio.wait([holding], timeout=1)
    holding.cancel()
    assert done and holding.cancelled()


async def test_what_is_held_counts_from_before_it_was_asked_for() -> None:
    """The others count from when the server wrote the record, which its answer may tell much later."""
    server = Slow(200, *[503] * 1000, seconds=0.3)
    lease = lease_of(server)
    began = time.monotonic()
    await lease.acquire()
    with pytest.raises(LeaseLost):
        await lease.hold()
    assert time.monotonic() - began < TIMES.duration - TIMES.margin + 0.2


async def test_a_pause_does_not_outlast_what_is_held() -> None:
    times = LeaseTimes(duration=0.6, renew=5.0, retry=5.0, margin=0.4)
    lease = Lease(cast(AsyncClient, Server()), namespace="system", name="lease", identity="me", times=times)
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(lease.hold(), 2)
