"""A namespace that is gone or refused keeps none of the others from being read, and is read when it comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx2 as httpx
import pytest
from kopf._cogs.clients.errors import APIError
from lightkube import ApiError, AsyncClient

from finetune_operator.errors import ClusterError
from finetune_operator.kubernetes import cluster as cluster_module
from finetune_operator.kubernetes.cluster import FineTuneJobs, KubernetesCluster, Pods
from finetune_operator.kubernetes.store import WatchStore
from finetune_operator.observed import JobRef
from finetune_operator.syncing import Syncing
from tests.unit.kubernetes.test_watching import Kopf, until

A, B, C = JobRef("a", "tune"), JobRef("b", "tune"), JobRef("c", "tune")


class Server:
    """Namespaces with a job in each, and those whose lists are answered by an error."""

    def __init__(self, *namespaces: str) -> None:
        self.version = 10
        self.jobs = {name: 5 for name in namespaces}
        self.errors: dict[str, int] = {}
        self.of_pods_only = False
        self.asked: list[str] = []

    def list(self, resource: Any, *, namespace: str, **_: Any) -> Listing:
        self.version += 10
        if resource is FineTuneJobs:
            self.asked.append(namespace)
        status = self.errors.get(namespace, 0) if resource is Pods or not self.of_pods_only else 0
        found = [namespace] if resource is FineTuneJobs and namespace in self.jobs else []
        return Listing([job(name, self.jobs[name]) for name in found], self.version, status)


class Listing:
    def __init__(self, items: list[dict[str, Any]], version: int, status: int) -> None:
        self._items, self._status = items, status
        self.resourceVersion = str(version)

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        if self._status:
            request = httpx.Request("GET", "https://server/it")
            answer = httpx.Response(self._status, json={"code": self._status, "message": "no"}, request=request)
            raise ApiError(request=request, response=answer)
        for item in self._items:
            yield item


def job(namespace: str, version: int) -> dict[str, Any]:
    meta = {"name": "tune", "namespace": namespace, "uid": f"u-{namespace}", "resourceVersion": str(version)}
    return {"metadata": meta, "spec": {}}


class Case:
    """A cluster that works in some namespaces, and what was told of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *namespaces: str) -> None:
        monkeypatch.setattr(cluster_module, "_LIST_PAUSES", (0.0,))
        self.server = Server(*namespaces)
        self.store = WatchStore()
        client = cast(AsyncClient, self.server)
        self.cluster = KubernetesCluster(client, self.store, namespaces=namespaces, count=lambda verb, kind: None)
        self.told: list[tuple[str, bool]] = []
        self.cluster.namespaces.on_change = lambda name, readable: self.told.append((name, readable))


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(monkeypatch, "a", "b", "c")


async def test_a_resync_of_one_namespace_forgets_nothing_of_another(case: Case) -> None:
    for _ in range(2):
        await case.cluster.sync()
        assert sorted(case.store.jobs()) == [A, B, C]
    del case.server.jobs["b"]
    await case.cluster.sync()
    assert sorted(case.store.jobs()) == [A, C]


@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize("of_pods_only", [False, True])
async def test_one_that_is_refused_is_left_as_it_was_and_the_others_go_on(
    case: Case, status: int, of_pods_only: bool, caplog: pytest.LogCaptureFixture
) -> None:
    await case.cluster.sync()
    case.server.errors, case.server.of_pods_only = {"b": status}, of_pods_only
    case.server.jobs.update(a=105, c=205)
    for _ in range(3):
        await case.cluster.sync()
    assert sorted(case.store.jobs()) == [A, B, C]
    assert [one and one.resource_version for one in map(case.store.job, (A, C))] == ["105", "205"]
    assert caplog.text.count("namespace b of FINETUNE_WATCH_NAMESPACES cannot be read") == 1
    assert case.told == [("b", False)]
    assert case.cluster.namespaces.watchable() == ("a", "c")


