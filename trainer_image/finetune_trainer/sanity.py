"""Checks of a training run while it runs: that every trained group learns, and that the numbers stay finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from finetune_trainer.contract import ModelLayout
from finetune_trainer.contract.vocabulary import Method, Objective, Optimizer
from finetune_trainer.errors import UsageError
from finetune_trainer.layers import trained_parameters

CHECKED_STEPS = 3
"""Optimizer steps within which every trained group has to have had a gradient."""

LEARNING_RATES: Mapping[Method, tuple[float, float]] = {
    Method.FULL: (1e-7, 1e-4),
    Method.FREEZE: (1e-7, 5e-4),
    Method.LORA: (1e-5, 5e-3),
    Method.QLORA: (1e-5, 5e-3),
    Method.BITFIT: (1e-5, 1e-2),
    Method.PREFIX: (1e-5, 5e-1),
    Method.PROMPT: (1e-4, 1.0),
    Method.ADAPTER: (1e-4, 5e-2),
    Method.IA3: (1e-4, 5e-2),
    Method.HEAD: (1e-6, 1e-1),
}
"""Between which learning rates a method is usually seen to learn: the sweeps in the papers that the methods name, with
a margin. Outside of them a run is warned, not refused."""

PREFERENCE_LEARNS_SLOWER = 100
"""How much lower the learning rates of preference objectives may be."""

MIXED = 0.02
"""Of the largest number that a model makes of a sample: how much it changes with the sample before it, where the two
see each other. Masked positions weigh exactly nothing, and rows of one shape are rounded alike; what is left is where
a mixture of experts groups its tokens otherwise."""


def learning_rate_warning(
    method: Method, optimizer: Optimizer, rate: float, objective: Objective = Objective.SFT
) -> str | None:
    """A sentence about a learning rate that is unusual for a method; None for a usual one."""
    low, high = LEARNING_RATES[method]
    if objective.is_preference:
        # Answers that are only a little better or worse are told apart in small steps (arXiv:2305.18290, appendix B).
        low = low / PREFERENCE_LEARNS_SLOWER
    if optimizer is Optimizer.SGD or low <= rate <= high:
        return None
    side, risk = ("above", "the loss may diverge") if rate > high else ("below", "the model may hardly change")
    return (
        f"spec.training.learningRate: {rate:g} is {side} what is usual for method {method}, {low:g} to {high:g}; {risk}"
    )


@torch.no_grad()
def mixes_samples(model: nn.Module, device: torch.device) -> bool:
    """Whether samples that share a row see each other where a model runs with a mask of its own.

    Whether attention within a row is block-diagonal is up to each architecture's code, which is asked here: what comes
    before a sample in its row may not change what the model makes of it.
    """
    half = 6
    first, second, sample = (torch.arange(start, start + half, device=device) for start in (10, 40, 70))
    positions = torch.arange(half, device=device).repeat(2)[None]
    model.eval()
    logits = [
        model(input_ids=torch.cat([before, sample])[None], position_ids=positions, use_cache=False).logits[0, half:]
        for before in (first, second)
    ]
    difference = (logits[0].float() - logits[1].float()).abs().max() / logits[0].float().abs().max()
    return not difference < MIXED


def parameter_groups(model: nn.Module, layout: ModelLayout) -> dict[str, list[nn.Parameter]]:
    """The trained parameters by the part of the model they belong to: `block 3`, `embeddings`, `head`, `norm`."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(model).items():
        groups.setdefault(group_of(name, layout), []).append(parameter)
    return groups


def group_of(name: str, layout: ModelLayout) -> str:
    """The group of a parameter, by its name in the model or in PEFT's model around it."""
    path = name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name
    block = layout.block_of(path)
    if block is not None:
        return f"block {block}"
    parts = {"embeddings": layout.input_embeddings, "head": layout.output_embeddings, "norm": layout.final_norm}
    for group, module in parts.items():
        if module is not None and path.startswith(f"{module}."):
            return group
    return "prompt" if path.startswith("prompt_encoder.") else "other"


class GradientCheck:
    """Whether every trained group has had a finite gradient other than zero within the first steps.

    The norm is taken over a whole group: within an adapter, A has none as long as B is zero.
    """

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}
        self._passed: set[str] = set()

    def pending(self, groups: Mapping[str, object]) -> bool:
        """Whether a group has still to be seen learning."""
        return any(group not in self._passed for group in groups)

    def observe(self, norms: Mapping[str, float], step: int) -> None:
        """Note the norms of one step.

        Raises UsageError that names the groups which, for `CHECKED_STEPS` steps, had no gradient or a broken one.
        """
        idle: list[str] = []
        broken: list[str] = []
        for group, norm in norms.items():
            if math.isfinite(norm) and norm > 0:
                self._passed.add(group)
            elif group not in self._passed:
                self._steps[group] = self._steps.get(group, 0) + 1
                if self._steps[group] >= CHECKED_STEPS:
                    (idle if norm == 0 else broken).append(group)
        if idle:
            raise UsageError(
                f"nothing is learnt in {', '.join(idle)}: the gradient was zero for {CHECKED_STEPS} steps; check that"
                " the data has trained tokens, and choose other layers or modules",
                reason="NoGradient",
                step=step,
            )
        if broken:
            raise UsageError(
                f"the gradient of {', '.join(broken)} was not finite for {CHECKED_STEPS} steps; lower the learning"
                " rate, or use precision bf16 or fp32",
                reason="GradientNotFinite",
                step=step,
            )


def require_finite(what: str, value: float, step: int, last_checkpoint: int | None) -> None:
    """Stop a run whose numbers broke.

    Raises UsageError that names the checkpoint from before.
    """
    if math.isfinite(value):
        return
    good = "no checkpoint was written before" if last_checkpoint is None else f"the last good one is {last_checkpoint}"
    raise UsageError(
        f"{what} became {value} at step {step}; {good}. Lower the learning rate, raise the warm-up, or use precision"
        " bf16 or fp32",
        reason="LossNotFinite",
        step=step,
    )
