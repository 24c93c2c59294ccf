"""What the store learns from answers to calls that were made of something old."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import httpx2 as httpx
import pytest
from lightkube import ApiError, AsyncClient

from finetune_operator import constants as c
from finetune_operator import handlers
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
        self.named: dict[str, dict[str, Any]] = {}
        """What is there beside what is listed."""
        self.got: list[str] = []
        self._client = self

    def list(self, resource: Any, **asked: Any) -> Listing:
        self.asked = asked
        return Listing(*self.items)

    async def get(self, resource: Any, name: str, *, namespace: str) -> dict[str, Any]:
        self.got.append(name)
        if name not in self.named:
            request = httpx.Request("GET", "https://server/it")
            answer = httpx.Response(404, json={"code": 404, "message": "no"}, request=request)
            raise ApiError(request=request, response=answer)
        return self.named[name]

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


def attempt(version: int, **labels: str) -> dict[str, Any]:
    owner = {"apiVersion": c.API_VERSION, "kind": c.KIND, "name": "tune", "uid": "u1", "controller": True}
    meta = {"name": "tune-1", "namespace": "team", "uid": "a1", "resourceVersion": str(version)}
    return {"metadata": {**meta, "labels": labels, "ownerReferences": [owner]}}


LABELLED = {c.LABEL_JOB: "tune", c.LABEL_ATTEMPT: "1"}


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "of the status"])
async def test_an_attempt_is_not_gone_before_it_was_looked_for_by_its_name(
    is_known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store, client = WatchStore(), Client()
    client.named = {"tune-1": attempt(9)}
    store.put("FineTuneJob", job(5) | ({} if is_known else {"status": {"attempts": {"current": 1}}}))
    if is_known:
        store.put("PyTorchJob", attempt(6, **LABELLED))
        store.drop("PyTorchJob", attempt(9))
        store.put("PyTorchJob", attempt(6, **LABELLED), read_after=store.deletions("PyTorchJob"))
    await cluster_of(client, store).refresh(REF)
    observed = store.observe(REF)
    assert observed is not None
    assert [(one.number, one.owner_uid) for one in observed.attempts] == [(1, "u1")]
    assert client.got == ["tune-1"]
    assert "tune-1 has lost its label finetune.dev/job" in caplog.text


async def test_an_attempt_that_is_there_is_not_looked_for_and_one_that_is_gone_is_gone() -> None:
    store, client = WatchStore(), Client(attempt(9, **LABELLED))
    store.put("FineTuneJob", job(5) | {"status": {"attempts": {"current": 1}}})
    await cluster_of(client, store).refresh(REF)
    assert client.got == []
    client.items = ()
    await cluster_of(client, store).refresh(REF)
    observed = store.observe(REF)
    assert (client.got, observed and observed.attempts) == (["tune-1"], ())


async def test_children_are_listed_by_a_label_of_ours() -> None:
    client = Client()
    await cluster_of(client, WatchStore()).sync()
    assert client.asked["labels"].keys() == {c.LABEL_JOB} == {handlers.CHILDREN}


@pytest.mark.parametrize(("status", "was_there"), [(200, True), (404, False), (409, False)])
async def test_a_deletion_says_whether_there_was_anything(status: int, was_there: bool) -> None:
    target = ObjectRef(c.PYTORCHJOB_API_VERSION, c.PYTORCHJOB_KIND, "team", "tune-1", uid="u")
    assert await cluster_of(Client(deletes=status), WatchStore()).delete(target) is was_there


async def test_a_deletion_that_fails_is_an_error() -> None:
    target = ObjectRef(c.PYTORCHJOB_API_VERSION, c.PYTORCHJOB_KIND, "team", "tune-1", uid="u")
    with pytest.raises(ClusterError):
        await cluster_of(Client(deletes=500), WatchStore()).delete(target)
