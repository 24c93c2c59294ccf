"""What format a source's rows have, and whether its first rows can be used, before any work is put into it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from finetune_trainer.contract.config import DatasetConfig
from finetune_trainer.contract.vocabulary import DatasetFormat
from finetune_trainer.data.formats import parse, recognise_most
from finetune_trainer.data.rows import RowError
from finetune_trainer.data.sources import Fetch, Source, resolve_sources
from finetune_trainer.errors import DataError, UsageError

FIRST_ROWS = 100
"""Rows that are looked at."""
_KNOWN = "messages (role, content), sharegpt (from, value), alpaca (instruction, output or prompt, completion) or text"


@dataclass(frozen=True, slots=True)
class Recognised:
    """The format of a source."""

    format: DatasetFormat
    """Never `auto`."""
    reason: str = ""
    """Why `auto` decided on it; empty where the job named it."""


def recognise_source(config: DatasetConfig, source: Source) -> Recognised:
    """The format that the job names, or that most of the first rows have.

    Raises DataError where the source is empty, or none of its first rows can be read or has a known format; UsageError
    for preference pairs, which this trainer has no objective for.
    """
    first = list(islice(source.rows(), FIRST_ROWS))
    if not first:
        raise DataError(f"the data set {source.uri} is empty: {', '.join(f.name for f in source.files)} holds no row")
    readable = [row.value for row in first if row.value is not None]
    if not readable:
        raise DataError(
            f"none of the first {len(first)} rows of {source.uri} can be read: {first[0].where}: {first[0].error}"
        )
    match = recognise_most(readable)
    if config.format is not DatasetFormat.AUTO:
        recognised = Recognised(config.format)
    elif match is None:
        fields = ", ".join(str(key) for key in list(readable[0])[:8]) or "no field"
        raise DataError(f"the format of {source.uri} is not known: its rows have {fields}. Known are {_KNOWN}")
    else:
        recognised = Recognised(match[0], match[1])
    if recognised.format is DatasetFormat.PREFERENCE:
        raise UsageError(
            f"the data set {source.uri} holds preference pairs (chosen, rejected), which need a preference objective "
            "such as DPO; this trainer does supervised tuning. Give the chosen answers as 'messages'"
        )
    return recognised


def check_first_rows(config: DatasetConfig, fetch: Fetch) -> None:
    """Read and parse the first rows of every source.

    Raises InputMissing for a file that is not there, DataError where it is empty, not UTF-8, or none of its first rows
    can be used (with `dropInvalid: false`: any of them cannot), UsageError for a format without an objective.
    """
    check_settings(config)
    for source in resolve_sources(config, fetch):
        recognised = recognise_source(config, source)
        first_error = ""
        usable = 0
        for row in islice(source.rows(), FIRST_ROWS):
            try:
                if row.value is None:
                    raise row.error or RowError("no value")
                parse(recognised.format, row.value)
                usable += 1
            except RowError as error:
                first_error = first_error or f"{row.where}: {error}"
                if not config.cleaning.drop_invalid:
                    raise DataError(
                        f"{first_error}. Repair the row, or set spec.dataset.cleaning.dropInvalid to true"
                    ) from None
        if not usable:
            raise DataError(
                f"none of the first rows of {source.uri} can be used as '{recognised.format}': {first_error}. Check "
                "spec.dataset.format"
            )


def check_settings(config: DatasetConfig) -> None:
    """Raises UsageError for settings that contradict each other."""
    validation = config.validation
    if not config.sources:
        raise UsageError("spec.dataset.sources is empty; name at least one data set")
    if config.max_length < 2:
        raise UsageError(f"spec.dataset.maxLength is {config.max_length}; a sample needs at least 2 tokens")
    if validation is None:
        return
    if (validation.uri is None) == (validation.fraction is None):
        raise UsageError("spec.dataset.validation needs exactly one of uri and fraction")
    if validation.fraction is not None and not 0 < validation.fraction < 1:
        raise UsageError(f"spec.dataset.validation.fraction is {validation.fraction}; it must be above 0 and below 1")
