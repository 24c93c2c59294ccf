"""A self-made certificate that the replicas share, in a Secret of the operator's own namespace.

The Secret is made by whoever installs the operator, empty: so the operator needs no right to create Secrets, and none
to see another one.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx2 as httpx
from lightkube import ApiError, AsyncClient
from lightkube.generic_resource import create_namespaced_resource
from lightkube.types import PatchType
from pydantic import ValidationError

from finetune_operator import constants as c
from finetune_operator.certificate_protocol import Bundle, Made, Request
from finetune_operator.errors import ClusterError
from finetune_operator.serving_tls import Certificate

Secrets = create_namespaced_resource("", "v1", "Secret", "secrets")

_KEYS = {"ca": "ca.crt", "ca_key": "ca.key", "certificate": "tls.crt", "key": "tls.key"}
_CONFLICT = 409
_PROGRAM = (sys.executable, "-m", "finetune_operator.certificates")
_MAKE_SECONDS = 60.0
"""A key takes milliseconds; Python's start may take seconds, where the processor is shared."""


class CertificateSecret:
    """A `serving_tls.Source`: reads the Secret, and writes into it what is missing, expires or serves other names."""

    def __init__(
        self,
        client: AsyncClient,
        *,
        namespace: str,
        name: str,
        hosts: tuple[str, ...],
        clock: Callable[[], float] = time.time,
        on_expiry: Callable[[float], None] = lambda at: None,
    ) -> None:
        """
        Args:
            hosts: DNS names of the server.
            clock: seconds since the epoch.
            on_expiry: told when the certificate that is served expires.
        """
        self._client: Any = client  # lightkube's overloads leave generic resources out
        self._namespace, self._name, self._hosts = namespace, name, hosts
        self._clock = clock
        self._on_expiry = on_expiry
        self._made: Made | None = None

    async def __call__(self) -> Certificate:
        """What the Secret holds, made anew where that is due. Raises ClusterError."""
        while True:
            secret = await self._read()
            found = _bundle(secret.get("data") or {})
            if self._made is None or found != self._made.bundle or self._clock() >= self._made.renew_at:
                made = await _make(Request(now=self._clock(), hosts=self._hosts, bundle=found))
                if made.bundle != found and not await self._write(secret["metadata"]["resourceVersion"], made.bundle):
                    continue  # another replica was faster: what it wrote is as good
                self._made = made
                self._on_expiry(made.expires_at)
            bundle = self._made.bundle
            return Certificate(bundle.certificate, bundle.key, bundle.ca)

    async def _read(self) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = await self._client.get(Secrets, self._name, namespace=self._namespace)
        except httpx.HTTPError as error:
            raise self._failure("read", error) from error
        return found

    async def _write(self, version: str, bundle: Bundle) -> bool:
        """Whether it was written: not where the Secret changed meanwhile."""
        data = {key: base64.b64encode(getattr(bundle, field).encode()).decode() for field, key in _KEYS.items()}
        patch = {"metadata": {"resourceVersion": version}, "data": data}
        try:
            await self._client.patch(
                Secrets,
                self._name,
                patch,
                namespace=self._namespace,
                patch_type=PatchType.MERGE,
                field_manager=c.FIELD_MANAGER,
            )
        except httpx.HTTPError as error:
            if isinstance(error, ApiError) and error.response.status_code == _CONFLICT:
                return False
            raise self._failure("written", error) from error
        return True

    def _failure(self, what: str, error: httpx.HTTPError) -> ClusterError:
        return ClusterError(
            f"the progress server's certificate cannot be {what}: Secret {self._namespace}/{self._name}: {error}. The "
            "chart makes this Secret, empty, with the right to read and patch it: apply it again"
        )


def _bundle(data: Mapping[str, str]) -> Bundle:
    """What the Secret holds; a part that is missing or is no text is empty."""
    return Bundle(**{field: _text(data.get(key, "")) for field, key in _KEYS.items()})


def _text(encoded: str) -> str:
    try:
        return base64.b64decode(encoded).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


async def _make(request: Request) -> Made:
    """In a process of its own; see `certificates`. Raises ClusterError."""
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(*_PROGRAM, stdin=pipe, stdout=pipe)
        async with asyncio.timeout(_MAKE_SECONDS):
            answer = await _answer(process, request.to_json().encode())
    except TimeoutError as error:
        raise ClusterError(f"no certificate could be made within {_MAKE_SECONDS:.0f} s") from error
    except OSError as error:
        raise ClusterError(f"no certificate could be made: {error}") from error
    if process.returncode != 0:
        raise ClusterError(f"no certificate could be made: the process that makes them ended with {process.returncode}")
    try:
        return Made.model_validate_json(answer)
    except ValidationError as error:
        raise ClusterError(f"no certificate could be made: the process that makes them answered {error}") from error


async def _answer(process: asyncio.subprocess.Process, question: bytes) -> bytes:
    """What it writes until it ends. It does not outlive whoever waits for it."""
    try:
        answer, _ = await process.communicate(question)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return answer
