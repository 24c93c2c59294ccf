"""Every line about a job says which, and about which attempt."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from finetune_operator import logs
from finetune_operator.errors import ClusterError
from finetune_operator.observed import JobRef
from finetune_operator.serving import listen, probes
from finetune_operator.workqueue import WorkQueue

A, B = JobRef("team", "a"), JobRef("team", "b")


class Lines(logging.Handler):
    """What would be written."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logs.JsonFormatter())
        self.all: list[dict[str, object]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append(json.loads(self.format(record)))


@pytest.fixture
def lines() -> Iterator[list[dict[str, object]]]:
    handler = Lines()
    logging.getLogger("finetune_operator").addHandler(handler)
    yield handler.all
    logging.getLogger("finetune_operator").removeHandler(handler)


async def test_lines_of_jobs_side_by_side(lines: list[dict[str, object]]) -> None:
    """Each its own, also those of what is called, and of a failure that ends the turn."""
    both = asyncio.Barrier(2)

    async def work(ref: JobRef) -> float | None:
        logs.note(uid=f"uid-{ref.name}")
        await both.wait()
        logs.note(attempt=1 if ref == A else 2)
        logging.getLogger("finetune_operator.kubernetes").warning("deep inside")
        raise ClusterError("the API server is away")

    queue = WorkQueue(work, parallel=2)
    queue.add(A)
    queue.add(B)
    running = asyncio.create_task(queue.run())
    while len(lines) < 4:
        await asyncio.sleep(0.01)
    running.cancel()
    said = {(one["job"], one["uid"], one["attempt"], one["level"]) for one in lines}
    assert said == {("team/a", "uid-a", 1, "warning"), ("team/b", "uid-b", 2, "warning")}
    assert sum("the API server is away" in str(one["message"]) for one in lines) == 2


def test_what_is_about_no_job_says_so(lines: list[dict[str, object]]) -> None:
    with logs.about("team/a"):
        logs.note(attempt=3)
    logs.note(attempt=4)
    logging.getLogger("finetune_operator").error("leadership lost", extra={"cause": "not renewed"})
    assert "job" not in lines[0] and "attempt" not in lines[0]
    assert (lines[0]["message"], lines[0]["cause"]) == ("leadership lost", "not renewed")


async def test_what_is_no_http_is_one_quiet_line(capsys: pytest.CaptureFixture[str]) -> None:
    """As a client of gRPC that dials the wrong port sends it."""
    before = logging.getLogger().handlers[:]
    server = await listen(probes(CollectorRegistry(), alive=bool, ready=bool), "127.0.0.1", 0, setting="PORT")
    try:
        logs.configure("json")
        reader, writer = await asyncio.open_connection(*server.addresses[0])
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        assert b" 400 Bad Request" in await reader.read()
        writer.close()
    finally:
        logging.getLogger().handlers[:] = before
        await server.cleanup()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (line,) = [line for line in lines if line["logger"] == "aiohttp.server"]
    assert line["level"] == "info" and "exception" not in line
    assert line["message"].startswith("Error handling request from 127.0.0.1; answered 400: ")