async def test_one_that_comes_back_is_brought_up_to_date(case: Case) -> None:
    case.server.errors = {"b": 403}
    await case.cluster.sync()
    assert sorted(case.store.jobs()) == [A, C]
    assert await case.cluster.sync_refused() == set()
    case.server.errors, case.server.jobs["b"], case.server.asked = {}, 7, []
    assert await case.cluster.sync_refused() == {B}
    assert case.server.asked == ["b"], "the others are left alone"
    assert case.told == [("b", False), ("b", True)]
    assert case.cluster.namespaces.watchable() == ("a", "b", "c")
    assert await case.cluster.sync_refused() == set()


async def test_one_that_is_refused_already_is_not_asked_twice(case: Case) -> None:
    case.server.errors = {"b": 403}
    await case.cluster.sync()
    case.server.asked = []
    await case.cluster.sync()
    assert case.server.asked.count("b") == 1


async def test_all_of_them_are_an_error(case: Case) -> None:
    case.server.errors = {"a": 403, "b": 404, "c": 403}
    with pytest.raises(ClusterError):
        await case.cluster.sync()
    assert case.cluster.namespaces.watchable() == ("a", "b", "c"), "none would mean all"


async def test_other_errors_are_errors(case: Case) -> None:
    case.server.errors = {"b": 503}
    with pytest.raises(ClusterError):
        await case.cluster.sync()
    assert case.told == []


async def test_without_namespaces_a_refusal_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    case.server.errors = {"*": 403}
    with pytest.raises(ClusterError):
        await case.cluster.sync()
    assert (case.told, case.cluster.namespaces.watchable()) == ([], ())


class Lists:
    """Counts what is listed."""

    def __init__(self) -> None:
        self.full = self.partly = 0

    async def sync(self) -> set[JobRef]:
        self.full += 1
        return set()

    async def sync_refused(self) -> set[JobRef]:
        self.partly += 1
        return {B}


async def test_what_is_refused_is_looked_for_between_resyncs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_operator.syncing.LOOK_SECONDS", 0.01)
    lists, added = Lists(), list[JobRef]()
    syncing = Syncing(lists, lambda: [A], added.append, seconds=3600)
    running = asyncio.create_task(syncing.run())
    await until(lambda: lists.partly > 2)
    assert (lists.full, set(added)) == (0, {B})
    syncing.soon()
    await until(lambda: lists.full == 1 and A in added)
    await asyncio.sleep(0.05)
    assert lists.full == 1, "once"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_resyncs_come_in_time_whatever_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_operator.syncing.LOOK_SECONDS", 0.01)
    lists, added = Lists(), list[JobRef]()
    running = asyncio.create_task(Syncing(lists, lambda: [A], added.append, seconds=0.1).run())
    await until(lambda: lists.full > 2 and A in added)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize(
    ("status", "names", "asks"), [(403, ("a", "b"), 1), (404, ("a", "b"), 1), (500, ("a", "b"), 0), (403, (), 0)]
)
async def test_watches_that_end_by_a_refusal_ask_for_a_look(
    monkeypatch: pytest.MonkeyPatch, status: int, names: tuple[str, ...], asks: int
) -> None:
    """kopf gives all of them up for one; the lists tell which one it is."""
    from finetune_operator import watching

    def refused() -> None:
        raise APIError({"message": "no"}, status=status, headers={})

    watched: list[Any] = []
    ends = Kopf(refused)

    async def operator(*, namespaces: Any, **given: Any) -> None:
        watched.append(tuple(namespaces))
        await ends(**given)

    monkeypatch.setattr(watching.kopf, "operator", operator)
    monkeypatch.setattr(watching, "PAUSE_SECONDS", 0.01)
    asked: list[None] = []
    left = list(names)

    def on_refused() -> None:
        asked.append(None)
        left.remove("b")

    watches = watching.Watching(lambda *event: None, lambda: tuple(left), on_refused=on_refused)
    running = asyncio.create_task(watches.run())
    await until(lambda: len(watched) == 2)
    assert (len(asked), watched[1]) == (asks, ("a",) if asks else names)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
