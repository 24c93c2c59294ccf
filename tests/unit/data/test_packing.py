"""Each sample in one row, no row too long, few rows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.data.packing import pack, padding_share

CAPACITY = 64
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=200)


@given(LENGTHS)
def test_every_sample_is_in_one_row_and_no_row_is_too_long(lengths: list[int]) -> None:
    rows = pack(lengths, CAPACITY)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(row for row in rows)
    assert all(sum(lengths[number] for number in row) <= CAPACITY for row in rows)


@given(LENGTHS)
def test_the_same_rows_for_the_same_input(lengths: list[int]) -> None:
    assert pack(list(lengths), CAPACITY) == pack(tuple(lengths), CAPACITY)


@given(LENGTHS)
def test_no_more_than_twice_the_least_possible_rows(lengths: list[int]) -> None:
    assert len(pack(lengths, CAPACITY)) <= max(1, 2 * math.ceil(sum(lengths) / CAPACITY))


@given(LENGTHS)
def test_no_two_rows_could_share_one(lengths: list[int]) -> None:
    fill = sorted(sum(lengths[number] for number in row) for row in pack(lengths, CAPACITY))
    assert len(fill) < 2 or fill[0] + fill[1] > CAPACITY


@given(LENGTHS)
@settings(max_examples=50)
def test_it_is_best_fit_decreasing(lengths: list[int]) -> None:
    """A direct rendering of the definition, which looks at every row each time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [row for row in range(len(rooms)) if rooms[row] >= length]
        if fits:
            rooms[min(fits, key=lambda row: rooms[row])] -= length
        else:
            rooms.append(CAPACITY - length)
    packed = [CAPACITY - sum(lengths[number] for number in row) for row in pack(lengths, CAPACITY)]
    assert sorted(packed) == sorted(rooms)


def test_rows_and_samples_keep_their_order() -> None:
    assert pack([3, 9, 4, 7, 1], 10) == [[0, 3], [1, 4], [2]]


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 1 has 11 tokens"):
        pack([3, 11], 10)


def test_many_samples_waste_little_and_take_no_time() -> None:
    lengths = [1 + (number * 7919) % 2048 for number in range(200_000)]
    assert len(pack(lengths, 2048)) < 1.01 * sum(lengths) / 2048


@pytest.mark.parametrize(
    ("lengths", "rows_per_batch", "share"), [([4, 2], 2, 0.25), ([4, 2], 1, 0.0), ([5, 5, 5], 2, 0.0), ([], 4, 0.0)]
)
def test_padding_fills_rows_up_to_the_longest_of_a_batch(lengths: list[int], rows_per_batch: int, share: float) -> None:
    assert padding_share(lengths, rows_per_batch, seed=0) == share


def test_padding_is_the_same_for_the_same_seed() -> None:
    lengths = list(range(1, 50))
    assert padding_share(lengths, 4, seed=1) == padding_share(lengths, 4, seed=1) != padding_share(lengths, 4, seed=2)
