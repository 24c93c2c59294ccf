"""torch.compile without code: on a CPU that of tiny models is not worth the minutes that it takes to make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def compile_by(patch: pytest.MonkeyPatch, backend: str | Callable[..., Any] = "aot_eager") -> None:
    """Graphs are captured as ever, and become what a backend makes of them."""
    compile_ = torch.compile

    def compiled(function: Callable[..., Any], **options: Any) -> Any:
        return compile_(function, **{"backend": backend, **options})

    patch.setattr(torch, "compile", compiled)
