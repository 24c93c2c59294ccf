"""How close generated answers come to the given ones: BLEU, ROUGE and exact match.

Languages without spaces between words are compared character by character, all others word by word: the libraries'
own rules would take a Chinese sentence for one word, or for none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from finetune_trainer.contract.vocabulary import Metric

METRICS = (Metric.BLEU, Metric.ROUGE, Metric.EXACT_MATCH)
"""Those that need generated answers."""
_ROUGE = ("rouge1", "rouge2", "rougeL")
# Scripts that put no space between words: Han, Kana, Bopomofo, Thai, Lao, Tibetan, Myanmar, Khmer.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff])"
)
_WORD = re.compile(r"\w+")


def text_metrics(metrics: Sequence[Metric], answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Values by name, for as many answers as references, at least one.

    `bleu` is corpus BLEU with 4-grams, 0 to 100 (Papineni et al. 2002; sacrebleu, Post 2018, arXiv:1804.08771),
    `rouge1`, `rouge2` and `rougeL` are mean F1, 0 to 1 (Lin 2004), `exactMatch` the share of answers that equal their
    reference but for white space and the form of Unicode characters, 0 to 1.
    """
    found: dict[str, float] = {}
    if Metric.BLEU in metrics:
        found["bleu"] = _bleu(answers, references)
    if Metric.ROUGE in metrics:
        found |= _rouge(answers, references)
    if Metric.EXACT_MATCH in metrics:
        equal = [_normal(answer) == _normal(reference) for answer, reference in zip(answers, references, strict=True)]
        found["exactMatch"] = sum(equal) / len(equal)
    return found


def words(text: str) -> list[str]:
    """Lower-cased words; each character of a script without spaces is one."""
    return _WORD.findall(_apart(_normal(text).lower()))


def _bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    from sacrebleu.metrics.bleu import BLEU

    corpus = BLEU(tokenize="13a").corpus_score(
        [_apart(_normal(answer)) for answer in answers], [[_apart(_normal(reference)) for reference in references]]
    )
    return float(corpus.score)


class _Words:
    """What rouge-score asks of a tokenizer. Its own drops every letter outside of ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    scorer = RougeScorer(list(_ROUGE), tokenizer=_Words())
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: sum(float(score[name].fmeasure) for score in scores) / len(scores) for name in _ROUGE}


def _apart(text: str) -> str:
    return _UNSPACED.sub(r" \1 ", text)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())
