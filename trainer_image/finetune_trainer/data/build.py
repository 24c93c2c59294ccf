"""Rows to tokenized samples: parse, clean, render, tokenize, a batch at a time, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune_trainer.contract.config import DatasetConfig
from finetune_trainer.data.cleaning import Entry
from finetune_trainer.data.conversation import Conversation, Document
from finetune_trainer.data.labeled import LabelBook, Labeled, check_classes
from finetune_trainer.data.preference import Judged, Pair
from finetune_trainer.data.prompts import Prompt, PromptPicker
from finetune_trainer.data.purpose import AnySample, Purpose
from finetune_trainer.data.recognition import Recognised
from finetune_trainer.data.rendering import RENDERED_ON
from finetune_trainer.data.report import Tally
from finetune_trainer.data.rows import RowError
from finetune_trainer.data.samples import Index, SampleWriter, save_array
from finetune_trainer.data.screening import Screen, Screened
from finetune_trainer.data.sources import Source
from finetune_trainer.data.template import ChatTemplate, Rendered
from finetune_trainer.data.tokenization import Encoded, Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class _Clean:
    row: Screened
    rendered: list[Rendered]


class Builder:
    """Turns sources into samples of one store, and keeps account of every row."""

    def __init__(
        self,
        config: DatasetConfig,
        tokenizer: PreTrainedTokenizerBase,
        writer: SampleWriter,
        purpose: Purpose,
        screen: Screen,
    ) -> None:
        self._config = config
        self._screen = screen
        self.labels: list[float] = []
        """Of every sample that was written, where samples are judged."""
        self.book = LabelBook(purpose.head) if purpose.head is not None else None
        self._tokenizer = tokenizer
        self._writer = writer
        self._encoder = Encoder(tokenizer, config.max_length, config.overlong)
        # Made for the first conversation: plain text needs none.
        self._template: ChatTemplate | None = None
        self._plain_pairs = 0

    def add(
        self,
        number: int,
        source: Source,
        formats: Mapping[Path, Recognised],
        tally: Tally,
        picker: PromptPicker | None,
    ) -> Iterator[Entry]:
        """Write the samples of a source; an entry for each row that is used.

        Raises what reading and the template raise, and DataError at the first invalid row where none is allowed.
        """
        clean = self._clean_rows(source, formats, tally)
        left = math.inf if source.max_samples is None else source.max_samples
        # No row is read ahead that is not wanted: others would count as repetitions of it.
        while batch := list(islice(clean, int(min(_BATCH_ROWS, left)))):
            encoded = iter(self._encoder.encode([part for item in batch for part in item.rendered]))
            for item in batch:
                parts = [next(encoded) for _ in item.rendered]
                entry = self._store(number, item, parts, tally)
                if entry is not None:
                    left -= 1
                    conversation = _conversation_of(item.row.sample)
                    if picker is not None and conversation is not None and not item.rendered[0].is_document:
                        picker.offer(conversation, item.row.digest, self._prompt_tokens)
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
        if self._template is not None and self._template.prints_date:
            notes.append(
                f"the chat template prints the current date; it was rendered as of {RENDERED_ON:%d %B %Y} throughout"
            )
        if self._plain_pairs:
            notes.append(
                f"{self._plain_pairs} prompts were joined with their completions as plain text: the model has no chat "
                "template"
            )
        return notes

    def _clean_rows(self, source: Source, formats: Mapping[Path, Recognised], tally: Tally) -> Iterator[_Clean]:
        for file, recognised in formats.items():
            for row in source.rows(file):
                tally.rows += 1
                try:
                    screened = self._screen.check(row, recognised.format, is_validation=source.is_validation)
                    rendered = self._render(screened.sample)
                except RowError as error:
                    tally.add_rejected(row.where, error)
                    continue
                self._screen.remember(screened, is_validation=source.is_validation)
                yield _Clean(screened, rendered)

    def _render(self, sample: AnySample) -> list[Rendered]:
        if isinstance(sample, Document):
            return [Rendered(sample.text, (), is_document=True)]
        if isinstance(sample, Conversation) and sample.is_plain and not self._tokenizer.chat_template:
            return [self._joined(*(str(message["content"]) for message in sample.messages))]
        if isinstance(sample, Labeled) and isinstance(text := sample.input, str):
            return [Rendered(text, (), is_input=True)]
        if self._template is None:
            self._template = ChatTemplate(
                self._tokenizer,
                train_on_prompt=self._config.train_on_prompt,
                mask_history=self._config.mask_history,
            )
        match sample:
            case Labeled():
                return [self._template.render_input(sample.turns)]
            case Pair():
                return [self._template.render_answer(side, sample.shared) for side in (sample.chosen, sample.rejected)]
            case Judged():
                return [self._template.render_answer(sample.conversation, len(sample.conversation.messages) - 1)]
            case Conversation():
                return self._template.render(sample)

    def _prompt_tokens(self, prompt: Prompt) -> float:
        """Tokens of what a model is asked; infinitely many where the template refuses it."""
        assert self._template is not None, "the conversation was rendered with it"
        try:
            text = self._template.render_prompt(prompt.messages, prompt.tools)
        except RowError:
            return math.inf
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _joined(self, prompt: str, completion: str) -> Rendered:
        self._plain_pairs += 1
        start = 0 if self._config.train_on_prompt else len(prompt)
        return Rendered(prompt + completion, ((start, len(prompt) + len(completion)),), is_document=True)

    def _store(self, number: int, item: _Clean, parts: list[Encoded], tally: Tally) -> Entry | None:
        row = item.row
        usable = [part for part in parts if part.is_usable]
        if isinstance(row.sample, Pair) and len(usable) < len(parts):
            # Half a pair prefers nothing.
            usable = []
        cut_off = [part for part in parts if part.is_overlong and not part.is_usable]
        for _ in cut_off:
            tally.add("dropped_overlong", row.place, f"longer than {self._config.max_length} tokens")
        for part in usable:
            if part.is_overlong:
                tally.add("truncated", row.place, f"cut to {self._config.max_length} tokens")
        if not usable:
            if not cut_off:
                tally.add_rejected(row.place, RowError("no token to learn: the answers are empty once rendered"))
            return None
        numbers = [self._writer.append(part) for part in usable]
        self.labels += self._labels_of(row.sample)
        self._screen.keep(row.sample)
        return Entry(row.digest, number, numbers[0], len(numbers), row.place)

    def _labels_of(self, sample: AnySample) -> list[float]:
        """Of each of its samples; nothing where samples are not judged."""
        match sample:
            case Labeled() if self.book is not None:
                return [self.book.number(sample.label)]
            case Judged():
                return [float(sample.liked)]
            case Pair():
                return [1.0, 0.0]
            case _:
                return []


def _conversation_of(sample: AnySample) -> Conversation | None:
    """The conversation that a model may be asked to continue; None where there is none, or none worth continuing."""
    match sample:
        case Conversation():
            return sample
        case Pair():
            return sample.chosen
        case Judged(liked=True):
            return sample.conversation
        case _:
            return None


def save_labels(folder: Path, builder: Builder, training: Index, validation: Index) -> dict[str, int]:
    """Write `labels.npy`, where samples are judged; the training samples of each class.

    training, validation: [samples], their numbers. Raises what `check_classes` raises.
    """
    if not builder.labels:
        return {}
    labels = np.asarray(builder.labels) if builder.book is None else builder.book.settled(builder.labels)
    save_array(folder / "labels.npy", labels)
    if builder.book is None:
        liked = int(labels[training].sum())
        return {"liked": liked, "disliked": len(training) - liked}
    names = builder.book.names()
    return check_classes(names, labels[training], labels[validation]) if names else {}
