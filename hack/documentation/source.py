"""What stands in the source but not in the objects made of it: docstrings of names, and the errors that are raised."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


def documented(module: ModuleType, name: str) -> dict[str, str]:
    """Each name that a class assigns, with the docstring below it; empty where there is none."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    body = next(one.body for one in tree.body if isinstance(one, ast.ClassDef) and one.name == name)
    found: dict[str, str] = {}
    for one, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name):
            found[one.targets[0].id] = _text(following)
    return found


def _text(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def template(node: ast.expr) -> str:
    """The text that an expression gives, with three dots for what is known only when it runs; empty where all of it
    is."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = template(node.left), template(node.right)
        return "".join(part or "..." for part in parts) if any(parts) else ""
    return ""


@dataclass(frozen=True, slots=True, order=True)
class Raised:
    """An error that the code makes."""

    error: str
    """Name of its class."""
    reason: str
    """The reason that it is given; empty where it has its class's."""
    message: str
    """Its text, see `template`."""


def errors_made(folder: Path, classes: Mapping[str, int]) -> set[Raised]:
    """Every error of some classes that the modules below a folder make with a text of their own.

    classes: name of a class to the place of the message among its arguments.
    """
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")]
    words = dict(pair for tree in trees for pair in _words(tree))
    return {
        found
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and (found := _made(node, classes, words)) is not None
    }


def _words(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names of a module that stand for a text."""
    for one in tree.body:
        if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name) and isinstance(one.value, ast.Constant):
            yield one.targets[0].id, str(one.value.value)


def _made(call: ast.Call, classes: Mapping[str, int], words: Mapping[str, str]) -> Raised | None:
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    if name not in classes or len(call.args) <= classes[name]:
        return None
    message = " ".join(template(call.args[classes[name]]).split())
    if len(message.replace("...", "").strip(" :;,'\"()")) < 8:
        return None
    given = next((one.value for one in call.keywords if one.arg == "reason"), None)
    reason = words.get(given.id, "") if isinstance(given, ast.Name) else template(given) if given is not None else ""
    return Raised(name, reason, message)


def retries(folder: Path) -> dict[str, set[str]]:
    """Of each name of `constants.Reason`, the names of `failures.Retry` that the failures of a folder go with."""
    found: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for outer in tree.body:
            assigned = dict(_assigned(outer))
            for reasons, retry in _pairs(outer, assigned):
                for reason in reasons:
                    found.setdefault(reason, set()).add(retry)
    return found


def reasons_given(folder: Path, function: str, *, first: str | None = None) -> set[str]:
    """Names of `constants.Reason` that stand among the arguments of calls of a function.

    first: the text that the first argument has to be, where it is given.
    """
    return {
        name
        for path in sorted(folder.rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == function
        if first is None or (isinstance(call.args[0], ast.Constant) and call.args[0].value == first)
        for argument in call.args
        for name in _names(argument, "Reason", deep=False)
    }


def _assigned(node: ast.AST) -> Iterator[tuple[str, set[str]]]:
    """Variables that hold one of several reasons."""
    for one in ast.walk(node):
        if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name):
            yield one.targets[0].id, _names(one.value, "Reason")


def _pairs(node: ast.AST, assigned: Mapping[str, set[str]]) -> Iterator[tuple[set[str], str]]:
    """Where a call or a tuple holds a Retry, the reason is its first one, or that of its first variable."""
    for one in ast.walk(node):
        parts = one.args if isinstance(one, ast.Call) else one.elts if isinstance(one, ast.Tuple) else []
        retried = [name for part in parts for name in _names(part, "Retry", deep=False)]
        reasons = [_names(part, "Reason", deep=False) for part in parts]
        named = [assigned.get(part.id, set()) for part in parts if isinstance(part, ast.Name)]
        known = next((found for found in [*reasons, *named] if found), None)
        if retried and known:
            yield known, retried[0]


def _names(node: ast.AST, owner: str, *, deep: bool = True) -> set[str]:
    nodes = ast.walk(node) if deep else [node]
    return {
        one.attr
        for one in nodes
        if isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id == owner
    }
