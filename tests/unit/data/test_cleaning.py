"""What is held out, and how often each row is seen."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data.cleaning import Entry, epoch_index, hold_out, rank, sample_index
from finetune_trainer.errors import DataError, UsageError


def entries(count: int, *, source: int = 0, first: int = 0) -> list[Entry]:
    return [
        Entry(hashlib.blake2b(str(n).encode(), digest_size=16).digest(), source, n) for n in range(first, first + count)
    ]


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 2**31), st.randoms())
def test_the_same_rows_are_held_out_in_any_order(
    count: int, fraction: float, seed: int, shuffler: random.Random
) -> None:
    rows = entries(count)
    training, validation = hold_out(rows, seed, fraction=fraction)
    shuffled = shuffler.sample(rows, count)
    assert {e.digest for e in hold_out(shuffled, seed, fraction=fraction)[1]} == {e.digest for e in validation}
    assert sorted([*training, *validation], key=lambda e: e.first) == rows
    assert len(validation) == min(max(1, round(fraction * count)), count - 1)


def test_another_seed_holds_out_others() -> None:
    assert hold_out(entries(100), 0, fraction=0.1)[1] != hold_out(entries(100), 1, fraction=0.1)[1]


def test_equal_rows_stay_on_one_side() -> None:
    rows = [*entries(10), *entries(10)]
    training, validation = hold_out(rows, 0, fraction=0.3)
    assert len(validation) == 6
    assert not {e.digest for e in training} & {e.digest for e in validation}


def test_a_single_row_cannot_be_split() -> None:
    with pytest.raises(DataError, match="a single usable row"):
        hold_out([*entries(1), *entries(1)], 0, fraction=0.5)


def test_a_number_of_rows_is_held_out() -> None:
    rows = entries(20)
    training, validation = hold_out(rows, 0, count=7)
    assert (len(training), len(validation)) == (13, 7)
    assert {e.digest for e in validation} < {e.digest for e in hold_out(rows, 0, count=8)[1]}


@pytest.mark.parametrize("count", [20, 21])
def test_not_all_rows_can_be_held_out(count: int) -> None:
    with pytest.raises(DataError, match=rf"validation\.count: {count} rows cannot be held out of 20"):
        hold_out(entries(20), 0, count=count)


def test_rank_depends_on_seed_and_content() -> None:
    assert len({rank(seed, digest) for seed in (0, 1, -1) for digest in (b"a", b"b")}) == 6


def test_samples_of_entries() -> None:
    assert sample_index([Entry(b"a", 0, 3, 2), Entry(b"b", 0, 0)]).tolist() == [3, 4, 0]
    assert sample_index([]).tolist() == []


@pytest.mark.parametrize(
    ("weight", "expected"), [(1.0, 10), (2.0, 20), (0.5, 5), (2.5, 25), (0.01, 1), (1.01, 10), (0.25, 2)]
)
def test_a_weight_says_how_often_the_samples_of_a_source_are_seen(weight: float, expected: int) -> None:
    index = epoch_index(entries(10), [weight], 0).tolist()
    assert len(index) == expected
    assert {index.count(n) for n in range(10)} <= {int(weight), int(weight) + 1}


def test_sources_are_weighted_by_themselves() -> None:
    rows = [*entries(4), *entries(4, source=1, first=4)]
    index = epoch_index(rows, [1.0, 2.0], 0).tolist()
    assert sorted(index) == sorted([*range(8), *range(4, 8)])
    assert index[:8] == list(range(8))


def test_a_part_of_a_source_depends_on_the_seed_alone() -> None:
    rows = entries(40)
    assert epoch_index(rows, [0.5], 0).tolist() == epoch_index(rows, [0.5], 0).tolist()
    assert epoch_index(rows, [0.5], 0).tolist() != epoch_index(rows, [0.5], 1).tolist()
    assert set(epoch_index(rows[::-1], [0.5], 0).tolist()) == set(epoch_index(rows, [0.5], 0).tolist())


def test_an_epoch_without_end_is_refused() -> None:
    with pytest.raises(UsageError, match="lower them"):
        epoch_index(entries(2), [1e12], 0)
