"""From the data set's files to tokenized samples, by way of the cache: the one entry point of the data package."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune_trainer.contract.config import DatasetConfig
from finetune_trainer.contract.manifest import DataReport
from finetune_trainer.data import cache
from finetune_trainer.data.build import Builder
from finetune_trainer.data.cleaning import Entry, drop_leaked, epoch_index, hold_out, sample_index
from finetune_trainer.data.packing import pack, padding_share
from finetune_trainer.data.prompts import Prompt, PromptPicker
from finetune_trainer.data.recognition import Recognised, check_settings, recognise_source
from finetune_trainer.data.report import EXAMPLES, Tally
from finetune_trainer.data.samples import Samples, SampleStore, SampleWriter
from finetune_trainer.data.sources import Fetch, Source, content_sha256, resolve_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """Everything a run needs of its data set."""

    train: Samples
    """The samples of one epoch; those of a source of weight 2 come twice."""
    validation: Samples | None
    report: DataReport
    generation_prompts: list[Prompt]
    """Prompts of held-out conversations, at most 16, in an order that depends on their content and the seed."""
    notes: tuple[str, ...] = ()
    """What a reader of the result should know about the data."""


def prepare(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    fetch: Fetch,
    *,
    seed: int,
    cache_dir: Path,
    rows_per_batch: int = 1,
) -> PreparedData:
    """Read, clean, render, tokenize and split the data set; the second time with the same input, read the cache.

    `fetch` gives the local files of a URI. `rows_per_batch` is only for the report's share of padding. Raises
    InputMissing, DataError, UsageError as the modules beside this one say, and DiskFull where the cache has no room.
    """
    check_settings(config)
    sources = resolve_sources(config, fetch)
    sha256 = content_sha256(sources)
    key = cache.cache_key(config, sources, sha256, tokenizer, seed)
    prepared = _load(cache_dir, key)
    if prepared is None:
        with cache.building(cache_dir, key) as folder:
            _build(config, tokenizer, sources, sha256, seed, folder)
        prepared = _open(cache.entry(cache_dir, key))
    return _with_padding(prepared, config, rows_per_batch, seed)


def _load(cache_dir: Path, key: str) -> PreparedData | None:
    """The cached data; None where there are none, or damaged ones, which are removed."""
    folder = cache.entry(cache_dir, key)
    if not folder.is_dir():
        return None
    try:
        prepared = _open(folder)
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError) as error:
        logger.warning("the cached data in %s are damaged and are made anew: %s", folder, error)
        cache.discard(cache_dir, key)
        return None
    logger.info("tokenized data read from the cache %s", folder)
    return prepared


def _open(folder: Path) -> PreparedData:
    store = SampleStore.open(folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    validation = folder / "validation.npy"
    return PreparedData(
        train=Samples(store, np.load(folder / "train.npy", allow_pickle=False)),
        validation=Samples(store, np.load(validation, allow_pickle=False)) if validation.exists() else None,
        report=DataReport.model_validate(summary["report"]),
        generation_prompts=[Prompt(**prompt) for prompt in summary["prompts"]],
        notes=tuple(summary["notes"]),
    )


def _build(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    sha256: str,
    seed: int,
    folder: Path,
) -> None:
    """Write a cache entry into `folder`."""
    tallies = (Tally(config.cleaning, "training data"), Tally(config.cleaning, "validation data"))
    seen: tuple[set[bytes], set[bytes]] = (set(), set())
    entries: tuple[list[Entry], list[Entry]] = ([], [])
    picker = PromptPicker(seed)
    formats = [recognise_source(config, source) for source in sources]
    has_validation_file = any(source.is_validation for source in sources)
    with SampleWriter(folder) as writer:
        builder = Builder(config, tokenizer, writer)
        for number, (source, recognised) in enumerate(zip(sources, formats, strict=True)):
            side = int(source.is_validation)
            offered = picker if source.is_validation or not has_validation_file else None
            entries[side].extend(builder.add(number, source, recognised.format, tallies[side], seen[side], offered))
    for tally, kept, is_validation in zip(tallies, entries, (False, True), strict=True):
        tally.check_invalid_share()
        if not is_validation or has_validation_file:
            tally.check_not_empty(len(kept), [s.uri for s in sources if s.is_validation is is_validation])

    training, validation, leaked = _split(config, entries, seed)
    tallies[0].check_not_empty(len(training), [], leaked=leaked)
    weights = [source.weight for source in sources if not source.is_validation]
    train_index, validation_index = epoch_index(training, weights, seed), sample_index(validation)
    np.save(folder / "train.npy", train_index)
    if config.validation is not None:
        np.save(folder / "validation.npy", validation_index)

    tokens, trained = Samples(SampleStore.open(folder), train_index).count_tokens()
    report = _report(tallies, sources, formats).model_copy(
        update={
            "sha256": sha256,
            "samples": len(train_index),
            "validation_samples": len(validation_index),
            "leaked": leaked,
            "tokens": tokens,
            "trained_tokens": trained,
        }
    )
    held_out = {entry.digest for entry in validation}
    summary = {
        "report": report.model_dump(mode="json"),
        "prompts": [asdict(prompt) for prompt in picker.picked(held_out)],
        "notes": [*_left_out(sources), *builder.notes()],
    }
    (folder / "summary.json").write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")


def _split(
    config: DatasetConfig, entries: tuple[list[Entry], list[Entry]], seed: int
) -> tuple[list[Entry], list[Entry], int]:
    """(training entries, validation entries, training rows dropped because they are held out as well)."""
    training, validation = entries
    if config.validation is None:
        return training, [], 0
    if config.validation.fraction is not None:
        training, validation = hold_out(training, config.validation.fraction, seed)
        return training, validation, 0
    kept = drop_leaked(training, validation)
    return kept, validation, len(training) - len(kept)


def _report(tallies: Sequence[Tally], sources: Sequence[Source], formats: Sequence[Recognised]) -> DataReport:
    several = len(sources) > 1
    reasons = [
        f"{source.uri}: {recognised.reason}" if several else recognised.reason
        for source, recognised in zip(sources, formats, strict=True)
        if recognised.reason
    ]
    return DataReport(
        sha256="",
        format=", ".join(dict.fromkeys(str(recognised.format) for recognised in formats)),
        format_reason="; ".join(reasons),
        rows=sum(tally.rows for tally in tallies),
        samples=0,
        invalid=sum(tally.invalid for tally in tallies),
        invalid_examples=tuple(example for tally in tallies for example in tally.examples)[:EXAMPLES],
        duplicates=sum(tally.duplicates for tally in tallies),
        short=sum(tally.short for tally in tallies),
        truncated=sum(tally.truncated for tally in tallies),
        dropped_overlong=sum(tally.dropped_overlong for tally in tallies),
    )


def _left_out(sources: Sequence[Source]) -> list[str]:
    return [
        f"{source.uri}: {', '.join(source.left_out)} belong to another split and were not trained on"
        for source in sources
        if source.left_out
    ]


def _with_padding(prepared: PreparedData, config: DatasetConfig, rows_per_batch: int, seed: int) -> PreparedData:
    lengths = prepared.train.lengths
    rows = lengths.tolist()
    if config.packing:
        rows = [int(lengths[row].sum()) for row in pack(rows, config.max_length)]
    share = padding_share(rows, rows_per_batch, seed)
    report = prepared.report.model_copy(update={"padding_share": share})
    return PreparedData(prepared.train, prepared.validation, report, prepared.generation_prompts, prepared.notes)
