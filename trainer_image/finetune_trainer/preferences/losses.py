"""The losses of the preference objectives, from log-probabilities of whole answers. Pure tensor functions.

They are those of TRL's trainers, which the tests hold them against (docs/adr/0010-preference-objectives.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from finetune_trainer.contract.config import PreferenceConfig
from finetune_trainer.contract.vocabulary import Objective, PreferenceLoss


@dataclass(frozen=True)
class Verdict:
    """What an objective makes of a batch. Rewards carry no gradient."""

    losses: torch.Tensor
    """(pairs,), for `kto` (answers,)."""
    liked: torch.Tensor
    """Rewards of the chosen or liked answers."""
    disliked: torch.Tensor
    """Rewards of the rejected or disliked ones."""
    correct: torch.Tensor
    """As `losses`: 1 where the chosen answer has the larger reward, 0 where it has the smaller, 0.5 where they are
    equal; for `kto`, whether the reward has the sign of the judgement."""


def pair_verdict(
    objective: Objective,
    config: PreferenceConfig,
    policy: torch.Tensor,
    reference: torch.Tensor | None,
    lengths: torch.Tensor,
) -> Verdict:
    """Of pairs, for `dpo`, `orpo` and `simpo`.

    policy, reference: (2 x pairs,), log-probabilities of the chosen and then of the rejected answers under the tuned
    model and the one before tuning; the reference is for `dpo`. lengths: (2 x pairs,), tokens of the answers.
    """
    chosen_mean = (policy / lengths).chunk(2)[0]
    if objective is Objective.DPO:
        assert reference is not None, "dpo compares with a reference"
        losses, rewards = _dpo(config, policy - reference, lengths)
    elif objective is Objective.ORPO:
        losses, rewards = _orpo(config, policy / lengths)
    else:
        losses, rewards = _simpo(config, policy / lengths)
    if config.sft_weight:
        losses = losses - config.sft_weight * chosen_mean
    liked, disliked = rewards.detach().chunk(2)
    return Verdict(losses, liked, disliked, _larger(liked, disliked))


def _dpo(config: PreferenceConfig, ratios: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rafailov et al. 2023 (arXiv:2305.18290, equation 7); hinge: Zhao et al. 2023 (SLiC, arXiv:2305.10425); IPO: Azar
    et al. 2023 (arXiv:2310.12036, equation 17), of ratios per token as its authors had it; smoothed labels: Mitchell
    2023 (conservative DPO)."""
    chosen, rejected = ratios.chunk(2)
    margin = config.beta * (chosen - rejected)
    if config.loss is PreferenceLoss.HINGE:
        losses = torch.relu(1 - margin)
    elif config.loss is PreferenceLoss.IPO:
        mean_chosen, mean_rejected = (ratios / lengths).chunk(2)
        losses = (mean_chosen - mean_rejected - 1 / (2 * config.beta)) ** 2
    else:
        smoothing = config.label_smoothing
        losses = -(1 - smoothing) * functional.logsigmoid(margin) - smoothing * functional.logsigmoid(-margin)
    return losses, config.beta * ratios


def _orpo(config: PreferenceConfig, means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hong et al. 2024 (arXiv:2403.07691, equations 6 and 7): the cross-entropy of the chosen answer, and the log odds
    ratio of a token of the chosen answer to one of the rejected."""
    chosen, rejected = means.chunk(2)
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - config.beta * functional.logsigmoid(odds), config.beta * means


def _simpo(config: PreferenceConfig, means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Meng et al. 2024 (arXiv:2405.14734, equation 6)."""
    rewards = config.beta * means
    chosen, rejected = rewards.chunk(2)
    return -functional.logsigmoid(chosen - rejected - config.simpo_gamma), rewards


def _log1mexp(logs: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0 without cancellation (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    # An answer that the model is certain of has log-probability 0 and infinite odds.
    logs = logs.clamp(max=-1e-7)
    near_zero = logs > -0.6931472
    # Each branch gets arguments that its gradient survives, whichever of them is taken.
    small = torch.log(-torch.expm1(torch.where(near_zero, logs, -0.5)))
    large = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, logs)))
    return torch.where(near_zero, small, large)


def kto_verdict(
    config: PreferenceConfig,
    policy: torch.Tensor,
    ratios: torch.Tensor,
    liked: torch.Tensor,
    divergence: torch.Tensor,
    lengths: torch.Tensor,
) -> Verdict:
    """Of single answers: Ethayarajh et al. 2024 (arXiv:2402.01306, equation 8).

    policy: (answers,), log-probabilities under the tuned model; ratios: (answers,), the same less those under the one
    before tuning; liked: (answers,), bool; divergence: scalar, how far the models are apart, in nats, not below 0 and
    without a gradient; lengths: (answers,), tokens.
    """
    signs = torch.where(liked, 1.0, -1.0)
    weights = torch.where(liked, config.chosen_weight, config.rejected_weight)
    losses = weights * (1 - torch.sigmoid(config.beta * signs * (ratios - divergence)))
    if config.sft_weight:
        losses = losses - config.sft_weight * liked * policy / lengths
    rewards = (config.beta * ratios).detach()
    return Verdict(losses, rewards[liked], rewards[~liked], _larger(signs * rewards, torch.zeros_like(rewards)))


def _larger(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first > second).float() + 0.5 * (first == second).float()


class RewardTotals:
    """Sums over verdicts, on their device: no host synchronisation before they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(7, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, verdict: Verdict) -> None:
        """Count a batch."""
        count = float(verdict.losses.numel())
        liked, disliked = float(verdict.liked.numel()), float(verdict.disliked.numel())
        sums = [verdict.losses.detach().sum(), verdict.correct.sum(), verdict.liked.sum(), verdict.disliked.sum()]
        self._sums[:4] += torch.stack(sums).double()
        self._sums[4:] += torch.tensor([count, liked, disliked], dtype=torch.float64, device=self._sums.device)

    def take(self) -> tuple[float, float, float] | None:
        """(mean loss, reward accuracy, reward margin) over all ranks; None where nothing was counted. Starts anew.

        The margin is the mean reward of chosen answers less that of rejected ones. One host synchronisation.
        """
        sums = self._sums.cpu()
        self._sums = torch.zeros_like(self._sums)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(sums)
        loss, correct, liked, disliked, count, liked_count, disliked_count = sums.tolist()
        if not count:
            return None
        margin = liked / max(liked_count, 1) - disliked / max(disliked_count, 1)
        return loss / count, correct / count, margin
