"""A certificate is replaced while the server serves, and one that is broken replaces nothing."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from finetune_operator import serving
from finetune_operator.certificate_protocol import Bundle, Request
from finetune_operator.certificates import make
from finetune_operator.serving_tls import Certificate, CertificateFiles, CertificateUnusable, ServingTls


def bundle() -> Bundle:
    return make(Request(now=time.time(), hosts=("localhost",))).bundle


def write(folder: Path, one: Bundle) -> CertificateFiles:
    """As the kubelet writes a Secret of cert-manager."""
    for name, text in (("tls.crt", one.certificate), ("tls.key", one.key), ("ca.crt", one.ca)):
        (folder / name).write_text(text)
    return CertificateFiles(folder / "tls.crt", folder / "tls.key", folder / "ca.crt")


async def served(port: int, ca: str) -> bytes:
    """The certificate that a client gets that trusts an authority."""
    context = ssl.create_default_context(cadata=ca)
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
    found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    return found


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[ServingTls, int, Bundle]]:
    first = bundle()
    tls = ServingTls(write(tmp_path, first), every=0.05)
    runner = await serving.listen(web.Application(), "127.0.0.1", 0, tls, setting="PORT")
    yield tls, runner.addresses[0][1], first
    await runner.cleanup()


async def test_a_new_certificate_is_served_without_a_restart(
    server: tuple[ServingTls, int, Bundle], tmp_path: Path
) -> None:
    tls, port, first = server
    before = await served(port, first.ca)
    assert tls.ca == first.ca
    second = bundle()
    write(tmp_path, second)
    async with asyncio.timeout(5):
        while tls.ca != second.ca:
            await asyncio.sleep(0.02)
    assert await served(port, second.ca) != before
    with pytest.raises(ssl.SSLError):
        await served(port, first.ca)


@pytest.mark.parametrize("broken", ["other key", "half a certificate", "no file", "not text"])
async def test_what_is_broken_replaces_nothing(
    server: tuple[ServingTls, int, Bundle], tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    tls, port, first = server
    before = await served(port, first.ca)
    match broken:
        case "other key":
            (tmp_path / "tls.key").write_text(bundle().key)
        case "half a certificate":
            (tmp_path / "tls.crt").write_text(first.certificate[:200])
        case "no file":
            (tmp_path / "tls.crt").unlink()
        case "not text":
            (tmp_path / "ca.crt").write_bytes(b"\xff\xfe")
    with pytest.raises(CertificateUnusable):
        await tls.refresh()
    async with asyncio.timeout(5):
        while "the progress server keeps its certificate" not in caplog.text:
            await asyncio.sleep(0.02)
    assert await served(port, first.ca) == before
    write(tmp_path, first)
    await tls.refresh()
    assert await served(port, first.ca) == before


async def test_without_a_certificate_nothing_is_served(tmp_path: Path) -> None:
    tls = ServingTls(CertificateFiles(tmp_path / "tls.crt", tmp_path / "tls.key"))
    with pytest.raises(CertificateUnusable, match=r"tls\.crt"):
        await serving.listen(web.Application(), "127.0.0.1", 0, tls, setting="PORT")


async def test_a_defect_of_the_source_does_not_end_the_refreshing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, second = write(tmp_path, bundle()), bundle()
    failures: list[Exception] = [KeyError("tls.crt"), OSError("disk full")]

    async def source() -> Certificate:
        if tls.ca is not None and failures:
            raise failures.pop(0)
        return await good()

    tls = ServingTls(source, every=0.01)
    runner = await serving.listen(web.Application(), "127.0.0.1", 0, tls, setting="PORT")
    write(tmp_path, second)
    async with asyncio.timeout(5):
        while tls.ca != second.ca:
            await asyncio.sleep(0.01)
    await runner.cleanup()
    told = [one for one in caplog.records if one.message == "the progress server keeps its certificate"]
    assert [one.exc_info is not None for one in told] == [True, True]


async def test_a_certificate_that_cannot_be_written_down_is_unusable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python reads certificates from files only, and the disk may be full."""
    source = write(tmp_path, bundle())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    with pytest.raises(CertificateUnusable):
        await ServingTls(source).refresh()


async def test_what_ended_the_refreshing_does_not_hold_up_the_end(tmp_path: Path) -> None:
    class Ended(ServingTls):
        async def _follow(self) -> None:
            raise OSError("no such file")

    tls = Ended(write(tmp_path, bundle()))
    runner = await serving.listen(web.Application(), "127.0.0.1", 0, tls, setting="PORT")
    await asyncio.sleep(0)
    await runner.cleanup()
    assert not runner.sites
