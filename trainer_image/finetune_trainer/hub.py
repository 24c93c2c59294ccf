"""Hugging Face's hub: downloads, and what its errors mean to the owner of a job."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub

from finetune_trainer.errors import InputMissing, PermissionDenied, TrainerError, Unavailable, UsageError
from finetune_trainer.workspace import explain_full_disk

RepoType = Literal["model", "dataset"]

_WAITS = (2.0, 8.0)
"""Seconds before the second and the third try."""

logger = logging.getLogger(__name__)

_ADVICE = "name a Secret with a token that may read it in model.tokenSecretRef (variable HF_TOKEN)"


def download(
    repo: str, repo_type: RepoType, *, revision: str | None, patterns: Sequence[str], cache: Path
) -> tuple[Path, str]:
    """Download the files of a repository that match the patterns. Returns their folder and the commit.

    What a former attempt has left in `cache` is not downloaded again.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for seconds in _WAITS:
        try:
            return _snapshot(repo, repo_type, revision, patterns, cache)
        except Unavailable as error:
            logger.warning("%s; trying again in %g s", error.message, seconds)
            time.sleep(seconds)
    return _snapshot(repo, repo_type, revision, patterns, cache)


def list_files(repo: str, repo_type: RepoType, *, revision: str | None) -> list[str]:
    """The paths of all files of a repository."""
    with explained(f"hf://{repo}", revision):
        return _api().list_repo_files(repo, repo_type=repo_type, revision=revision)


def _snapshot(
    repo: str, repo_type: RepoType, revision: str | None, patterns: Sequence[str], cache: Path
) -> tuple[Path, str]:
    name = f"hf://{'datasets/' if repo_type == 'dataset' else ''}{repo}"
    with explained(name, revision), explain_full_disk(cache):
        folder = Path(
            _api().snapshot_download(
                repo, repo_type=repo_type, revision=revision, allow_patterns=list(patterns), cache_dir=cache
            )
        )
    return folder, folder.name


# httpx.HTTPError, or httpx2.HTTPError from hub 2 on: the base of all that can go wrong with a request.
_TransportError: type[Exception] = hub.HfHubHTTPError.__bases__[0]


@contextmanager
def explained(name: str, revision: str | None) -> Iterator[None]:
    """Raise the hub's errors as the trainer's."""
    try:
        yield
    except (
        _TransportError,
        hub.EntryNotFoundError,
        hub.HFValidationError,
        hub.OfflineModeIsEnabled,
        hub.RevisionResolutionError,
        hub.FileMetadataError,
        hub.XetDownloadError,
    ) as error:
        raise _explain(error, name, revision) from error


def _api() -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ.get("HF_TOKEN") or None)


def _explain(error: Exception, name: str, revision: str | None) -> TrainerError:
    if isinstance(error, hub.LocalEntryNotFoundError) and isinstance(error.__cause__, hub.HfHubHTTPError):
        error = error.__cause__  # the answer, where the first says only that the cache cannot make up for it
    status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else None
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    if isinstance(error, hub.GatedRepoError):
        return PermissionDenied(
            f"{name} is gated: accept its licence at {endpoint} with your account, and {_ADVICE}",
            reason="ModelGated",
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return InputMissing(f"{name} has no revision {revision!r}; name a branch, a tag or a commit that it has")
    if isinstance(error, hub.RepositoryNotFoundError) and (status == 404 or os.environ.get("HF_TOKEN")):
        return InputMissing(f"{name} does not exist at {endpoint}, or this token may not see it; check the name")
    if status in (401, 403):
        return PermissionDenied(
            f"{endpoint} does not give out {name} (HTTP {status}): it does not exist, or it is private; check the name,"
            f" or {_ADVICE}"
        )
    if status == 404 or isinstance(error, hub.RemoteEntryNotFoundError):
        return InputMissing(f"{name} has no such file at {endpoint}: {_first_line(error)}")
    if isinstance(error, hub.HFValidationError):
        return UsageError(f"{name} is no name of a repository: {_first_line(error)}", reason="InvalidURI")
    if status is not None and status < 500 and status != 429:
        return UsageError(f"{endpoint} refused {name} (HTTP {status}): {_first_line(error)}", reason="InvalidURI")
    return Unavailable(
        f"{endpoint} did not serve {name}: {_first_line(error)}; where there is no way out to it, put it below the"
        " folder that FINETUNE_MODEL_MIRROR names, or into s3:// or pvc://",
        reason="HubUnavailable",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
