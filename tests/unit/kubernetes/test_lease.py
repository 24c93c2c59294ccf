"""What an API server's refusals do to the replica that holds the Lease."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any, cast

import httpx2 as httpx
import pytest
from lightkube import ApiError, AsyncClient

from finetune_operator.kubernetes.lease import Lease, LeaseLost, LeaseTimes

TIMES = LeaseTimes(duration=0.6, renew=0.05, margin=0.2)


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


@pytest.mark.parametrize("status", [403, 500])
async def test_a_holder_that_is_refused_for_too_long_stops(status: int) -> None:
    server = Server(*[status] * 1000)
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(lease_of(server).hold(), 2)
    assert server.renewals == 0


async def test_missing_rights_are_an_error_for_one_that_never_held_it() -> None:
    with pytest.raises(ApiError):
        await lease_of(Server(*[403] * 1000)).acquire()
