"""What is measured: many jobs at once, all of them finishing, a restart, and a steady stream."""

from __future__ import annotations

import asyncio
import contextlib
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.operator import payload
from bench.operator.client import CONFIG_MAPS, JOBS, MERGE_PATCH, PODS, TRAININGS, Client, side_by_side
from bench.operator.process import Process, Usage

_REQUESTS = re.compile(r"^apiserver_request_total\{(?P<labels>.*)\} (?P<count>[\d.e+]+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Burst:
    """Jobs at once, and their end."""

    pending_seconds: float
    """From the first create until every status is Pending."""
    finished_seconds: float
    """From the first of their ends until every status is Succeeded."""
    usage: Usage
    requests: dict[str, int]
    """To the API server by verb and resource, those of the load taken away."""


@dataclass(frozen=True)
class Restart:
    """A new process with all jobs finished."""

    ready_seconds: float
    usage: Usage
    requests: dict[str, int]


@dataclass(frozen=True)
class Steady:
    """Create to PyTorchJob, in milliseconds."""

    p50: float
    p99: float


async def burst(client: Client, start: Callable[[], Process], count: int) -> Burst:
    """So many jobs at once, then all of them finishing, with one operator."""
    names = [f"burst-{index}" for index in range(count)]
    with start() as process:
        before = await requests(client)
        began = time.monotonic()
        waiting = asyncio.create_task(_all_reach(client, "Pending", count))
        await asyncio.sleep(0)
        await side_by_side(lambda name: client.request("POST", JOBS, payload.job(name)), names)
        pending = await waiting - began
        trainings, _ = await client.list(TRAININGS)
        while len(trainings) < count:
            await asyncio.sleep(0.2)
            trainings, _ = await client.list(TRAININGS)
        await side_by_side(lambda one: client.request("POST", PODS, payload.pod(one)), trainings)
        began = time.monotonic()
        waiting = asyncio.create_task(_all_reach(client, "Succeeded", count))
        await side_by_side(lambda name: _finish(client, name), names)
        finished = await waiting - began
        await asyncio.sleep(3)
        return Burst(pending, finished, process.usage(), _own(await requests(client), before, count))


async def restart(client: Client, start: Callable[[], Process]) -> Restart:
    """A new operator where everything is finished; it is watched for 15 s, in which it has nothing to do."""
    before = await requests(client)
    with start() as process:
        await asyncio.sleep(15)
        return Restart(process.ready_after, process.usage(), _difference(await requests(client), before))


async def steady(client: Client, start: Callable[[], Process], *, a_second: int, seconds: int) -> Steady:
    """Jobs one after the other; how long until the PyTorchJob of each is seen."""
    created: dict[str, float] = {}
    seen: dict[str, float] = {}
    _, version = await client.list(TRAININGS)

    async def follow() -> None:
        async for _, item in client.watch(TRAININGS, version):
            seen.setdefault(item["metadata"]["name"].removesuffix("-1"), time.monotonic())

    with start():
        following = asyncio.create_task(follow())
        posts = []
        began = time.monotonic()
        for index in range(a_second * seconds):
            await asyncio.sleep(max(0.0, began + index / a_second - time.monotonic()))
            name = f"steady-{index}"
            created[name] = time.monotonic()
            posts.append(asyncio.create_task(client.request("POST", JOBS, payload.job(name))))
        await asyncio.gather(*posts)
        while len(seen) < len(created):
            await asyncio.sleep(0.1)
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
    waits = sorted(1000 * (seen[name] - at) for name, at in created.items())
    return Steady(statistics.median(waits), waits[int(0.99 * len(waits))])


async def clear(client: Client) -> None:
    """Delete everything that a scenario made."""
    for path in (PODS, TRAININGS, CONFIG_MAPS, JOBS, "/api/v1/namespaces/default/events"):
        items, _ = await client.list(path)
        names = [item["metadata"]["name"] for item in items if item["metadata"]["name"] != "kube-root-ca.crt"]
        targets = [f"{path}/{name}?gracePeriodSeconds=0" for name in names]
        await side_by_side(partial(client.request, "DELETE"), targets)


async def _all_reach(client: Client, phase: str, count: int) -> float:
    """When the last of so many jobs reached a phase, or one that comes after it."""
    reached: set[str] = set()
    items, version = await client.list(JOBS)
    reached |= {one["metadata"]["name"] for one in items if (one.get("status") or {}).get("phase") == phase}
    async for _, item in client.watch(JOBS, version):
        if (item.get("status") or {}).get("phase") == phase:
            reached.add(item["metadata"]["name"])
        if len(reached) >= count:
            break
    return time.monotonic()


async def _finish(client: Client, name: str) -> None:
    """First the pod, as a kubelet tells it, then the PyTorchJob."""
    pod = payload.finished_pod(f"s3://models/bench/{name}")
    await client.request("PATCH", f"{PODS}/{name}-1-master-0/status", pod, content_type=MERGE_PATCH)
    done = payload.finished_training()
    await client.request("PATCH", f"{TRAININGS}/{name}-1/status", done, content_type=MERGE_PATCH)


async def requests(client: Client) -> Counter[str]:
    """What the API server has served so far: `verb resource/subresource` to a number."""
    found: Counter[str] = Counter()
    for match in _REQUESTS.finditer(await client.text("/metrics")):
        labels = dict(_LABEL.findall(match["labels"]))
        resource = "/".join(filter(None, (labels["resource"], labels["subresource"])))
        if resource.partition("/")[0] in _RESOURCES:
            found[f"{labels['verb']} {resource}"] += int(float(match["count"]))
    return found


_RESOURCES = frozenset({"finetunejobs", "pytorchjobs", "configmaps", "pods", "events", "leases"})


def _own(after: Counter[str], before: Counter[str], count: int) -> dict[str, int]:
    load = Counter(
        {
            "POST finetunejobs": count,
            "POST pods": count,
            "PATCH pods/status": count,
            "PATCH pytorchjobs/status": count,
        }
    )
    return _difference(after, before + load)


def _difference(after: Counter[str], before: Counter[str]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in sorted(after) if after[name] != before[name]}


def rows(result: Any) -> dict[str, float]:
    """A result as numbers for a table."""
    if isinstance(result, Steady):
        return {"p50 ms": result.p50, "p99 ms": result.p99}
    usage = {"CPU s": result.usage.cpu_seconds, "peak MiB": result.usage.peak_mib}
    if isinstance(result, Restart):
        return {"ready s": result.ready_seconds, **usage}
    return {"Pending s": result.pending_seconds, "Succeeded s": result.finished_seconds, **usage}
