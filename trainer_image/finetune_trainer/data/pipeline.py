"""From the data set's files to tokenized samples, by way of the cache: the one entry point of the data package."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune_trainer.contract.config import DatasetConfig
from finetune_trainer.contract.manifest import DataReport
from finetune_trainer.data import cache
from finetune_trainer.data.build import Builder, save_labels
from finetune_trainer.data.cleaning import Entry, epoch_index, hold_out, in_mixed_order, sample_index
from finetune_trainer.data.packing import pack, padding_share
from finetune_trainer.data.prompts import Prompt, PromptPicker
from finetune_trainer.data.purpose import Purpose
from finetune_trainer.data.recognition import SUPERVISED, Recognised, check_settings, explain, recognise_source
from finetune_trainer.data.report import KINDS, Tally, examples_of
from finetune_trainer.data.samples import Samples, SampleStore, SampleWriter, save_array
from finetune_trainer.data.screening import Screen
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
    """In an order that depends on their content and the seed; the samples of a row follow each other."""
    report: DataReport
    generation_prompts: list[Prompt]
    """Prompts of held-out conversations, at most 1000, in an order that depends on their content and the seed."""
    notes: tuple[str, ...] = ()
    """What a reader of the result should know about the data."""
    classes: tuple[str, ...] = ()
    """For a classifier: the names of the classes, in the order of their numbers."""


def prepare(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    fetch: Fetch,
    *,
    seed: int,
    cache_dir: Path,
    rows_per_batch: int = 1,
    purpose: Purpose = SUPERVISED,
) -> PreparedData:
    """Read, clean, render, tokenize and split the data set; the second time with the same input, read the cache.

    `fetch` gives the local files of a URI. `rows_per_batch` is only for the report's share of padding. `purpose` says
    what samples are made of the rows: of a pair, two that follow each other, the chosen answer first. Raises
    InputMissing, DataError, UsageError as the modules beside this one say, and DiskFull where the cache has no room.
    """
    check_settings(config)
    purpose.check_settings(config)
    sources = resolve_sources(config, fetch)
    sha256 = content_sha256(sources)
    key = cache.cache_key(config, sources, sha256, tokenizer, seed, purpose)
    prepared = _load(cache_dir, key)
    if prepared is None:
        with cache.building(cache_dir, key) as folder:
            _build(config, tokenizer, sources, sha256, seed, folder, purpose)
            # What is open stays readable, whatever another process does to the entry.
            prepared = _open(folder)
    return _with_padding(prepared, config, rows_per_batch, seed)


def _load(cache_dir: Path, key: str) -> PreparedData | None:
    """The cached data; None where there are none, or damaged ones, which are removed."""
    folder = cache.entry(cache_dir, key)
    if not folder.is_dir():
        return None
    try:
        cache.check(folder)
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
        classes=tuple(summary["classes"]),
    )


def _build(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    sha256: str,
    seed: int,
    folder: Path,
    purpose: Purpose,
) -> None:
    """Write a cache entry into `folder`."""
    tallies = (Tally(config.cleaning, "training data"), Tally(config.cleaning, "validation data"))
    formats = [recognise_source(config, source, purpose) for source in sources]
    picker = PromptPicker(seed, config.max_length)
    screen = Screen(config, purpose, folder)
    with closing(screen), SampleWriter(folder) as writer:
        builder = Builder(config, tokenizer, writer, purpose, screen)
        validation, training = _read(builder, screen, sources, formats, tallies, picker)
    if config.validation is not None and config.validation.uri is None:
        wanted = config.validation
        training, validation = hold_out(training, seed, fraction=wanted.fraction, count=wanted.count)
    weights = [source.weight for source in sources if not source.is_validation]
    train_index = epoch_index(training, weights, seed)
    validation_index = sample_index(in_mixed_order(validation, seed))
    save_array(folder / "train.npy", train_index)
    if config.validation is not None:
        save_array(folder / "validation.npy", validation_index)

    classes = save_labels(folder, builder, train_index, validation_index)

    tokens, trained = Samples(SampleStore.open(folder), train_index).count_tokens()
    report = _report(tallies, sources, formats).model_copy(
        update={
            "sha256": sha256,
            "samples": len(train_index),
            "validation_samples": len(validation_index),
            "tokens": tokens,
            "trained_tokens": trained,
            "classes": classes,
        }
    )
    held_out = {entry.digest for entry in validation}
    summary = {
        "report": report.model_dump(mode="json"),
        "prompts": [asdict(prompt) for prompt in picker.picked(held_out)],
        "notes": [*_left_out(sources), *builder.notes(), *picker.notes(held_out)],
        "classes": list(builder.book.names()) if builder.book is not None else [],
    }
    (folder / "summary.json").write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")


def _read(
    builder: Builder,
    screen: Screen,
    sources: Sequence[Source],
    formats: Sequence[Mapping[Path, Recognised]],
    tallies: tuple[Tally, Tally],
    picker: PromptPicker,
) -> tuple[list[Entry], list[Entry]]:
    """(validation, training) entries. Raises DataError where too many rows are broken, or none is left."""
    entries: tuple[list[Entry], list[Entry]] = ([], [])
    has_validation_file = any(source.is_validation for source in sources)
    numbered = list(enumerate(zip(sources, formats, strict=True)))
    # Training rows that also stand in the validation data are known only once these were read.
    for number, (source, found) in sorted(numbered, key=lambda one: not one[1][0].is_validation):
        offered = picker if source.is_validation or not has_validation_file else None
        side = source.is_validation
        entries[side].extend(builder.add(number, source, found, tallies[side], offered))
    for tally in tallies:
        tally.check_invalid_share()
    validation, training = screen.without_near_duplicates(entries[1], entries[0], tallies)
    tallies[0].check_not_empty(len(training), [source.uri for source in sources if not source.is_validation])
    if has_validation_file:
        tallies[1].check_not_empty(len(validation), [source.uri for source in sources if source.is_validation])
    return validation, training


def _report(
    tallies: Sequence[Tally], sources: Sequence[Source], formats: Sequence[Mapping[Path, Recognised]]
) -> DataReport:
    several = len(sources) > 1
    reasons = [
        f"{source.uri}: {reason}" if several else reason
        for source, found in zip(sources, formats, strict=True)
        if (reason := explain(source, found))
    ]
    names = dict.fromkeys(str(recognised.format) for found in formats for recognised in found.values())
    return DataReport(
        sha256="",
        format=", ".join(names),
        format_reason="; ".join(reasons),
        rows=sum(tally.rows for tally in tallies),
        samples=0,
        examples=examples_of(tallies),
        **{kind: sum(tally.counts[kind] for tally in tallies) for kind in KINDS},
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
    return replace(prepared, report=report)
