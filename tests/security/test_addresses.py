"""Object stores at addresses where clouds hand out credentials: every spelling, every way there."""

from __future__ import annotations

import ipaddress
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.acceptance import accept
from finetune_operator.constants import Reason
from finetune_operator.errors import ModelConfigUnavailable
from finetune_operator.model_config import HubConfigReader
from finetune_operator.settings import Permissions, TrainerDefaults
from finetune_trainer.contract.addresses import endpoint_problem, is_metadata_host
from finetune_trainer.contract.config import S3Config
from finetune_trainer.errors import TrainerError, UsageError
from finetune_trainer.storage import ObjectStore, S3Uri, StoreLimits
from tests.builders import REF, observed_job, parsed_spec

REFUSED = [
    "http://169.254.169.254",
    "http://169.254.169.254:80/latest/meta-data/",
    "https://169.254.170.2/v2/credentials",
    "http://2852039166",
    "http://0xA9FEA9FE",
    "http://0xa9.0xfe.0xa9.0xfe",
    "http://0251.0376.0251.0376",
    "http://169.254.43518",
    "http://169.16689662",
    "http://169.254.169.254.",
    "http://\uff11\uff16\uff19.254.169.254",
    "http://169\u3002254\u3002169\u3002254",
    "http://[::ffff:169.254.169.254]",
    "http://[::ffff:a9fe:a9fe]",
    "http://[::169.254.169.254]",
    "http://[64:ff9b::a9fe:a9fe]",
    "http://[2002:a9fe:a9fe::1]",
    "http://[fd00:ec2::254]",
    "http://[fd00:0ec2:0:0:0:0:0:254]",
    "http://[fd20:ce::254]",
    "http://[fe80::1]",
    "http://[fe80::1%25eth0]",
    "http://100.100.100.200",
    "http://168.63.129.16",
    "http://metadata.google.internal",
    "http://METADATA.google.internal.:80",
    "http://metadata",
    "http://instance-data",
    "http://user:pw@s3.example",  # allow-secret: made up
    "http://169.254.169.254\\@s3.example",
    "http://s3.example\\@169.254.169.254",
    "http:///bucket",
    "http://s3.example:99999",
    "http://[::1",
]
ALLOWED = [
    "https://s3.eu-central-1.amazonaws.com",
    "http://minio.storage.svc.cluster.local:9000",
    "http://127.0.0.1:8333",
    "http://10.0.0.7:9000",
    "https://[2001:db8::1]:443/",
    "http://169.253.255.255",
    "http://169.255.0.0",
    "https://metadata.example",
]


@pytest.mark.parametrize("endpoint", REFUSED)
def test_an_endpoint_that_hands_out_credentials_is_not_permitted(endpoint: str) -> None:
    job = observed_job(output={"s3": {"endpoint": endpoint}})
    fact, spec = accept(job, Permissions(), TrainerDefaults())
    assert spec is None and fact.reason == Reason.NOT_PERMITTED
    assert fact.message.startswith("spec.output.s3.endpoint: ")


@pytest.mark.parametrize("endpoint", ALLOWED)
def test_other_endpoints_are(endpoint: str) -> None:
    assert accept(observed_job(output={"s3": {"endpoint": endpoint}}), Permissions(), TrainerDefaults())[1] is not None


def test_the_administrator_may_allow_it() -> None:
    job = observed_job(output={"s3": {"endpoint": "http://169.254.20.10:9000"}})
    assert accept(job, Permissions(), TrainerDefaults(s3_link_local=True))[1] is not None


@given(st.integers(0, 2**16 - 1), st.integers(0, 4), st.sampled_from([str, hex, lambda n: f"0{n:o}"]))
def test_every_link_local_address_in_every_spelling(low: int, parts: int, written: Any) -> None:
    address = (169 << 24 | 254 << 16) + low
    numbers = address.to_bytes(4, "big")
    head = [written(one) for one in numbers[: max(0, parts - 1)]]
    tail = int.from_bytes(numbers[max(0, parts - 1) :], "big")
    assert is_metadata_host(".".join([*head, written(tail)]))
    assert is_metadata_host(f"::ffff:{ipaddress.IPv4Address(address)}")


