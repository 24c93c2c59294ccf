"""What the store learns from answers to calls that were made of something old."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import httpx2 as httpx
import pytest
from lightkube import ApiError, AsyncClient

from finetune_operator import constants as c
from finetune_operator.cluster import ObjectRef
from finetune_operator.errors import ClusterError
from finetune_operator.kubernetes.cluster import KubernetesCluster
from finetune_operator.kubernetes.store import WatchStore
from finetune_operator.observed import JobRef

REF = JobRef("team", "tune")


class Listing:
    """One page, as lightkube gives it."""

    def __init__(self, *items: dict[str, Any]) -> None:
        self.items = items
        self.resourceVersion = "20"

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        for item in self.items:
            yield item


class Client:
    """Answers every list with the same page, and every deletion with a status; it is its own generic client."""

    def __init__(self, *items: dict[str, Any], deletes: int = 200) -> None:
        self.items = items
        self.deletes = deletes
        self.asked: dict[str, Any] = {}
        self._client = self

    def list(self, resource: Any, **asked: Any) -> Listing:
        self.asked = asked
        return Listing(*self.items)

    def prepare_request(self, *_: Any, **__: Any) -> Any:
        return httpx.Request("DELETE", "https://server/it")

    def build_adapter_request(self, request: Any) -> Any:
        return request

    async def send(self, request: Any) -> Any:
        return httpx.Response(self.deletes, json={"code": self.deletes, "message": "no"}, request=request)

    def raise_for_status(self, answer: Any) -> None:
        if answer.status_code >= 400:
            raise ApiError(request=answer.request, response=answer)


def job(version: int, name: str = "tune") -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "team", "uid": "u1", "resourceVersion": str(version)}, "spec": {}}


def cluster_of(client: Client, store: WatchStore) -> KubernetesCluster:
    return KubernetesCluster(cast(AsyncClient, client), store, namespaces=(), count=lambda verb, kind: None)


@pytest.mark.parametrize(("items", "found"), [((job(9),), "9"), ((), None)], ids=["changed", "gone"])
async def test_a_job_is_read_anew_and_no_other(items: tuple[dict[str, Any], ...], found: str | None) -> None:
    store, client = WatchStore(), Client(*items)
    store.put("FineTuneJob", job(5))
    store.put("FineTuneJob", job(5, name="other"))
    await cluster_of(client, store).reread(REF)
    known = store.job(REF)
    assert (known.resource_version if known else None) == found
    assert store.job(JobRef("team", "other")) is not None
    asked = client.asked
    assert (asked["namespace"], asked["fields"], asked["labels"]) == ("team", {"metadata.name": "tune"}, None)


@pytest.mark.parametrize(("status", "was_there"), [(200, True), (404, False), (409, False)])
async def test_a_deletion_says_whether_there_was_anything(status: int, was_there: bool) -> None:
    target = ObjectRef(c.PYTORCHJOB_API_VERSION, c.PYTORCHJOB_KIND, "team", "tune-1", uid="u")
    assert await cluster_of(Client(deletes=status), WatchStore()).delete(target) is was_there


async def test_a_deletion_that_fails_is_an_error() -> None:
    target = ObjectRef(c.PYTORCHJOB_API_VERSION, c.PYTORCHJOB_KIND, "team", "tune-1", uid="u")
    with pytest.raises(ClusterError):
        await cluster_of(Client(deletes=500), WatchStore()).delete(target)
