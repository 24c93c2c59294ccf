"""The objectives' losses, held against those of TRL on the same log-probabilities and on the same model."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_trainer.contract.config import PreferenceConfig
from finetune_trainer.contract.vocabulary import Objective
from finetune_trainer.preferences.losses import RewardTotals, Verdict, kto_verdict, pair_verdict

LENGTHS = torch.tensor([3.0, 5.0, 2.0, 4.0, 4.0, 6.0])


def log_probs(seed: int) -> torch.Tensor:
    """(6,): of three chosen and three rejected answers."""
    return -LENGTHS * (0.2 + torch.rand(6, generator=torch.Generator().manual_seed(seed)))


def verdict(
    objective: Objective, policy: torch.Tensor, reference: torch.Tensor | None = None, **config: Any
) -> Verdict:
    return pair_verdict(objective, PreferenceConfig(beta=0.4, **config), policy, reference, LENGTHS)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, lambda margin, mean: math.log(1 + math.exp(-0.4 * margin))),
        ({"loss": "hinge"}, lambda margin, mean: max(0.0, 1 - 0.4 * margin)),
        ({"loss": "ipo"}, lambda margin, mean: (mean - 1 / 0.8) ** 2),
        (
            {"label_smoothing": 0.2},
            lambda margin, mean: (
                0.8 * math.log(1 + math.exp(-0.4 * margin)) + 0.2 * math.log(1 + math.exp(0.4 * margin))
            ),
        ),
    ],
)
def test_dpo_by_hand(config: dict[str, Any], expected: Any) -> None:
    policy, reference = log_probs(1), log_probs(2)
    ratios = policy - reference
    losses = verdict(Objective.DPO, policy, reference, **config).losses
    for pair in range(3):
        margin = (ratios[pair] - ratios[pair + 3]).item()
        mean = (ratios[pair] / LENGTHS[pair] - ratios[pair + 3] / LENGTHS[pair + 3]).item()
        assert losses[pair].item() == pytest.approx(expected(margin, mean), rel=1e-5)


def test_rewards_of_dpo_are_ratios_to_the_reference() -> None:
    policy, reference = log_probs(1), log_probs(2)
    found = verdict(Objective.DPO, policy.requires_grad_(), reference)
    assert torch.allclose(torch.cat([found.liked, found.disliked]), 0.4 * (policy.detach() - reference))
    assert found.correct.tolist() == (found.liked > found.disliked).float().tolist()
    assert found.losses.requires_grad and not found.liked.requires_grad
    same = verdict(Objective.DPO, reference, reference)
    assert same.correct.tolist() == [0.5, 0.5, 0.5]
    assert same.losses.tolist() == pytest.approx([math.log(2)] * 3)


@pytest.mark.parametrize("objective", list(Objective)[1:])
def test_the_answers_own_likelihood_counts_as_far_as_asked(objective: Objective) -> None:
    policy, reference, liked = log_probs(1), log_probs(2), torch.tensor([True, True, True, False, False, False])

    def losses(weight: float) -> torch.Tensor:
        config = PreferenceConfig(beta=0.4, sft_weight=weight)
        if objective is Objective.KTO:
            return kto_verdict(config, policy, policy - reference, liked, torch.zeros(()), LENGTHS).losses
        return pair_verdict(objective, config, policy, reference, LENGTHS).losses

    added = losses(0.5) - losses(0.0)
    expected = -0.5 * (policy / LENGTHS)[:3]
    assert torch.allclose(added[:3], expected, atol=1e-6)
    assert added[3:].tolist() == [0.0] * len(added[3:])


@pytest.fixture(scope="module")
def trl() -> Any:
    """TRL's own losses. It announces what is experimental, and what its dependencies deprecate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
    return SimpleNamespace(cpo=CPOTrainer.cpo_loss, orpo=ORPOTrainer.odds_ratio_loss)


def test_orpo_is_trls(trl: Any) -> None:
    means = log_probs(1) / LENGTHS
    theirs = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    ratio, chosen_rewards, *_ = trl.orpo(theirs, *means.chunk(2))
    found = verdict(Objective.ORPO, log_probs(1))
    assert torch.allclose(found.losses, -means[:3] - ratio, atol=1e-6)
    assert torch.allclose(found.liked, chosen_rewards)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_simpo_is_trls(trl: Any, gamma: float) -> None:
    means = log_probs(1) / LENGTHS
    theirs = SimpleNamespace(
        alpha=0.0, beta=0.4, simpo_gamma=gamma, label_smoothing=0.0, loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    losses, chosen_rewards, rejected_rewards = trl.cpo(theirs, *means.chunk(2))
    found = verdict(Objective.SIMPO, log_probs(1), simpo_gamma=gamma)
    assert torch.allclose(found.losses, losses, atol=1e-6)
    assert torch.allclose(found.liked, chosen_rewards) and torch.allclose(found.disliked, rejected_rewards)


@pytest.mark.parametrize("certain", [0.0, -1e-12, -40.0, -0.6931472])
def test_orpo_is_finite_with_answers_that_are_certain_or_impossible(certain: float) -> None:
    policy = torch.full((6,), certain).requires_grad_()
    losses = pair_verdict(Objective.ORPO, PreferenceConfig(beta=0.1), policy, None, torch.ones(6)).losses
    losses.sum().backward()
    assert torch.isfinite(losses).all() and policy.grad is not None and torch.isfinite(policy.grad).all()


def test_kto_by_hand() -> None:
    config = PreferenceConfig(beta=0.4, chosen_weight=2.0, rejected_weight=3.0)
    ratios, liked = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([True, False, False])
    found = kto_verdict(config, torch.zeros(3), ratios, liked, torch.tensor(0.25), torch.ones(3))

    def value(x: float) -> float:
        return 1 - 1 / (1 + math.exp(-0.4 * x))

    assert found.losses.tolist() == pytest.approx([2 * value(0.75), 3 * value(2.25), 3 * value(-0.25)])
    assert found.liked.tolist() == pytest.approx([0.4])
    assert found.disliked.tolist() == pytest.approx([-0.8, 0.2])
    assert found.correct.tolist() == [1.0, 1.0, 0.0]


def test_totals() -> None:
    totals = RewardTotals(torch.device("cpu"))
    assert totals.take() is None
    first = Verdict(
        torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    )
    second = Verdict(torch.tensor([5.0]), torch.tensor([]), torch.tensor([8.0]), torch.tensor([0.5]))
    totals.add(first)
    totals.add(second)
    assert totals.take() == pytest.approx((3.0, 2.5 / 3, 3.0 - 3.0))
    assert totals.take() is None
