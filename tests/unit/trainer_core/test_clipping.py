"""Gradients clipped on their way through the optimizer, against torch's own."""

from __future__ import annotations

import pytest
import torch

from finetune_trainer.training.clipping import clip


def stepped(*, fused: bool, largest: float | None, late: bool) -> tuple[list[torch.Tensor], torch.optim.AdamW]:
    """Weights after three steps."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 7)
    parameters = list(layer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
    for scale in (1.0, 30.0, 0.1):
        (layer(torch.randn(3, 5)).square().sum() * scale).backward()
        if late and largest is not None:
            total = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
            clip(optimizer, parameters, total, largest)
        elif largest is not None:
            torch.nn.utils.clip_grad_norm_(parameters, largest)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in parameters], optimizer


@pytest.mark.parametrize("largest", [1e-3, 2.0, 1e6])
@pytest.mark.parametrize("fused", [False, True])
def test_weights_are_those_of_torchs_own(fused: bool, largest: float) -> None:
    expected, _ = stepped(fused=fused, largest=largest, late=False)
    found, optimizer = stepped(fused=fused, largest=largest, late=True)
    unclipped, _ = stepped(fused=fused, largest=None, late=False)
    for one, other, free in zip(found, expected, unclipped, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        # AdamW divides by gradients' size: what the second step's is beside the others' tells.
        assert torch.equal(one, free) == (largest == 1e6)
    assert not hasattr(optimizer, "grad_scale")
    assert not optimizer._optimizer_step_post_hooks


def test_a_norm_that_is_no_number_leaves_no_weight() -> None:
    """As torch's own: the run's check of losses ends it."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.full((1, 2), torch.inf)).sum().backward()
    parameters = list(layer.parameters())
    clip(optimizer, parameters, torch.tensor(torch.nan), 1.0)
    optimizer.step()
    assert not torch.isfinite(layer.weight).any()
