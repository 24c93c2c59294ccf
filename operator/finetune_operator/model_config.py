"""Reads a model's `config.json` from the Hugging Face Hub, or a server that speaks its protocol, over HTTPS."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.errors import ModelConfigUnavailable
from finetune_operator.observed import JobRef
from finetune_trainer.contract.addresses import endpoint_problem

DEFAULT_ENDPOINT = "https://huggingface.co"
MAX_BYTES = 2**20
"""Bytes of a `config.json`; those of real models have a few thousand."""
TIMEOUT_SECONDS = 10.0
"""For the whole of one read."""
_FRESH_SECONDS = 3600.0
"""How long an answer is kept: a branch may move on."""
_RETRY_SECONDS = 60.0
"""How long a failure is kept, so that a hub that is down is not asked at every event."""
_CACHED = 256
_CHUNK = 65_536
_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$|^[A-Za-z0-9][\w.-]*$")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a hub to where it keeps its files, and not to where only this pod's node may go."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        problem = endpoint_problem(newurl)
        if problem or (req.type == "https" and not newurl.startswith("https://")):
            raise ValueError(f"redirected to {newurl[:200]!r}, which {problem or 'is not encrypted'}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_Redirects)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a read came to."""

    until: float
    config: Mapping[str, Any] | None
    problem: str = ""


class HubConfigReader:
    """Implements `planning.ModelConfigReader` for hf:// models, with a cache of the newest answers.

    Buckets, claims and folders are not read: the operator has neither the job's credentials nor its volumes.
    """

    def __init__(
        self,
        environ: Mapping[str, str] = os.environ,
        *,
        timeout: float = TIMEOUT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            environ: HF_ENDPOINT names another server than the public one, HF_TOKEN what to show it, HF_HUB_OFFLINE
                that none is to be asked.
            timeout: seconds for one read.
            clock: seconds, for the age of what is cached.
        """
        self._endpoint = (environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self._token = environ.get("HF_TOKEN", "")
        self._offline = environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        self._timeout = timeout
        self._clock = clock
        self._answers: OrderedDict[str, _Answer] = OrderedDict()

    async def __call__(self, ref: JobRef, spec: FineTuneJobSpec) -> Mapping[str, Any]:
        """The content of `config.json`. Raises ModelConfigUnavailable when it cannot be read from here."""
        url = self._url(spec.model.uri, spec.model.revision or "main")
        answer = self._answers.get(url)
        if answer is None or answer.until <= self._clock():
            answer = await self._read(url)
            self._answers[url] = answer
            self._answers.move_to_end(url)
            while len(self._answers) > _CACHED:
                self._answers.popitem(last=False)
        if answer.config is None:
            raise ModelConfigUnavailable(f"spec.model.uri: {spec.model.uri}: {answer.problem}")
        return answer.config

    def _url(self, uri: str, revision: str) -> str:
        scheme, _, name = uri.partition("://")
        if scheme != "hf":
            raise ModelConfigUnavailable(f"spec.model.uri: {uri} is not read by the operator, only by the trainer")
        if self._offline:
            raise ModelConfigUnavailable(f"spec.model.uri: {uri}: HF_HUB_OFFLINE is set, so no hub is asked")
        if not _REPOSITORY.match(name) or ".." in name:
            raise ModelConfigUnavailable(f"spec.model.uri: {uri} is no name of a model; write hf://organisation/name")
        return f"{self._endpoint}/{name}/resolve/{urllib.parse.quote(revision, safe='')}/config.json"

    async def _read(self, url: str) -> _Answer:
        """One read, in a thread that nobody waits for longer than `timeout`.

        urllib's own limit is for each address of a host and each wait for a part. A thread of the loop's executor
        would hold up the end of the process for as long.
        """
        read: concurrent.futures.Future[_Answer] = concurrent.futures.Future()
        read.set_running_or_notify_cancel()
        problem = f"{url}: not complete after {self._timeout:g} s"
        late = _Answer(self._clock() + _RETRY_SECONDS, None, problem)

        def run() -> None:
            answer = late
            try:
                answer = self._ask(url)
            finally:
                read.set_result(answer)

        threading.Thread(target=run, name="model config", daemon=True).start()
        try:
            async with asyncio.timeout(self._timeout):
                return await asyncio.wrap_future(read)
        except TimeoutError:
            return late

    def _ask(self, url: str) -> _Answer:
        """One read, in a thread: what went wrong becomes part of the answer."""
        now = self._clock()
        try:
            return _Answer(now + _FRESH_SECONDS, _parsed(self._download(url)))
        except urllib.error.HTTPError as error:
            problem = _explain_status(error.code, bool(self._token))
            error.close()
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            problem = f"no answer: {reason or type(error).__name__}"
        except ValueError as error:
            problem = str(error)
        return _Answer(now + _RETRY_SECONDS, None, f"{url}: {problem}")

    def _download(self, url: str) -> bytes:
        if not url.startswith(("https://", "http://")):
            raise ValueError("HF_ENDPOINT is not an http(s) address; correct it")
        request = urllib.request.Request(url, headers={"User-Agent": "finetune-operator"})
        if self._token:
            # Not sent along to where a redirect leads: a token is for the hub alone.
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        deadline = time.monotonic() + self._timeout
        parts: list[bytes] = []
        size = 0
        with _OPENER.open(request, timeout=self._timeout) as response:
            while part := response.read1(_CHUNK):
                parts.append(part)
                size += len(part)
                if size > MAX_BYTES:
                    raise ValueError(f"larger than {MAX_BYTES // 2**20} MiB, so this is no config.json")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {self._timeout:g} s")
        return b"".join(parts)


def _parsed(text: bytes) -> Mapping[str, Any]:
    """Raises ValueError that says what the text is not."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def _explain_status(status: int, with_token: bool) -> str:
    if status in (401, 403):
        reason = "the operator's token may not see it" if with_token else "it is private or gated, or does not exist"
        return f"HTTP {status}: {reason}"
    if status == 404:
        return "HTTP 404: there is no such model or revision, or it has no config.json"
    return f"HTTP {status}"
