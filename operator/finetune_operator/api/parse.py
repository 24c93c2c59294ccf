"""From a manifest to a FineTuneJob, with errors that name field, value and remedy.

Pure, but for `load_manifests`, which reads the file or stream that it is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from finetune_operator import constants as c
from finetune_operator.api.documents import MAX_BYTES, Document, read_documents
from finetune_operator.api.fields import without_nulls
from finetune_operator.api.problems import explain, shown
from finetune_operator.api.v1alpha1 import FineTuneJob
from finetune_operator.errors import FinetuneError, InvalidManifest


def parse_manifest(
    data: Mapping[str, Any], source: str = "", *, lines: Mapping[tuple[str | int, ...], int] | None = None
) -> FineTuneJob:
    """One object as a FineTuneJob, by the API server's rules: no conversion of `"4"` to a number, null means absent.

    lines: the line of each field, to be named beside it. Raises InvalidManifest with one line for each problem.
    """
    _check_kind(data, source)
    try:
        # Strict validation takes enums and tuples as text and lists from JSON only.
        text = json.dumps(without_nulls(FineTuneJob, dict(data)), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidManifest([f"this is not plain JSON data: {error}"], source=source) from error
    try:
        return FineTuneJob.model_validate_json(text, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        raise InvalidManifest(explain(error, FineTuneJob, lines), source=source) from error


def _check_kind(data: object, source: str) -> None:
    if not isinstance(data, Mapping):
        raise InvalidManifest(
            [f"{shown(data)} is not an object; write apiVersion, kind, metadata, spec"], source=source
        )
    kind, version = data.get("kind"), data.get("apiVersion")
    if kind != c.KIND:
        found = "kind: missing" if kind is None else f"kind: {shown(kind)} is not for this command"
        raise InvalidManifest([f"{found}; use kind: {c.KIND} with apiVersion: {c.API_VERSION}"], source=source)
    if version != c.API_VERSION:
        found = "missing" if version is None else f"{shown(version)} is unknown"
        raise InvalidManifest([f"apiVersion: {found}; use {c.API_VERSION}"], source=source)


def load_manifests(origin: str | bytes | Path | IO[str] | IO[bytes], *, source: str = "") -> list[FineTuneJob]:
    """Every FineTuneJob of a text, a file or a stream of YAML or JSON documents.

    origin: the text itself, the path of a file, or an open file such as standard input.
    source: what errors call it; a file's path by default.

    Raises InvalidManifest with every problem of every document, and their lines; FinetuneError for a file that cannot
    be read.
    """
    if isinstance(origin, Path):
        source = source or str(origin)
    documents = read_documents(_text_of(origin), source)
    if not documents:
        raise InvalidManifest([f"nothing in it; write at least one {c.KIND}"], source=source)
    jobs, problems = [], []
    for number, document in enumerate(documents, 1):
        try:
            jobs.append(parse_manifest(document.data, lines=document.lines))
        except InvalidManifest as error:
            where = f"document {number} (line {document.line}): " if len(documents) > 1 else ""
            problems += [f"{where}{problem}" for problem in error.problems]
    problems += _repeated(jobs, documents) if not problems else []
    if problems:
        raise InvalidManifest(problems, source=source)
    return jobs


def _repeated(jobs: list[FineTuneJob], documents: list[Document]) -> list[str]:
    first: dict[tuple[str, str], int] = {}
    problems = []
    for job, document in zip(jobs, documents, strict=True):
        key = (job.metadata.namespace, job.name)
        if key in first:
            problems.append(
                f"metadata.name: {job.name!r} stands here a second time (line {document.line}, first in line "
                f"{first[key]}); give each job a name of its own"
            )
        first.setdefault(key, document.line)
    return problems


def _text_of(origin: str | bytes | Path | IO[str] | IO[bytes]) -> str | bytes:
    if isinstance(origin, str | bytes):
        return origin
    try:
        if not isinstance(origin, Path):
            return origin.read(MAX_BYTES + 1)
        with origin.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FinetuneError(f"{origin}: cannot be read: {error.strerror or error}") from error
    except UnicodeError as error:
        raise FinetuneError(f"not UTF-8 text ({error}); save it as UTF-8") from error
