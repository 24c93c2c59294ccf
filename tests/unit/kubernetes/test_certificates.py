"""The progress server's own certificate: who trusts it, when it is renewed, and what a renewal must not break."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from finetune_operator.certificate_protocol import Bundle, Made, Request
from finetune_operator.certificates import AUTHORITY_LIFE, CERTIFICATE_LIFE, make
from finetune_operator.errors import ClusterError
from finetune_operator.kubernetes import certificate_secret

NOW = datetime.now(UTC).timestamp()
HOSTS = ("localhost",)
DAY = 86_400.0
EMPTY = Bundle()


def made(bundle: Bundle = EMPTY, *, days: float = 0, hosts: tuple[str, ...] = HOSTS) -> Made:
    """What is served `days` from now."""
    return make(Request(now=NOW + days * DAY, hosts=hosts, bundle=bundle))


def handshake(folder: Path, served: Bundle, ca: str, host: str = "localhost") -> None:
    """A TLS handshake as a trainer's; raises ssl.SSLError where it does not trust the server."""
    path = folder / "server.pem"
    path.write_text(served.key + served.certificate)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(path)
    client = ssl.create_default_context(cadata=ca)
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # Python 3.13 does so by itself
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except ssl.SSLError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(ours, server_hostname=host).close()
    finally:
        ours.close()
        thread.join()


def test_a_strict_client_trusts_it(tmp_path: Path) -> None:
    first = made()
    handshake(tmp_path, first.bundle, first.bundle.ca)
    with pytest.raises(ssl.SSLError, match="Hostname mismatch"):
        handshake(tmp_path, first.bundle, first.bundle.ca, "other.svc")
    with pytest.raises(ssl.SSLError, match="verify failed"):
        handshake(tmp_path, first.bundle, made().bundle.ca)


def test_an_address_is_a_name_too(tmp_path: Path) -> None:
    bundle = made(hosts=("127.0.0.1",)).bundle
    handshake(tmp_path, bundle, bundle.ca, "127.0.0.1")


@pytest.mark.parametrize(
    ("days", "hosts", "kept"),
    [
        (0, HOSTS, True),
        (59.9, HOSTS, True),
        (60.1, HOSTS, False),
        (91, HOSTS, False),
        (0, ("other.svc",), False),
        (0, (*HOSTS, "other.svc"), False),
    ],
)
def test_when_it_is_renewed(tmp_path: Path, days: float, hosts: tuple[str, ...], kept: bool) -> None:
    before = made()
    after = made(before.bundle, days=days, hosts=hosts)
    assert (after.bundle == before.bundle) is kept
    assert after.bundle.ca == before.bundle.ca and after.bundle.ca_key == before.bundle.ca_key
    assert (after.bundle.key == before.bundle.key) is kept, "a new certificate has a new key"
    if days == 0:
        handshake(tmp_path, after.bundle, before.bundle.ca, hosts[-1])


def test_times_that_it_names() -> None:
    life = CERTIFICATE_LIFE.total_seconds()
    first = made()
    assert first.expires_at == pytest.approx(NOW + life, abs=2)
    assert first.renew_at == pytest.approx(NOW + life * 2 / 3, abs=2)


def test_a_renewed_authority_is_trusted_by_those_who_know_the_old_one(tmp_path: Path) -> None:
    life = AUTHORITY_LIFE.total_seconds() / DAY
    old = made(days=-life * 0.7).bundle
    new = made(old).bundle
    assert new.ca != old.ca and new.ca_key == old.ca_key
    left = x509.load_pem_x509_certificate(new.ca.encode()).not_valid_after_utc.timestamp() - NOW
    assert left == pytest.approx(life * DAY, abs=2)
    for ca in (old.ca, new.ca):
        handshake(tmp_path, new, ca)


@pytest.mark.parametrize("part", ["ca", "ca_key", "certificate", "key"])
def test_parts_that_do_not_belong_together_are_made_anew(tmp_path: Path, part: str) -> None:
    first, other = made().bundle, made().bundle
    for value in (getattr(other, part), "", "-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n"):
        after = made(first.model_copy(update={part: value})).bundle
        assert (after.ca == first.ca) is (part in ("certificate", "key")), "pods trust it: it stays where it can"
        assert after.certificate != first.certificate
        handshake(tmp_path, after, after.ca)


def test_as_a_process() -> None:
    request = Request(now=NOW, hosts=HOSTS)
    program = [sys.executable, "-m", "finetune_operator.certificates"]
    done = subprocess.run(program, input=request.to_json(), capture_output=True, text=True, timeout=60, check=True)
    first = Made.model_validate_json(done.stdout)
    assert made(first.bundle).bundle == first.bundle
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (("sleep", "60"), "within 1 s"),
        (("false",), "ended with 1"),
        (("echo", "{}"), "answered"),
        (("/not/there",), "No such file"),
    ],
)
async def test_a_process_that_makes_none_is_an_error_and_does_not_stay(
    program: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate_secret, "_PROGRAM", program)
    monkeypatch.setattr(certificate_secret, "_MAKE_SECONDS", 0.6)
    began = time.monotonic()
    with pytest.raises(ClusterError, match=words):
        await certificate_secret._make(Request(now=NOW, hosts=HOSTS))
    assert time.monotonic() - began < 30
