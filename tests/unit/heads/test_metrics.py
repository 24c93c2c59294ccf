"""Figures of classes and numbers, by hand, and heads on every architecture."""

from __future__ import annotations

import math

import numpy as np
import pytest

from finetune_trainer.contract import Selection, SelectionError, select
from finetune_trainer.contract.config import HeadConfig
from finetune_trainer.contract.selection import LayerSelection
from finetune_trainer.contract.vocabulary import HeadTask, Method
from finetune_trainer.evaluation.heads import (
    classification_metrics,
    correlation,
    majority_scores,
    mean_scores,
    ranks,
    regression_metrics,
)
from finetune_trainer.heads.module import head_layout
from finetune_trainer.layers import layout_of
from tests.tiny_models import ARCHITECTURES, meta_model, tiny_config


def test_classification_by_hand() -> None:
    wanted, predicted = np.array([0.0, 0, 1, 2]), np.array([0.0, 1, 1, 3])
    found = classification_metrics(wanted, predicted)
    # F1: class 0 2/3, class 1 2/3, class 2 (never predicted) 0, class 3 (never wanted) 0.
    assert found == pytest.approx({"accuracy": 0.5, "macroF1": 1 / 3})


def test_regression_by_hand() -> None:
    found = regression_metrics(np.array([1.0, 2, 3, 10]), np.array([1.0, 3, 2, 4]))
    # From their means the values are -3, -2, -1, 6 and -1.5, 0.5, -0.5, 1.5; the ranks 1 2 3 4 and 1 3 2 4.
    assert found["mse"] == pytest.approx((0 + 1 + 1 + 36) / 4)
    assert found["pearson"] == pytest.approx(13 / math.sqrt(50 * 5))
    assert found["spearman"] == pytest.approx(0.8)


def test_equal_values_share_their_rank_and_constants_have_no_correlation() -> None:
    assert ranks(np.array([5.0, 1, 5, 7])).tolist() == [2.5, 1, 2.5, 4]
    assert correlation(np.array([1.0, 1]), np.array([1.0, 2])) is None
    assert set(regression_metrics(np.array([1.0, 2]), np.array([3.0, 3]))) == {"mse"}


def test_what_heads_are_compared_with() -> None:
    found = majority_scores(np.array([0.0, 1, 1, 1]), np.array([1.0, 0]), 7)
    assert found.metrics() == pytest.approx(
        {"loss": -(math.log(0.75) + math.log(0.25)) / 2, "accuracy": 0.5, "macroF1": 1 / 3}
    )
    assert found.tokens == 7
    assert mean_scores(np.array([1.0, 3]), np.array([2.0, 4]), 7).metrics() == {"loss": 2.0, "mse": 2.0}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("tied", [False, True])
def test_every_architecture_takes_a_head(architecture: str, tied: bool) -> None:
    config = tiny_config(architecture, tie_word_embeddings=tied)
    causal = layout_of(meta_model(architecture, tie_word_embeddings=tied))
    for head in (
        HeadConfig(task=HeadTask.CLASSIFICATION, dense=(8, 4)),
        HeadConfig(task=HeadTask.REGRESSION, dropout=0.1),
    ):
        layout = head_layout(config, causal, head, ("a", "b", "c"), False)
        alone = select(layout, Method.HEAD, None)
        assert alone.blocks == () and all(path.startswith("score.") for path in alone.parameters)
        chosen = select(layout, Method.HEAD, LayerSelection(last=1))
        assert chosen.blocks == (3,) and set(alone.parameters) < set(chosen.parameters)
        outside = [p for p in chosen.parameters if layout.block_of(p) != 3]
        assert outside == list(alone.parameters)


def test_modules_of_no_block_are_refused() -> None:
    causal = layout_of(meta_model())
    layout = head_layout(tiny_config(), causal, HeadConfig(task=HeadTask.REGRESSION), (), False)
    with pytest.raises(SelectionError, match=r"spec\.layers\.modules: of which blocks\? Set one of last, first"):
        select(layout, Method.HEAD, LayerSelection(modules=("mlp",)))
    found: Selection = select(layout, Method.HEAD, LayerSelection(also=("norm",)))
    assert found.parameters == ("model.norm.weight", "score.weight")
