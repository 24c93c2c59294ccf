"""BLEU, ROUGE and exact match against values worked out by hand, and in languages without spaces."""

from __future__ import annotations

import pytest
from sacrebleu.metrics.bleu import BLEU

from finetune_trainer.contract.vocabulary import Metric
from finetune_trainer.evaluation.text import METRICS, text_metrics, words

ALL = tuple(METRICS)


def test_equal_answers_have_the_best_scores_and_others_the_worst() -> None:
    sentence = "the operator plans the job and follows it"
    assert text_metrics(ALL, [sentence], [sentence]) == pytest.approx(
        {"bleu": 100.0, "rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0, "exactMatch": 1.0}
    )
    worst = text_metrics(ALL, ["something else entirely"], [sentence])
    assert worst["rouge1"] == worst["rougeL"] == worst["exactMatch"] == 0.0
    assert worst["bleu"] < 10
    assert text_metrics(ALL, [""], [sentence])["rouge1"] == 0.0


def test_rouge_by_hand() -> None:
    # "the cat" is common: 2 of 3 words and 2 of 4; as a pair 1 of 2 and 1 of 3; the longest common sequence has 2.
    found = text_metrics((Metric.ROUGE,), ["the cat sat"], ["the cat lay down"])
    assert found == pytest.approx({"rouge1": 4 / 7, "rouge2": 0.4, "rougeL": 4 / 7})


def test_rouge_is_the_mean_over_samples_and_bleu_that_of_the_corpus() -> None:
    answers = ["the cat sat on the mat today", "no"]
    references = ["the cat sat on the mat today", "yes it is so"]
    assert text_metrics((Metric.ROUGE,), answers, references)["rouge1"] == pytest.approx(0.5)
    expected = BLEU(tokenize="13a").corpus_score(answers, [references]).score
    assert text_metrics((Metric.BLEU,), answers, references) == {"bleu": pytest.approx(expected)}


def test_chinese_is_compared_by_character() -> None:
    answers, references = ["我喜欢小猫和小狗"], ["我喜欢小猫和大狗"]
    expected = BLEU(tokenize="zh").corpus_score(answers, [references]).score
    found = text_metrics(ALL, answers, references)
    assert found["bleu"] == pytest.approx(expected) and 0 < found["bleu"] < 100
    assert found["rouge1"] == pytest.approx(7 / 8)
    assert found["exactMatch"] == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GPU を2枚使う", ["gpu", "を", "2", "枚", "使", "う"]),
        ("สวัสดี", [*"สวสด"]),
        ("Über naïve Приве́т", ["über", "naïve", "приве", "т"]),
        ("don't stop; 3.5%", ["don", "t", "stop", "3", "5"]),
        ("한국어 모델", ["한국어", "모델"]),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert [word for word in words(text) if word] == expected


def test_exact_match_looks_through_white_space_and_the_form_of_characters() -> None:
    answers = ["  Yes,\n it is. ", "ﬁne", "yes"]
    references = ["Yes, it is.", "fine", "Yes"]
    assert text_metrics((Metric.EXACT_MATCH,), answers, references) == {"exactMatch": pytest.approx(2 / 3)}


def test_only_what_was_asked_for_is_computed() -> None:
    assert text_metrics((Metric.PERPLEXITY, Metric.ACCURACY), ["a"], ["a"]) == {}
