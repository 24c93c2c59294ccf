"""Rows that resemble an earlier one are found, and others are not."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.data import near_duplicates
from finetune_trainer.data.near_duplicates import NearDuplicates, shingles
from finetune_trainer.errors import UsageError


def matches(texts: Sequence[str], folder: Path, threshold: float = 0.8) -> dict[int, int]:
    finder = NearDuplicates(threshold, folder)
    try:
        for text in texts:
            finder.add(text)
        return finder.matches()
    finally:
        finder.close()


def jaccard(first: str, second: str) -> float:
    one, other = set(shingles(first).tolist()), set(shingles(second).tolist())
    return len(one & other) / len(one | other)


def words(count: int, seed: int) -> list[str]:
    source = random.Random(seed)
    return ["".join(source.choices("abcdefghijklmnop", k=source.randint(2, 8))) for _ in range(count)]


def test_rows_with_a_word_changed_are_found_among_others(tmp_path: Path) -> None:
    originals = [words(100, seed) for seed in range(60)]
    changed = [[*text[:50], "other", *text[51:]] for text in originals[::3]]
    texts = [" ".join(text) for text in (*originals, *changed)]
    assert all(jaccard(" ".join(a), " ".join(b)) > 0.9 for a, b in zip(originals[::3], changed, strict=True))
    assert matches(texts, tmp_path) == {60 + number: 3 * number for number in range(20)}
    assert not list(tmp_path.iterdir()), "nothing is left on the disk"


@pytest.mark.parametrize(("changes", "found"), [(2, True), (30, False)])
def test_the_threshold_is_kept(tmp_path: Path, changes: int, found: bool) -> None:
    text = words(200, 1)
    other = [word if number >= changes else "changed" + word for number, word in enumerate(text)]
    assert (jaccard(" ".join(text), " ".join(other)) > 0.9) is found
    assert bool(matches([" ".join(text), " ".join(other)], tmp_path, 0.9)) is found


SCRIPTS = {
    "japanese": "運転者は計画を確認し、各段階の損失と必要な記憶容量を報告します。",
    "thai": "ผู้ดูแลระบบตรวจสอบแผนงานและรายงานค่าความสูญเสียของแต่ละขั้นตอน",
    "korean": "운영자는 계획을 확인하고 각 단계의 손실과 필요한 메모리 용량을 보고합니다.",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_languages_without_spaces(tmp_path: Path, script: str) -> None:
    text = SCRIPTS[script] * 2
    other = SCRIPTS[script][::-1]
    assert matches([text, other, text + "!"], tmp_path) == {2: 0}


def test_case_width_and_white_space_do_not_count(tmp_path: Path) -> None:
    assert matches(["The plan: 7 steps.", "the  PLAN:\n\uff17 steps. "], tmp_path, 1.0) == {1: 0}
    assert matches(["", " ", "a", "b"], tmp_path, 1.0) == {1: 0}


def test_a_row_that_is_dropped_drops_no_other(tmp_path: Path) -> None:
    text = words(100, 3)
    # Each resembles the one before; the last one no longer resembles the first.
    chain = [" ".join(text[8 * step :]) for step in range(4)]
    assert all(jaccard(one, other) > 0.88 for one, other in pairwise(chain))
    assert jaccard(chain[0], chain[3]) < 0.8
    found = matches(chain, tmp_path, 0.85)
    assert found[1] == 0
    assert set(found.values()) <= {0, 2}, "what was dropped drops nothing"
    assert not set(found) & set(found.values())


def test_a_bucket_that_holds_everything_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_REPRESENTATIVES", 3)
    same = " ".join(words(60, 5))
    assert matches([same] * 200, tmp_path) == dict.fromkeys(range(1, 200), 0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([" ".join(words(30, seed)) for seed in range(6)]), max_size=12))
def test_what_is_left_is_the_first_of_each_kind(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    found = matches(texts, tmp_path_factory.mktemp("near"))
    assert found == {number: texts.index(text) for number, text in enumerate(texts) if texts.index(text) != number}


def test_a_huge_row_is_read_in_parts(tmp_path: Path) -> None:
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 110, 50_000)))
    assert matches([text, text[:-100]], tmp_path) == {1: 0}


def test_without_datasketch_the_error_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UsageError, match=r"nearDuplicates needs the package datasketch.*\[trainer\]"):
        NearDuplicates(0.8, tmp_path)
