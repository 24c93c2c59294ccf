"""Does an installation work? What `helm test` runs, in a pod of the operator's image and as its ServiceAccount."""

from __future__ import annotations

import os
import sys
import time
import urllib.error
import urllib.request

import httpx2 as httpx
from lightkube import Client

from finetune_operator.errors import FinetuneError
from finetune_operator.kubernetes.cluster import FineTuneJobs
from finetune_operator.kubernetes.namespaces import ALL
from finetune_operator.settings import Settings

PROBES = ("/healthz", "/readyz")
_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 2.0
_REQUEST_SECONDS = 5.0


def check(url: str, client: Client, namespaces: tuple[str, ...], *, patience: float = _PATIENCE_SECONDS) -> None:
    """Ask the operator at `url` for its probes, and the API server for jobs. Raises FinetuneError that says what fails.

    patience: seconds in which the operator may still be starting.
    """
    deadline = time.monotonic() + patience
    for path in PROBES:
        while (trouble := _probe(url + path)) is not None:
            if time.monotonic() > deadline:
                raise FinetuneError(f"the operator does not answer as it should: {trouble}")
            time.sleep(_PAUSE_SECONDS)
    for namespace in namespaces or (ALL,):
        try:
            next(iter(client.list(FineTuneJobs, namespace=namespace, chunk_size=1)), None)
        except httpx.HTTPError as error:
            what = "the CRD of FineTuneJobs is not there" if _is(error, 404) else "FineTuneJobs cannot be listed"
            raise FinetuneError(f"{what} (namespace {namespace}): {error}") from error


def _probe(url: str) -> str | None:
    """What is wrong with a probe; None when it is well."""
    try:
        with urllib.request.urlopen(url, timeout=_REQUEST_SECONDS):  # nosec B310  # http:// as its caller writes it
            return None
    except urllib.error.HTTPError as error:
        with error:
            return f"{url} says {error.code}: {error.read(500).decode(errors='replace').strip()}"
    except OSError as error:
        return f"{url}: {error}"


def _is(error: httpx.HTTPError, code: int) -> bool:
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == code


def main() -> None:
    """`python -m finetune_operator.kubernetes.installation URL`; exit code 1 with what is wrong."""
    url = sys.argv[1]
    try:
        settings = Settings.from_env(os.environ)
        with Client(timeout=httpx.Timeout(_REQUEST_SECONDS)) as client:
            check(url, client, settings.watch_namespaces)
    except FinetuneError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
    sys.stdout.write("the operator answers, and FineTuneJobs are served\n")


if __name__ == "__main__":
    main()
