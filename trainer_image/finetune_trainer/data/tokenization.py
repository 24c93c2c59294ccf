"""Text to token ids, and the characters to be learnt to the tokens to be learnt.

Tokenization runs on the fast tokenizer's own threads: processes gave nothing on top (measured), and forking a process
that has started threads or CUDA is not safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from finetune_trainer.contract.vocabulary import Overlong
from finetune_trainer.data.rendering import Span
from finetune_trainer.data.template import Rendered
from finetune_trainer.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample."""

    input_ids: IntArray
    """[n]"""
    trained: BoolArray
    """[n], whether the loss is taken over predicting this token. Never for the first, which nothing predicts."""
    is_overlong: bool = False
    """Whether it was longer than the maximum length."""

    @property
    def is_usable(self) -> bool:
        """Whether there is anything to learn from it."""
        return bool(self.trained.any())


class Encoder:
    """Tokenizes samples and cuts them at `max_length` tokens. Raises UsageError for a tokenizer without offsets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, overlong: Overlong) -> None:
        if not tokenizer.is_fast:
            raise UsageError(
                f"the tokenizer {type(tokenizer).__name__} cannot tell which characters a token covers, which placing "
                "the loss needs; use a model that has a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._overlong = overlong

    def encode(self, samples: Sequence[Rendered]) -> list[Encoded]:
        """One result for each sample, in their order. With `overlong: drop`, a long one has no trained token."""
        inputs = self._encode_inputs([sample for sample in samples if sample.is_input])
        chats = self._encode_chats([sample for sample in samples if not sample.is_document and not sample.is_input])
        documents = self._encode_documents([sample for sample in samples if sample.is_document])

        def kind(sample: Rendered) -> Iterator[Encoded]:
            return inputs if sample.is_input else documents if sample.is_document else chats

        return [self._cut(next(kind(sample))) for sample in samples]

    def _encode_inputs(self, samples: Sequence[Rendered]) -> Iterator[Encoded]:
        """As `tokenizer(text)` gives them, so that whoever uses the result gets the same tokens."""
        for sample in samples:
            ids = self._tokenizer(
                sample.text, add_special_tokens=not sample.is_templated, return_attention_mask=False, verbose=False
            )["input_ids"]
            yield Encoded(np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=np.bool_))

    def _encode_chats(self, samples: Sequence[Rendered]) -> Iterator[Encoded]:
        if not samples:
            return
        # The template writes every special token itself, a first one included.
        batch = self._tokenizer(
            [sample.text for sample in samples],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for sample, ids, offsets in zip(samples, batch["input_ids"], batch["offset_mapping"], strict=True):
            yield _encoded(ids, trained_tokens(offsets, sample.spans))

    def _encode_documents(self, samples: Sequence[Rendered]) -> Iterator[Encoded]:
        if not samples:
            return
        eos = self._tokenizer.eos_token_id
        batch = self._tokenizer(
            [sample.text for sample in samples],
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for sample, ids, offsets in zip(samples, batch["input_ids"], batch["offset_mapping"], strict=True):
            ends = eos is None or (len(ids) > 0 and ids[-1] == eos)
            whole = ids if ends else [*ids, eos]
            trained = np.ones(len(whole), dtype=np.bool_)
            if sample.spans:
                trained[: len(ids)] = trained_tokens(offsets, sample.spans)
                # What ends the text is learnt, whether the tokenizer wrote it or not.
                trained[-1] = True
            yield _encoded(whole, trained)

    def _cut(self, sample: Encoded) -> Encoded:
        if len(sample.input_ids) <= self._max_length:
            return sample
        if self._overlong is Overlong.DROP:
            return Encoded(sample.input_ids[:0], sample.trained[:0], is_overlong=True)
        return Encoded(sample.input_ids[: self._max_length], sample.trained[: self._max_length], is_overlong=True)


def trained_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> BoolArray:
    """[n], which tokens overlap one of the spans of characters.

    Byte-level tokenizers may leave a leading space out of a token's offsets, and give each part of a character that
    they split the whole of it: a token covers the characters from where the one before it ended, or from its own start
    where that is earlier. A token without characters belongs to the span that it stands in or before.
    """
    if not len(offsets):
        return np.zeros(0, dtype=np.bool_)
    table = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    ends = table[:, 1]
    starts = np.minimum(table[:, 0], np.concatenate(([0], ends[:-1])))
    empty = starts == ends
    trained = np.zeros(len(table), dtype=np.bool_)
    for start, end in spans:
        if start == end:
            # An empty answer has nothing to learn, not even the token that it stands in the middle of.
            continue
        trained |= (starts < end) & ((ends > start) | (empty & (starts == start)))
    return trained


def _encoded(ids: Sequence[int], trained: BoolArray) -> Encoded:
    trained[:1] = False
    return Encoded(np.asarray(ids, dtype=np.int32), trained)
