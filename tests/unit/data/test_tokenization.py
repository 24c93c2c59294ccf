"""Characters to tokens, cutting, and plain text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from finetune_trainer.contract.vocabulary import Overlong
from finetune_trainer.data.template import Rendered
from finetune_trainer.data.tokenization import Encoder, trained_tokens
from finetune_trainer.errors import UsageError
from tests.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id

OFFSETS = {
    "whole tokens": ([(0, 2), (2, 5), (5, 6)], [(2, 5)], [False, True, False]),
    "a token that begins in the prompt holds a part of the answer": ([(0, 2), (2, 5)], [(3, 5)], [False, True]),
    "a leading space left out of the offsets": ([(0, 2), (3, 6), (6, 7)], [(2, 6)], [False, True, False]),
    "a space of the prompt, left out of its own offsets": ([(0, 5), (6, 6), (6, 9)], [(6, 9)], [False, False, True]),
    "parts of one character": ([(0, 1), (1, 2), (1, 2), (2, 3)], [(1, 2)], [False, True, True, False]),
    "a token without characters before the answer": ([(0, 2), (2, 2), (2, 4)], [(2, 4)], [False, True, True]),
    "a token without characters after the answer": (
        [(0, 2), (2, 4), (4, 4), (4, 5)],
        [(2, 4)],
        [False, True, False, False],
    ),
    "two answers": ([(0, 1), (1, 2), (2, 3), (3, 4)], [(1, 2), (3, 4)], [False, True, False, True]),
    "an empty answer": ([(0, 1), (1, 2)], [(1, 1)], [False, False]),
    "an empty answer within a token": ([(0, 2)], [(1, 1)], [False]),
    "no answer": ([(0, 1)], [], [False]),
    "no token": ([], [(0, 1)], []),
}


@pytest.mark.parametrize("case", OFFSETS)
def test_a_token_is_trained_where_it_overlaps_an_answer(case: str) -> None:
    offsets, spans, expected = OFFSETS[case]
    assert trained_tokens(offsets, spans).tolist() == expected


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60), st.data())
def test_trained_tokens_hold_the_answer_and_at_most_a_token_more_on_each_side(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    encoding = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = trained_tokens(encoding["offset_mapping"], [(start, end)])
    covered = {
        position
        for (first, last), is_trained in zip(encoding["offset_mapping"], trained.tolist(), strict=True)
        for position in range(first, last)
        if is_trained
    }
    assert covered >= set(range(start, end))
    for (first, last), is_trained in zip(encoding["offset_mapping"], trained.tolist(), strict=True):
        assert is_trained == (first < end and last > start and start < end)


def encoder(max_length: int = 8, overlong: Overlong = Overlong.TRUNCATE) -> Encoder:
    return Encoder(TOKENIZER, max_length, overlong)


@pytest.mark.parametrize(
    ("length", "overlong", "tokens", "usable", "is_overlong"),
    [
        (8, Overlong.TRUNCATE, 8, True, False),
        (9, Overlong.TRUNCATE, 8, True, True),
        (8, Overlong.DROP, 8, True, False),
        (9, Overlong.DROP, 0, False, True),
    ],
)
def test_samples_are_cut_or_dropped_above_the_maximum_length(
    length: int, overlong: Overlong, tokens: int, usable: bool, is_overlong: bool
) -> None:
    text = "!" * length
    (sample,) = encoder(overlong=overlong).encode([Rendered(text, ((0, length),))])
    assert (len(sample.input_ids), sample.is_usable, sample.is_overlong) == (tokens, usable, is_overlong)


def test_a_sample_whose_answer_is_cut_off_is_not_usable() -> None:
    (sample,) = encoder().encode([Rendered("!" * 12, ((8, 12),))])
    assert sample.is_overlong
    assert not sample.is_usable


def test_plain_text_ends_with_the_end_of_sequence_and_is_learnt_whole() -> None:
    (sample,) = encoder().encode([Rendered("!!", (), is_document=True)])
    assert TOKENIZER.decode(sample.input_ids) == "!!<|im_end|>"
    assert sample.trained.tolist() == [False, True, True]


def test_plain_text_gets_what_the_tokenizer_adds_and_one_end_only() -> None:
    tokenizer = tiny_tokenizer(None, bos="<s>", eos="</s>", adds_bos=True)
    samples = Encoder(tokenizer, 8, Overlong.TRUNCATE).encode(
        [Rendered("!", (), is_document=True), Rendered("!</s>", (), is_document=True)]
    )
    assert [tokenizer.decode(sample.input_ids) for sample in samples] == ["<s>!</s>", "<s>!</s>"]


def test_chats_and_texts_keep_their_order() -> None:
    samples = encoder().encode(
        [Rendered("a", ((0, 1),)), Rendered("b", (), is_document=True), Rendered("c", ((0, 1),))]
    )
    assert [TOKENIZER.decode(sample.input_ids) for sample in samples] == ["a", "b<|im_end|>", "c"]
    assert encoder().encode([]) == []


def test_arrays_are_compact() -> None:
    (sample,) = encoder().encode([Rendered("a", ((0, 1),))])
    assert (sample.input_ids.itemsize, sample.trained.itemsize) == (4, 1)


def test_a_tokenizer_without_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        encoder()
