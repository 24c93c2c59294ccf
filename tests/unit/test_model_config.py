"""Reading config.json from a hub: what is asked, what is kept, and what a bad answer becomes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.errors import ModelConfigUnavailable
from finetune_operator.model_config import MAX_BYTES, HubConfigReader
from finetune_operator.observed import JobRef

REF = JobRef("default", "job")
CONFIG = {"model_type": "llama", "hidden_size": 64}


def spec(uri: str = "hf://org/model", revision: str | None = None) -> FineTuneJobSpec:
    model = {"uri": uri, **({"revision": revision} if revision else {})}
    return FineTuneJobSpec.model_validate(
        {"model": model, "dataset": {"uri": "s3://data/x"}, "output": {"uri": "s3://models/x"}}
    )


class Hub:
    """A server on the loopback address that answers by path and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.answer: Callable[[BaseHTTPRequestHandler], None] = lambda handler: reply(handler, 200, CONFIG)
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append((self.path, self.headers.get("Authorization")))
                hub.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def reader(self, **environ: str) -> HubConfigReader:
        return HubConfigReader({"HF_ENDPOINT": f"{self.url}/", **environ}, timeout=2.0)


def reply(handler: BaseHTTPRequestHandler, status: int, body: Any, location: str = "") -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    if location:
        handler.send_header("Location", location)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Hub]:
    serving = Hub()
    thread = threading.Thread(target=serving.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield serving
    serving.server.shutdown()
    serving.server.server_close()
    thread.join()


async def problem(reader: HubConfigReader, job: FineTuneJobSpec | None = None) -> str:
    with pytest.raises(ModelConfigUnavailable) as caught:
        await reader(REF, job or spec())
    return str(caught.value)


@pytest.mark.parametrize(
    ("uri", "revision", "path"),
    [
        ("hf://org/model", None, "/org/model/resolve/main/config.json"),
        ("hf://org/model-1.5_b", "refs/pr/3", "/org/model-1.5_b/resolve/refs%2Fpr%2F3/config.json"),
        ("hf://gpt2", "v1", "/gpt2/resolve/v1/config.json"),
    ],
)
async def test_the_file_is_asked_for_by_name_and_revision(hub: Hub, uri: str, revision: str | None, path: str) -> None:
    assert await hub.reader()(REF, spec(uri, revision)) == CONFIG
    assert hub.asked == [(path, None)]


async def test_answers_are_kept_for_an_hour_and_failures_for_a_minute(hub: Hub) -> None:
    now = [0.0]
    reader = HubConfigReader({"HF_ENDPOINT": hub.url}, timeout=2.0, clock=lambda: now[0])
    for _ in range(3):
        await reader(REF, spec())
    assert len(hub.asked) == 1
    await reader(REF, spec(revision="other"))
    assert len(hub.asked) == 2
    hub.answer = lambda handler: reply(handler, 503, b"")
    now[0] = 3599.0
    await reader(REF, spec())
    now[0] = 3601.0
    assert "HTTP 503" in await problem(reader)
    assert "HTTP 503" in await problem(reader)
    assert len(hub.asked) == 3
    hub.answer = lambda handler: reply(handler, 200, CONFIG)
    now[0] = 3662.0
    assert await reader(REF, spec()) == CONFIG


async def test_the_cache_is_bounded(hub: Hub) -> None:
    reader = hub.reader()
    for number in range(300):
        await reader(REF, spec(f"hf://org/m{number}"))
    await reader(REF, spec("hf://org/m299"))
    assert len(hub.asked) == 300
    await reader(REF, spec("hf://org/m0"))
    assert len(hub.asked) == 301


async def test_a_token_goes_to_the_hub_and_not_where_it_redirects(hub: Hub) -> None:
    def redirect(handler: BaseHTTPRequestHandler) -> None:
        if handler.path.startswith("/org/"):
            reply(handler, 307, b"", location="/elsewhere/config.json")
        else:
            reply(handler, 200, CONFIG)

    hub.answer = redirect
    assert await hub.reader(HF_TOKEN="secret")(REF, spec()) == CONFIG
    assert hub.asked == [("/org/model/resolve/main/config.json", "Bearer secret"), ("/elsewhere/config.json", None)]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, b"", "HTTP 401: it is private or gated, or does not exist"),
        (403, b"", "HTTP 403: it is private or gated"),
        (404, b"", "HTTP 404: there is no such model or revision, or it has no config.json"),
        (500, b"", "HTTP 500"),
        (200, b"<html>", "not JSON: "),
        (200, b"[1]", "not a JSON object"),
        (200, b"[" * 100_000, "not JSON: "),
        (200, b" " * (MAX_BYTES + 1), "larger than 1 MiB"),
    ],
    ids=["401", "403", "404", "500", "html", "list", "deep", "large"],
)
async def test_a_bad_answer_is_explained(hub: Hub, status: int, body: bytes, words: str) -> None:
    hub.answer = lambda handler: reply(handler, status, body)
    message = await problem(hub.reader())
    assert message.startswith("spec.model.uri: hf://org/model: ")
    assert words in message
    assert f"{hub.url}/org/model/resolve/main/config.json" in message


async def test_a_token_that_is_refused_is_said_to_be(hub: Hub) -> None:
    hub.answer = lambda handler: reply(handler, 403, b"")
    message = await problem(hub.reader(HF_TOKEN="secret"))
    assert "the operator's token may not see it" in message
    assert "secret" not in message


async def test_a_server_that_drips_is_given_up(hub: Hub) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(1000):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.02)
        except OSError:
            return

    hub.answer = drip
    reader = HubConfigReader({"HF_ENDPOINT": hub.url}, timeout=0.3)
    began = time.monotonic()
    assert "not complete after 0.3 s" in await problem(reader)
    assert time.monotonic() - began < 10


async def test_a_hub_of_many_addresses_is_given_up_in_time_and_holds_up_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """urllib gives every address of a host its own time."""
    freed, readers = threading.Event(), []

    def one_after_the_other(url: str) -> bytes:
        readers.append(threading.current_thread())
        freed.wait(30)
        return b"{}"

    reader = HubConfigReader({}, timeout=0.1)
    monkeypatch.setattr(reader, "_download", one_after_the_other)
    began = time.monotonic()
    assert "not complete after 0.1 s" in await problem(reader)
    assert "not complete after 0.1 s" in await problem(reader)
    assert time.monotonic() - began < 5
    freed.set()
    assert [thread.daemon for thread in readers] == [True], "asked once, by a thread that the interpreter leaves behind"
    readers[0].join(5)


async def test_a_hub_that_does_not_answer_is_unavailable() -> None:
    assert "no answer: " in await problem(HubConfigReader({"HF_ENDPOINT": "http://127.0.0.1:1"}, timeout=1.0))
    assert "HF_ENDPOINT is not an http(s) address" in await problem(HubConfigReader({"HF_ENDPOINT": "file:///etc"}))
    assert "HF_HUB_OFFLINE is set" in await problem(HubConfigReader({"HF_HUB_OFFLINE": "1"}))


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://bucket/model", "is not read by the operator, only by the trainer"),
        ("pvc://claim/model", "is not read by the operator"),
        ("file:///etc", "is not read by the operator"),
        ("hf://../../etc", "is no name of a model"),
        ("hf://org/model/../../x", "is no name of a model"),
        ("hf://org/model?x=1", "is no name of a model"),
    ],
)
async def test_nothing_else_is_asked_for(hub: Hub, uri: str, words: str) -> None:
    assert words in await problem(hub.reader(), spec(uri))
    assert hub.asked == []
