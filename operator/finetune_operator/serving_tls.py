"""TLS of the progress server: the certificate that it serves is replaced while it serves."""

from __future__ import annotations

import asyncio
import logging
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from finetune_operator.errors import FinetuneError

log = logging.getLogger(__name__)

REFRESH_SECONDS = 60.0
"""How soon a certificate that was replaced is served; the kubelet's own copies of Secrets are as old."""


class CertificateUnusable(FinetuneError):
    """The progress server's certificate cannot be read, or is no certificate with its key."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """All PEM."""

    chain: str
    key: str
    ca: str | None = None
    """What pods are to trust; None where they are told otherwise."""


Source = Callable[[], Awaitable[Certificate]]
"""The certificate that should be served now. Raises FinetuneError where it cannot be had."""


class CertificateFiles:
    """Files that somebody else keeps fresh: the kubelet, for a Secret of cert-manager."""

    def __init__(self, certificate: Path, key: Path, ca: Path | None = None) -> None:
        self._certificate, self._key, self._ca = certificate, key, ca

    async def __call__(self) -> Certificate:
        """What they hold now."""
        try:
            ca = None if self._ca is None else self._ca.read_text(encoding="utf-8")
            return Certificate(self._certificate.read_text(encoding="utf-8"), self._key.read_text(encoding="utf-8"), ca)
        except (OSError, UnicodeDecodeError) as error:
            raise CertificateUnusable(f"the progress server's certificate cannot be read: {error}") from error


class ServingTls:
    """A TLS context whose certificate follows its source. Connections that are open keep the one they began with."""

    def __init__(self, source: Source, *, every: float = REFRESH_SECONDS) -> None:
        self._source = source
        self._every = every
        self._served: Certificate | None = None
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)

    @property
    def ca(self) -> str | None:
        """The certificate authority that pods of new attempts are told to trust."""
        return None if self._served is None else self._served.ca

    async def refresh(self) -> None:
        """Serve what the source gives now. Raises FinetuneError, and goes on serving what it did."""
        found = await self._source()
        if found == self._served:
            return
        # Tried on a context of its own: a key that is of another certificate would leave this one without either.
        _load(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), found)
        _load(self.context, found)
        self._served = found
        log.info("the progress server has a new certificate")

    async def keep_fresh(self, _: web.Application) -> AsyncIterator[None]:
        """An aiohttp clean-up context: refreshes for as long as the application is served."""
        task = asyncio.create_task(self._follow(), name="certificate")
        yield
        task.cancel()
        # However it ended: whoever stops serving has more to clean up.
        await asyncio.gather(task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            try:
                await self.refresh()
            except FinetuneError as error:
                log.warning("the progress server keeps its certificate", extra={"cause": str(error)})
            except Exception:
                # A defect, told in full: if it ended this loop, the certificate would run out unnoticed.
                log.exception("the progress server keeps its certificate")


def _load(context: ssl.SSLContext, certificate: Certificate) -> None:
    """Python's ssl reads certificates from files only."""
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:  # readable by us only
            file.write(f"{certificate.key.strip()}\n{certificate.chain.strip()}\n")
            file.flush()
            context.load_cert_chain(file.name)
    except (ssl.SSLError, OSError) as error:
        raise CertificateUnusable(f"the progress server's certificate cannot be used: {error}") from error
