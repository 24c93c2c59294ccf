"""Rank and scale of every low-rank adapter: pure functions from patterns to the modules that a selection adapts.

A pattern is read like a word of `layers.modules`: its segments have to stand in the path of a module as a run of whole
segments. A segment may be a glob (`*_proj`, `[qv]_proj`), and `8-15` stands for the numbers from 8 to 15.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain

from finetune_trainer.contract.layout import ModelLayout, ParameterKind
from finetune_trainer.contract.selection import Selection, SelectionError
from finetune_trainer.contract.vocabulary import LoraVariant

EXPERT_VARIANTS = frozenset({LoraVariant.STANDARD, LoraVariant.RSLORA, LoraVariant.LORA_PLUS})
"""Variants that there are for the fused tensors of experts."""
_WILD = re.compile(r"[*?\[]|^[0-9]+-[0-9]+$")


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """Size and scale of one adapter."""

    rank: int
    """Columns of B and rows of A."""
    alpha: float
    """The adapter's output is scaled by alpha / rank, for rsLoRA by alpha / sqrt(rank)."""


def adapter_shapes(
    selection: Selection,
    *,
    rank: int,
    alpha: float,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int] | None = None,
) -> dict[str, AdapterShape]:
    """The adapter of every adapted module and of every adapted tensor of fused experts, in the model's order.

    Raises SelectionError for a pattern that matches none of them, and where two equally exact ones disagree.
    """
    targets = (*selection.adapted, *selection.adapted_experts)
    ranks = _resolve("spec.lora.rankPattern", rank_pattern or {}, targets)
    alphas = _resolve("spec.lora.alphaPattern", alpha_pattern or {}, targets)
    return {name: AdapterShape(ranks.get(name, rank), alphas.get(name, alpha)) for name in targets}


def check_experts(selection: Selection, variant: LoraVariant, dropout: float) -> None:
    """Refuse what cannot be done to the fused tensors of experts: their adapters are added to the weights, so there is
    no input to drop from, and nothing but a plain pair of matrices for each expert. Raises SelectionError."""
    if not selection.adapted_experts:
        return
    named = "the fused experts that layers.modules names"
    if variant not in EXPERT_VARIANTS:
        usable = ", ".join(sorted(EXPERT_VARIANTS))
        raise SelectionError("spec.lora.variant", f"{variant} cannot adapt {named}; use {usable}, or other modules")
    if dropout:
        raise SelectionError("spec.lora.dropout", f"adapters on {named} have none; set it to 0, or name other modules")


def _resolve(field: str, patterns: Mapping[str, int], targets: Sequence[str]) -> dict[str, int]:
    """The value of every target that a pattern matches. The order of patterns means nothing: a map has none in YAML."""
    if not patterns:
        return {}
    words = {pattern: tuple(pattern.split(".")) for pattern in patterns}
    exactness = {pattern: _exactness(word) for pattern, word in words.items()}
    split = [tuple(target.split(".")) for target in targets]
    # By segment, as there are far fewer of them than places where a word could stand in a path.
    segments_there = set(chain.from_iterable(split))
    meant = {part: {s for s in segments_there if _is(s, part)} for part in set(chain.from_iterable(words.values()))}
    starting = {s: [pattern for pattern, word in words.items() if s in meant[word[0]]] for s in segments_there}
    matched: set[str] = set()
    values: dict[str, int] = {}
    for target, segments in zip(targets, split, strict=True):
        found = {
            pattern
            for start, segment in enumerate(segments)
            for pattern in starting[segment]
            if _goes_on(segments, start, words[pattern], meant)
        }
        matched.update(found)
        if not found:
            continue
        best = max(exactness[pattern] for pattern in found)
        closest = [pattern for pattern in patterns if pattern in found and exactness[pattern] == best]
        if len({patterns[pattern] for pattern in closest}) > 1:
            listed = " and ".join(repr(pattern) for pattern in sorted(closest))
            raise SelectionError(field, f"{listed} say different things about {target}; make one of them more exact")
        values[target] = patterns[closest[0]]
    for pattern in patterns:
        if pattern not in matched:
            raise SelectionError(field, _unmatched(pattern, targets))
    return values


def _exactness(word: tuple[str, ...]) -> tuple[int, int]:
    """More segments before fewer, then fewer wildcards before more."""
    return len(word), -sum(_WILD.search(segment) is not None for segment in word)


def _goes_on(segments: tuple[str, ...], start: int, word: tuple[str, ...], meant: Mapping[str, Set[str]]) -> bool:
    """Whether what follows the first segment of a word follows where that one stands, too."""
    if start + len(word) > len(segments):
        return False
    return all(segments[start + i] in meant[word[i]] for i in range(1, len(word)))


def _is(segment: str, part: str) -> bool:
    low, dash, high = part.partition("-")
    if dash and low.isdecimal() and high.isdecimal():
        return segment.isdecimal() and int(low) <= int(segment) <= int(high)
    return fnmatchcase(segment, part)


def _unmatched(pattern: str, targets: Sequence[str]) -> str:
    names = dict.fromkeys(s for target in targets for s in target.split(".") if not s.isdecimal())
    near = difflib.get_close_matches(pattern.rpartition(".")[2], list(names), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return (
        f"{pattern!r} matches no module that carries an adapter: {hint}Their paths are made of {', '.join(names)} and "
        "the numbers of the blocks"
    )


def count_trainable(
    layout: ModelLayout,
    selection: Selection,
    *,
    rank: int = 0,
    variant: LoraVariant = LoraVariant.STANDARD,
    shapes: Mapping[str, AdapterShape] | None = None,
) -> int:
    """Number of trained elements: the selected tensors, and rank x (in + out) for every adapted layer.

    A rank-r adapter of a layer (out, in) is a pair A (r, in), B (out, r) (Hu et al. 2021, arXiv:2106.09685, section 4);
    fused experts have a pair each; DoRA adds a magnitude vector of `out` elements (Liu et al. 2024, arXiv:2402.09353,
    section 4). `shapes` are the adapters that there are; without them every selected module has one of `rank`.
    """
    total = sum(layout.by_path[path].size for path in selection.parameters)
    if shapes is None:
        shapes = adapter_shapes(selection, rank=rank, alpha=rank)
    for name, adapter in shapes.items():
        if name in layout.by_path:
            experts, *sides = layout.by_path[name].shape
            total += experts * adapter.rank * sum(sides)
            continue
        weight = layout.by_path[f"{name}.weight"]
        out, inputs = weight.shape if weight.kind is ParameterKind.LINEAR else weight.shape[::-1]
        total += adapter.rank * (out + inputs) + (out if variant is LoraVariant.DORA else 0)
    return total
