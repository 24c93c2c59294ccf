"""Rows to tokenized samples: parse, clean, render, tokenize, a batch at a time, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from finetune_trainer.contract.config import DatasetConfig
from finetune_trainer.contract.vocabulary import DatasetFormat
from finetune_trainer.data.cleaning import Entry
from finetune_trainer.data.conversation import Conversation, Sample
from finetune_trainer.data.formats import parse
from finetune_trainer.data.prompts import PromptPicker
from finetune_trainer.data.report import Tally
from finetune_trainer.data.rows import Row, RowError
from finetune_trainer.data.samples import SampleWriter
from finetune_trainer.data.sources import Source
from finetune_trainer.data.template import ChatTemplate, Rendered
from finetune_trainer.data.tokenization import Encoded, Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class _Clean:
    row: Row
    sample: Sample
    digest: bytes
    rendered: list[Rendered]


class Builder:
    """Turns sources into samples of one store, and keeps account of every row."""

    def __init__(self, config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, writer: SampleWriter) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._writer = writer
        self._encoder = Encoder(tokenizer, config.max_length, config.overlong)
        # Made for the first conversation: plain text needs none.
        self._template: ChatTemplate | None = None

    def add(
        self,
        number: int,
        source: Source,
        format_: DatasetFormat,
        tally: Tally,
        seen: set[bytes],
        picker: PromptPicker | None,
    ) -> Iterator[Entry]:
        """Write the samples of a source; an entry for each row that is used.

        `seen` holds the digests of the rows before, and is extended. Raises what reading and the template raise, and
        DataError at the first invalid row where none is allowed.
        """
        clean = self._clean_rows(source, format_, tally, seen)
        while batch := list(islice(clean, _BATCH_ROWS)):
            encoded = iter(self._encoder.encode([part for item in batch for part in item.rendered]))
            for item in batch:
                parts = [next(encoded) for _ in item.rendered]
                entry = self._store(number, item, parts, tally)
                if entry is not None:
                    if picker is not None and isinstance(item.sample, Conversation):
                        picker.offer(item.sample, item.digest)
                    yield entry

    def notes(self) -> list[str]:
        """What a reader of the result should know."""
        notes = []
        if self._template is not None and self._template.split_conversations:
            notes.append(
                f"{self._template.split_conversations} conversations became one sample for each answer: the chat "
                "template renders earlier turns differently once more turns follow"
            )
        if self._template is not None and self._template.appended_eos:
            notes.append(
                f"the end-of-sequence token was added to {self._template.appended_eos} samples: the chat template "
                "writes no token after the last answer"
            )
        return notes

    def _clean_rows(self, source: Source, format_: DatasetFormat, tally: Tally, seen: set[bytes]) -> Iterator[_Clean]:
        cleaning = self._config.cleaning
        for row in source.rows():
            tally.rows += 1
            try:
                sample, digest = _parsed(row, format_)
                if sample.answer_characters() < cleaning.min_characters:
                    tally.short += 1
                elif cleaning.deduplicate and digest in seen:
                    tally.duplicates += 1
                else:
                    rendered = self._render(sample)
                    seen.add(digest)
                    yield _Clean(row, sample, digest, rendered)
            except RowError as error:
                tally.add_invalid(row, error)

    def _render(self, sample: Sample) -> list[Rendered]:
        if not isinstance(sample, Conversation):
            return [Rendered(sample.text, (), is_document=True)]
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer, train_on_prompt=self._config.train_on_prompt)
        return self._template.render(sample)

    def _store(self, number: int, item: _Clean, parts: list[Encoded], tally: Tally) -> Entry | None:
        usable = [part for part in parts if part.is_usable]
        cut_off = sum(part.is_overlong for part in parts if not part.is_usable)
        tally.dropped_overlong += cut_off
        tally.truncated += sum(part.is_overlong for part in usable)
        if not usable:
            if not cut_off:
                tally.add_invalid(item.row, RowError("no token to learn: the answers are empty once rendered"))
            return None
        numbers = [self._writer.append(part) for part in usable]
        return Entry(item.digest, number, numbers[0], len(numbers))


def _parsed(row: Row, format_: DatasetFormat) -> tuple[Sample, bytes]:
    if row.value is None:
        raise row.error or RowError("the row has no value")
    sample = parse(format_, row.value)
    return sample, sample.digest()
