"""Model folders, settings that make tiny models quick, and FlexAttention on a CPU."""

from __future__ import annotations

import sys

import pytest
from torch.nn.attention import flex_attention

from tests.quick_torch import quick_torch
from tests.unit.trainer_core.conftest import model_folder

__all__ = ["model_folder", "quick_torch"]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """What other tests compiled of the same code counts towards the number of times that it may be: which they are
    depends on the order of tests."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture
def differentiable(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not let FlexAttention be differentiated on a CPU; its definition by all pairs can be."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
