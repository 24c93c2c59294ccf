"""Model folders that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.quick_torch import quick_torch
from tests.trainer_jobs import save_tiny_model

__all__ = ["model_folder", "quick_torch"]

ModelFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """`model_folder("llama", tie_word_embeddings=True)`: a folder with that model, made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def folder(architecture: str = "llama", **overrides: Any) -> Path:
        key = (architecture, *sorted(overrides.items()))
        if key not in made:
            made[key] = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture, **overrides)
        return made[key]

    return folder
