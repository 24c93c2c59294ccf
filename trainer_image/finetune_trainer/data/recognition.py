"""What format a source's rows have, and whether its first rows can be used, before any work is put into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from finetune_trainer.contract.config import DatasetConfig
from finetune_trainer.contract.vocabulary import DatasetFormat
from finetune_trainer.data.columns import Columns
from finetune_trainer.data.purpose import Purpose
from finetune_trainer.data.rows import RowError
from finetune_trainer.data.sources import Fetch, Source, resolve_sources
from finetune_trainer.errors import DataError, UsageError

SUPERVISED = Purpose()
"""Answers to learn."""
FIRST_ROWS = 100
"""Rows of a file that are looked at."""
_NAMED = 3
"""Files that an explanation names."""
_KNOWN = (
    "messages (role, content), sharegpt (from, value), alpaca (instruction, output), prompt-completion (prompt, "
    "completion), text, "
    "preference (chosen, rejected), unpaired (an answer and kto_tag or label) or labeled (text, label)"
)


@dataclass(frozen=True, slots=True)
class Recognised:
    """The format of a file."""

    format: DatasetFormat
    """Never `auto`."""
    reason: str = ""
    """Why `auto` decided on it; empty where the job named it."""


def recognise_source(config: DatasetConfig, source: Source, purpose: Purpose = SUPERVISED) -> dict[Path, Recognised]:
    """The format of each file of a source that holds rows: the one that the job names, or that most of the file's first
    rows have; where none of them has a known one, that of the other files.

    Raises DataError where the source is empty, or none of its first rows can be read or has a known format; UsageError
    for a format that does not serve the purpose.
    """
    first = {file: rows for file in source.files if (rows := list(islice(source.rows(file), FIRST_ROWS)))}
    names = ", ".join(source.name(file) for file in source.files)
    if not first:
        raise DataError(f"the data set {source.uri} is empty: {names} holds no row")
    columns = Columns(config)
    readable = {
        file: [columns.usual(row.value) for row in rows if row.value is not None] for file, rows in first.items()
    }
    if not any(readable.values()):
        broken = next(iter(first.values()))
        raise DataError(
            f"none of the first {len(broken)} rows of {source.uri} can be read: {broken[0].where}: {broken[0].error}"
        )
    if config.format is not DatasetFormat.AUTO:
        purpose.check_format(config.format, source.uri, "")
        return dict.fromkeys(first, Recognised(config.format))
    matches = {file: Recognised(*match) for file, rows in readable.items() if (match := purpose.recognise_most(rows))}
    if not matches:
        row = next(rows[0] for rows in readable.values() if rows)
        fields = ", ".join(str(key) for key in list(row)[:8]) or "no field"
        raise DataError(
            f"the format of {source.uri} is not known: its rows have {fields}. Known are {_KNOWN}. Name other fields "
            "in spec.dataset.columns and spec.dataset.tags"
        )
    usual, _ = Counter(matches.values()).most_common(1)[0]
    for found in dict.fromkeys(matches.values()):
        purpose.check_format(found.format, source.uri, found.reason)
    return {file: matches.get(file, usual) for file in first}


def explain(source: Source, formats: Mapping[Path, Recognised]) -> str:
    """Why `auto` decided as it did, file by file where they differ; empty where the job named the format."""
    reasons: dict[str, list[str]] = {}
    for file, recognised in formats.items():
        reasons.setdefault(recognised.reason, []).append(source.name(file))
    if len(reasons) == 1:
        return next(iter(reasons))
    parts = []
    for reason, names in reasons.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        parts.append(f"{', '.join(names[:_NAMED])}{more}: {reason}")
    return "; ".join(parts)


def check_first_rows(config: DatasetConfig, fetch: Fetch, purpose: Purpose = SUPERVISED) -> None:
    """Read and parse the first rows of every source, of one file for each format that it has.

    Raises InputMissing for a file that is not there, DataError where it is empty, not UTF-8, or none of its first rows
    can be used (with `dropInvalid: false`: any of them cannot), UsageError for a format that does not serve the
    purpose.
    """
    check_settings(config)
    purpose.check_settings(config)
    for source in resolve_sources(config, fetch):
        formats = recognise_source(config, source, purpose)
        for format_ in dict.fromkeys(recognised.format for recognised in formats.values()):
            file = next(file for file, recognised in formats.items() if recognised.format is format_)
            _check_file(config, source, file, format_, purpose)


def _check_file(config: DatasetConfig, source: Source, file: Path, format_: DatasetFormat, purpose: Purpose) -> None:
    columns = Columns(config)
    first_error = ""
    usable = 0
    for row in islice(source.rows(file), FIRST_ROWS):
        try:
            if row.value is None:
                raise row.error or RowError("no value")
            purpose.parse(format_, columns.usual(row.value))
            usable += 1
        except RowError as error:
            first_error = first_error or f"{row.where}: {error}"
            if not config.cleaning.drop_invalid:
                raise DataError(
                    f"{first_error}. Repair the row, or set spec.dataset.cleaning.dropInvalid to true"
                ) from None
    if not usable:
        raise DataError(
            f"none of the first rows of {source.uri} can be used as '{format_}': {first_error}. Check "
            "spec.dataset.format"
        )


def check_settings(config: DatasetConfig) -> None:
    """Raises UsageError for settings that contradict each other."""
    validation = config.validation
    if not config.sources:
        raise UsageError("spec.dataset.sources is empty; name at least one data set")
    if config.max_length < 2:
        raise UsageError(f"spec.dataset.maxLength is {config.max_length}; a sample needs at least 2 tokens")
    if config.mask_history and config.train_on_prompt:
        raise UsageError(
            "spec.dataset.maskHistory takes the loss over the last answer alone, spec.dataset.trainOnPrompt over "
            "everything; set one of them"
        )
    if validation is None:
        return
    if sum(one is not None for one in (validation.uri, validation.fraction, validation.count)) != 1:
        raise UsageError("spec.dataset.validation needs exactly one of uri, fraction and count")
    if validation.fraction is not None and not 0 < validation.fraction < 1:
        raise UsageError(f"spec.dataset.validation.fraction is {validation.fraction}; it must be above 0 and below 1")
