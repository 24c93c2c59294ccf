"""`assert` is for mypy: without it (python -O) nothing that a stranger sends is accepted that was not before.

bandit's B101 would have none at all. This rule stands in its place: what is asserted is a type, that a value is not
None, or something that an earlier check has seen to, and says so.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("operator/finetune_operator", "trainer_image/finetune_trainer")


def assertions() -> Iterator[tuple[str, ast.Assert]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Assert):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def narrows(test: ast.expr) -> bool:
    """Whether an expression is about a type, or about None, and about nothing else."""
    if isinstance(test, ast.BoolOp):
        return all(narrows(part) for part in test.values)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return narrows(test.operand)
    if isinstance(test, ast.Call):
        return isinstance(test.func, ast.Name) and test.func.id in ("isinstance", "callable")
    return isinstance(test, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in test.ops)


FOUND = dict(assertions())


def test_there_are_some() -> None:
    assert len(FOUND) > 20


@pytest.mark.parametrize("place", FOUND)
def test_an_assertion_narrows_a_type_or_names_the_check_before_it(place: str) -> None:
    node = FOUND[place]
    assert narrows(node.test) or node.msg is not None, ast.unparse(node)