@given(st.text())
def test_any_text_has_an_answer(text: str) -> None:
    assert isinstance(endpoint_problem(text), str)
    assert is_metadata_host(text) in (True, False)


def resolving(monkeypatch: pytest.MonkeyPatch, host: str, address: str) -> None:
    """Let the resolver answer for a name."""
    real = socket.getaddrinfo

    def answer(name: Any, *args: Any, **kwargs: Any) -> Any:
        return real(address if name == host else name, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", answer)


@pytest.mark.parametrize("address", ["169.254.169.254", "fd00:ec2::254"])
def test_a_name_that_leads_there_is_refused_by_the_trainer(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    resolving(monkeypatch, "harmless.example", address)
    with pytest.raises(UsageError, match=r"harmless\.example.* leads to .*output\.s3\.endpoint"):
        ObjectStore(S3Config(endpoint="http://harmless.example:9000"))
    monkeypatch.setenv("FINETUNE_S3_LINK_LOCAL", "true")
    ObjectStore(S3Config(endpoint="http://harmless.example:9000"))


def test_the_trainer_does_not_take_it_from_the_environment_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://0xA9FEA9FE")
    with pytest.raises(UsageError, match="link-local"):
        ObjectStore(S3Config())


class Redirecting:
    """A server that sends everybody elsewhere, and one that must not be asked."""

    def __init__(self) -> None:
        self.status = 302
        self.location = ""
        self.body = b""
        self.elsewhere: list[str] = []
        outer = self

        class Sender(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(outer.status)
                self.send_header("Location", outer.location or f"http://127.0.0.1:{outer.target.server_port}/stolen")
                self.send_header("x-amz-bucket-region", "169.254.169.254/#")
                self.send_header("Content-Length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

            do_HEAD = do_PUT = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        class Target(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.elsewhere.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_HEAD = do_PUT = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Sender)
        self.target = ThreadingHTTPServer(("127.0.0.1", 0), Target)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def redirecting() -> Iterator[Redirecting]:
    serving = Redirecting()
    threads = [
        threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01})
        for one in (serving.server, serving.target)
    ]
    for thread in threads:
        thread.start()
    yield serving
    for one in (serving.server, serving.target):
        one.shutdown()
        one.server_close()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_an_object_store_cannot_send_the_trainer_elsewhere(
    redirecting: Redirecting, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    redirecting.status = status
    redirecting.body = b"<Error><Code>PermanentRedirect</Code><Endpoint>169.254.169.254</Endpoint></Error>"
    store = ObjectStore(S3Config(endpoint=redirecting.url), limits=StoreLimits(attempts=1, connect_seconds=2))
    with pytest.raises(TrainerError):
        store.get_bytes(S3Uri("bucket", "key"))
    assert redirecting.elsewhere == []


@pytest.mark.parametrize(
    "location",
    ["http://169.254.169.254/latest", "http://0xA9FEA9FE/", "http://[fd00:ec2::254]/", "ftp://x/y", "file:///"],
)
async def test_a_hub_cannot_send_the_operator_there(redirecting: Redirecting, location: str) -> None:
    redirecting.location = location
    with pytest.raises(ModelConfigUnavailable):
        await HubConfigReader({"HF_ENDPOINT": redirecting.url}, timeout=2.0)(REF, parsed_spec())


async def test_a_hub_may_keep_its_files_elsewhere(redirecting: Redirecting) -> None:
    assert await HubConfigReader({"HF_ENDPOINT": redirecting.url}, timeout=2.0)(REF, parsed_spec()) == json.loads("{}")
    assert redirecting.elsewhere == ["/stolen"]


@pytest.mark.parametrize("region", ["x.evil.example/#", "a/b", "..", "@evil", "eu\\evil", "a b"])
def test_a_region_is_no_way_to_another_host(region: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    with pytest.raises(UsageError):
        ObjectStore(S3Config(region=region))


@pytest.mark.parametrize(
    "uri",
    [
        "s3://169.254.169.254:80/x",
        "s3://b@169.254.169.254/x",
        "s3://B/x",
        "s3://b/../x",
        "s3://bucket/a//b",
        "http://x",
    ],
)
def test_an_s3_uri_names_a_bucket_and_a_key_and_nothing_else(uri: str) -> None:
    with pytest.raises(UsageError):
        S3Uri.parse(uri)
