"""What is mutated, and which tests have to notice."""

from __future__ import annotations

from dataclasses import dataclass

GOAL = 0.85
"""The least share of mutants that the tests must kill, in each part."""


@dataclass(frozen=True)
class Part:
    """Modules whose mistakes would be found late, or by losing somebody's work."""

    name: str
    modules: str
    """Pattern of their paths below the packages' common root."""
    tests: tuple[str, ...]


PARTS = (
    Part(
        "layers",
        "finetune_trainer/layers.py",
        ("tests/unit/trainer_core/test_layers.py", "tests/unit/trainer_core/test_layouts.py"),
    ),
    Part(
        "failures",
        "finetune_operator/failures/*",
        ("tests/unit/core/test_failures.py", "tests/unit/core/test_failure_accounts.py"),
    ),
    Part("checkpoint", "finetune_trainer/checkpoint/*", ("tests/unit/checkpoint",)),
)
