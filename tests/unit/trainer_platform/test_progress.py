"""Progress reports: what goes over the wire, and that a run never waits for it."""

from __future__ import annotations

import itertools
import json
import logging
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.progress import HttpProgressReporter, ProgressReporter


@dataclass
class Server:
    """Takes reports as the operator does."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    answer: threading.Event = field(default_factory=threading.Event)

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 10
        while len(self.bodies) < count:
            assert time.monotonic() < deadline, f"{len(self.bodies)} of {count} reports came"
            time.sleep(0.01)

    def status_of(self, index: int) -> dict[str, Any]:
        status: dict[str, Any] = self.bodies[index]["trainerStatus"]
        return status

    def metrics_of(self, index: int) -> dict[str, str]:
        return {entry["name"]: entry["value"] for entry in self.status_of(index)["metrics"]}


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()
    state.answer.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            state.tokens.append(self.headers["Authorization"])
            state.times.append(time.monotonic())
            state.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            state.answer.wait(10)
            self.send_response(state.status)
            for name, value in state.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{listener.server_address[1]}/progress"
    yield state
    state.answer.set()
    listener.shutdown()
    listener.server_close()
    thread.join()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("first\n")
    return path


def reporter(server: Server, token: Path, interval: float = 0.0, timeout: float = 2.0) -> HttpProgressReporter:
    return HttpProgressReporter(
        server.url, token_path=token, ca_path=None, interval_seconds=interval, timeout_seconds=timeout
    )


def test_the_body_is_that_of_the_protocol(server: Server, token: Path) -> None:
    with reporter(server, token) as progress:
        progress.report(30, 120, {"loss": 1.25, "learning_rate": 2e-4}, 340.7)
        server.wait_for(1)
    assert server.tokens == ["Bearer first"]
    assert list(server.bodies[0]) == ["trainerStatus"]
    status = server.status_of(0)
    written = datetime.fromisoformat(status.pop("lastUpdatedTime"))
    assert abs((datetime.now(UTC) - written).total_seconds()) < 60
    assert status == {
        "progressPercentage": 25,
        "estimatedRemainingSeconds": 340,
        "metrics": [
            {"name": "loss", "value": "1.25"},
            {"name": "learning_rate", "value": "0.0002"},
            {"name": "step", "value": "30"},
            {"name": "total_steps", "value": "120"},
        ],
    }


@pytest.mark.parametrize(
    ("step", "total", "remaining", "percent", "seconds"),
    [
        (0, 100, None, 0, None),
        (100, 100, 0.0, 99, 0),
        (999, 1000, -5.0, 99, 0),
        (150, 100, math.inf, 99, None),
        (5, 0, math.nan, None, None),
    ],
)
def test_numbers_stay_within_their_bounds(
    server: Server,
    token: Path,
    step: int,
    total: int,
    remaining: float | None,
    percent: int | None,
    seconds: int | None,
) -> None:
    with reporter(server, token) as progress:
        progress.report(step, total, {"loss": math.nan, "grad_norm": math.inf, "epoch": 0.5}, remaining)
    status = server.status_of(0)
    assert status.get("progressPercentage") == percent
    assert status.get("estimatedRemainingSeconds") == seconds
    assert server.metrics_of(0) == {"epoch": "0.5", "step": str(step), "total_steps": str(total)}


def test_metrics_keep_their_last_value(server: Server, token: Path) -> None:
    with reporter(server, token) as progress:
        progress.report(1, 10, {"loss": 3.0, "eval_loss": 4.0})
        server.wait_for(1)
        progress.report(2, 10, {"loss": 2.0})
    assert server.metrics_of(-1) == {"loss": "2.0", "eval_loss": "4.0", "step": "2", "total_steps": "10"}


def test_only_the_newest_counts_and_the_last_is_always_sent(server: Server, token: Path) -> None:
    server.answer.clear()
    progress = reporter(server, token)
    progress.report(0, 1000, {})
    server.wait_for(1)
    started = time.monotonic()
    for step in range(1, 1000):
        progress.report(step, 1000, {"loss": float(step)})
    assert time.monotonic() - started < 5, "reporting does not wait for the server"
    server.answer.set()
    progress.close()
    assert [server.metrics_of(index)["step"] for index in range(len(server.bodies))] == ["0", "999"]


def test_at_most_one_request_in_an_interval(server: Server, token: Path) -> None:
    progress = reporter(server, token, interval=0.3)
    stop = time.monotonic() + 1.0
    step = 0
    while time.monotonic() < stop:
        step += 1
        progress.report(step, 10_000, {})
        time.sleep(0.01)
    times = list(server.times)
    progress.close()
    assert 2 <= len(times) <= 4
    assert all(later - earlier > 0.25 for earlier, later in itertools.pairwise(times))


def test_completion_is_a_hundred_percent(server: Server, token: Path) -> None:
    progress = reporter(server, token)
    progress.report(10, 10, {"loss": 0.5}, 0)
    progress.close(completed=True)
    progress.close()
    status = server.status_of(-1)
    assert (status["progressPercentage"], status["estimatedRemainingSeconds"]) == (100, 0)
    assert server.metrics_of(-1)["loss"] == "0.5"


def test_the_token_is_read_each_time(server: Server, token: Path) -> None:
    with reporter(server, token) as progress:
        progress.report(1, 10, {})
        server.wait_for(1)
        token.write_text("second")
        progress.report(2, 10, {})
        server.wait_for(2)
    assert server.tokens == ["Bearer first", "Bearer second"]


def test_a_token_is_never_sent_elsewhere(server: Server, token: Path) -> None:
    server.status, server.headers = 307, {"Location": server.url + "/elsewhere"}
    with reporter(server, token) as progress:
        progress.report(1, 10, {})
    assert len(server.bodies) == 1


def test_no_token_no_request(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in (tmp_path / "none", None):
        with HttpProgressReporter(server.url, token_path=path, ca_path=None) as progress:
            progress.report(1, 10, {})
    assert server.bodies == []
    assert "was not reported" in caplog.text


@pytest.mark.parametrize("status", [401, 500])
def test_failures_are_told_once_and_forgotten(
    server: Server, token: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    server.status = status
    with reporter(server, token) as progress:
        for step in range(3):
            progress.report(step, 10, {})
            server.wait_for(step + 1)
        server.status = 200
        progress.report(9, 10, {})
    assert server.metrics_of(-1)["step"] == "9"
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1


def test_a_server_that_hangs_delays_the_end_by_a_bounded_time(server: Server, token: Path) -> None:
    server.answer.clear()
    progress = reporter(server, token, timeout=0.3)
    progress.report(1, 10, {})
    server.wait_for(1)
    progress.report(2, 10, {})
    started = time.monotonic()
    progress.close(completed=True)
    assert time.monotonic() - started < 10


def test_from_env(
    monkeypatch: pytest.MonkeyPatch, server: Server, token: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("URL", "CA_CERT", "TOKEN"):
        monkeypatch.delenv(f"KUBEFLOW_TRAINER_SERVER_{name}", raising=False)
    silent = ProgressReporter.from_env()
    silent.report(1, 10, {})
    silent.close(completed=True)
    assert type(silent) is ProgressReporter

    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "file:///etc/passwd")
    assert type(ProgressReporter.from_env()) is ProgressReporter
    assert "not an http(s) address" in caplog.text

    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", server.url)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(token))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with ProgressReporter.from_env() as progress:
        progress.report(1, 10, {})
    assert len(server.bodies) == 1
