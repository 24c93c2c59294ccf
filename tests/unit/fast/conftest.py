"""Model folders, settings that make tiny models quick, and FlexAttention on a CPU."""

from __future__ import annotations

import pytest
from torch.nn.attention import flex_attention

from tests.quick_torch import quick_torch
from tests.unit.trainer_core.conftest import model_folder

__all__ = ["model_folder", "quick_torch"]


@pytest.fixture
def differentiable(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not let FlexAttention be differentiated on a CPU; its definition by all pairs can be."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
