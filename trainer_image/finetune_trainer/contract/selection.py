"""Which tensors a job trains: pure functions from a layout and the job's words to exact paths.

Nothing here matches by substring: a path is parsed into its segments, and a word has to equal whole segments. A word
that matches nothing is an error that lists the nearest names.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import Field, field_validator, model_validator

from finetune_trainer.contract.base import ContractModel
from finetune_trainer.contract.layout import MAX_BLOCKS, ModelLayout, ParameterInfo, ParameterKind
from finetune_trainer.contract.schedule import UnfreezeSchedule
from finetune_trainer.contract.vocabulary import LoraBias, Method

SELECTORS = ("last", "first", "ids", "ranges", "every", "all")
ALSO = ("lm_head", "embeddings", "norm")
LORA_KINDS = frozenset({ParameterKind.LINEAR, ParameterKind.CONV1D})


class SelectionError(ValueError):
    """The job's words do not fit the model. The message names the field, the value and the remedy."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class LayerSelection(ContractModel):
    """Which decoder blocks, which parts of them, and what beside them."""

    last: int | None = Field(default=None, ge=1, le=MAX_BLOCKS)
    """The last n decoder blocks."""
    first: int | None = Field(default=None, ge=1, le=MAX_BLOCKS)
    """The first n decoder blocks."""
    ids: tuple[int, ...] | None = Field(default=None, min_length=1, max_length=MAX_BLOCKS)
    """Exactly these decoder blocks, counted from 0. Order and repetition do not matter."""
    ranges: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=64)
    """Ranges of decoder blocks, both ends included: `8-15`."""
    every: int | None = Field(default=None, ge=1, le=MAX_BLOCKS)
    """Every n-th decoder block, the last of each n: 4 selects 3, 7, 11, ..."""
    all: bool | None = None
    """All decoder blocks."""
    modules: tuple[str, ...] = Field(default=(), max_length=64)
    """Children of a block (`self_attn`, `mlp`), leaves (`q_proj`) or dotted paths (`self_attn.q_proj`). Empty means all
    that the method can train."""
    also: tuple[str, ...] = Field(default=(), max_length=64)
    """What is trained in full beside the blocks: `lm_head`, `embeddings`, `norm`, or an exact module path."""
    unfreeze: UnfreezeSchedule | None = None
    """Start with one block and let the others follow."""

    @field_validator("ids")
    @classmethod
    def _normalise_ids(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if value is None else tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _one_selector(self) -> LayerSelection:
        chosen = [name for name in SELECTORS if getattr(self, name) not in (None, False)]
        if len(chosen) > 1:
            raise ValueError(f"layers has {' and '.join(chosen)}: set exactly one of {', '.join(SELECTORS)}")
        return self


@dataclass(frozen=True, slots=True)
class Selection:
    """The exact answer."""

    blocks: tuple[int, ...]
    """Selected decoder blocks, ascending."""
    parameters: tuple[str, ...]
    """Paths of the base model's tensors that are trained themselves, `also` included, in the model's order."""
    adapted: tuple[str, ...]
    """Paths of the modules that carry a low-rank adapter, in the model's order; empty without LoRA."""
    saved_modules: tuple[str, ...]
    """Paths of the modules that `also` names: with adapters they are trained and saved in full beside them."""
    notes: tuple[str, ...]
    """What a user should know about this selection."""
    adapted_experts: tuple[str, ...] = ()
    """Paths of the tensors of fused experts that carry low-rank adapters, one for each expert, in the model's order."""


def resolve_blocks(layers: LayerSelection, count: int) -> tuple[int, ...]:
    """The block indices that the selector names, ascending.

    Raises SelectionError for an index outside 0..count-1, a malformed range or a number larger than the model.
    """
    last = count - 1
    if layers.ids is not None:
        outside = [i for i in layers.ids if not 0 <= i <= last]
        if outside:
            listed = ", ".join(map(str, outside))
            raise SelectionError("spec.layers.ids", f"{listed} outside the model: it has {count} blocks, 0 to {last}")
        return layers.ids
    if layers.ranges is not None:
        return tuple(sorted({i for text in layers.ranges for i in _parse_range(text, last)}))
    for name in ("last", "first", "every"):
        number = getattr(layers, name)
        if number is not None and number > count:
            raise SelectionError(
                f"spec.layers.{name}", f"{number} is more than the model's {count} blocks; use at most {count}"
            )
    if layers.last is not None:
        return tuple(range(count - layers.last, count))
    if layers.first is not None:
        return tuple(range(layers.first))
    if layers.every is not None:
        return tuple(range(layers.every - 1, count, layers.every))
    return tuple(range(count))


def _parse_range(text: str, last: int) -> range:
    start, dash, end = text.partition("-")
    if not (dash and start.strip().isdecimal() and end.strip().isdecimal()):
        raise SelectionError("spec.layers.ranges", f"{text!r} is not a range; write it like '8-15'")
    low, high = int(start), int(end)
    if low > high:
        raise SelectionError("spec.layers.ranges", f"{text!r} runs backwards; write '{high}-{low}'")
    if high > last:
        raise SelectionError("spec.layers.ranges", f"{text!r} ends outside the model: its blocks are 0 to {last}")
    return range(low, high + 1)


def select(
    layout: ModelLayout, method: Method, layers: LayerSelection | None, bias: LoraBias = LoraBias.NONE
) -> Selection:
    """Resolve a job's words against a model.

    Raises SelectionError when a word matches nothing in the model or nothing would be trained.
    """
    chosen = layers or LayerSelection()
    alone = method is Method.HEAD and all(getattr(chosen, name) in (None, False) for name in SELECTORS)
    if alone and chosen.modules:
        raise SelectionError("spec.layers.modules", f"of which blocks? Set one of {', '.join(SELECTORS)} as well")
    blocks = () if alone else resolve_blocks(chosen, layout.block_count)
    notes: list[str] = []
    saved = tuple(dict.fromkeys(_resolve_also(layout, word, notes) for word in chosen.also))
    beside = {p.path for module in saved for p in layout.of_module(module)}
    inside = _inside_blocks(layout, set(blocks), chosen.modules, method)
    if method is Method.FULL and _is_whole_model(layers):
        trained = {p.path for p in layout.parameters}
        saved = ()
    elif method.trains_base_weights:
        trained = {p.path for p in inside} | beside
        if method is Method.HEAD and layout.output_embeddings is not None:
            trained |= {p.path for p in layout.of_module(layout.output_embeddings)}
    elif method.uses_lora:
        trained = beside | _lora_biases(layout, inside, bias)
    else:
        trained = beside
    adapted, experts = _carriers(inside, chosen.modules, notes) if method.uses_lora else ((), ())
    if method.uses_lora and not adapted and not experts:
        raise SelectionError(
            "spec.layers.modules",
            "no linear layer among the selected modules can carry an adapter; "
            f"those that can are: {', '.join(_linear_names(layout))}",
        )
    if method.trains_base_weights and not trained:
        raise SelectionError("spec.layers", "nothing is trained; select at least one block or name something in also")
    ordered = tuple(p.path for p in layout.parameters if p.path in trained)
    return Selection(blocks, ordered, adapted, saved, tuple(notes), experts)


def _carriers(
    inside: Sequence[ParameterInfo], modules: Sequence[str], notes: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules, and the tensors of fused experts, that carry adapters. Experts do where a word names them: an
    adapter for each of a hundred experts is more than somebody expects who named nothing."""
    fused = tuple(p.path for p in inside if p.kind is ParameterKind.EXPERTS)
    if fused and not modules:
        notes.append("the fused experts carry no adapters; name them in layers.modules (experts) to train them too")
    return tuple(p.module for p in inside if p.kind in LORA_KINDS), fused if modules else ()


def _is_whole_model(layers: LayerSelection | None) -> bool:
    """Whether `method: full` means every tensor of the model, embeddings and norms included."""
    if layers is None:
        return True
    return all(getattr(layers, name) in (None, False) for name in SELECTORS if name != "all") and not layers.modules


def _inside_blocks(
    layout: ModelLayout, blocks: set[int], modules: Sequence[str], method: Method
) -> tuple[ParameterInfo, ...]:
    candidates = [p for p in layout.parameters if layout.block_of(p.path) in blocks]
    if method is Method.BITFIT:
        candidates = _only_biases(layout, candidates)
    matched = _match_modules(layout, candidates, modules)
    if method.uses_lora:
        return tuple(p for p in matched if p.kind in LORA_KINDS or p.kind is ParameterKind.EXPERTS)
    return tuple(matched)


def _only_biases(layout: ModelLayout, candidates: list[ParameterInfo]) -> list[ParameterInfo]:
    biases = [p for p in candidates if p.path.endswith(".bias")]
    if not biases:
        where = (
            "the selected blocks have" if any(p.path.endswith(".bias") for p in layout.parameters) else "the model has"
        )
        raise SelectionError(
            "spec.method", f"bitfit trains biases only, and {where} none; use lora, or freeze with layers.modules"
        )
    return biases


def _match_modules(layout: ModelLayout, candidates: list[ParameterInfo], modules: Sequence[str]) -> list[ParameterInfo]:
    if not modules:
        return candidates
    wanted = [tuple(word.split(".")) for word in modules]
    hits = [False] * len(wanted)
    matched = []
    meant: dict[str, bool] = {}
    for parameter in candidates:
        name = layout.within_block(parameter.path)
        if name not in meant:
            # Once for the same part of all blocks.
            segments = tuple(name.split("."))
            found = [i for i, word in enumerate(wanted) if _contains(segments, word)]
            for i in found:
                hits[i] = True
            meant[name] = bool(found)
        if meant[name]:
            matched.append(parameter)
    for word, hit in zip(modules, hits, strict=True):
        if not hit:
            raise SelectionError("spec.layers.modules", _unknown(word, _module_names(layout, candidates)))
    return matched


def _contains(segments: tuple[str, ...], word: tuple[str, ...]) -> bool:
    """Whether `word` stands in `segments` as a run of whole segments."""
    width = len(word)
    return any(segments[i : i + width] == word for i in range(len(segments) - width + 1))


def _module_names(layout: ModelLayout, parameters: Iterable[ParameterInfo]) -> tuple[str, ...]:
    """Every single segment that a word could name in these blocks; expert numbers and tensor names left out."""
    names = dict.fromkeys(
        segment
        for parameter in parameters
        for segment in layout.within_block(parameter.path).split(".")
        if not segment.isdigit() and segment not in ("weight", "bias")
    )
    return tuple(names)


def _linear_names(layout: ModelLayout) -> tuple[str, ...]:
    linear = [p for p in layout.parameters if p.kind in LORA_KINDS and layout.block_of(p.path) is not None]
    return tuple(dict.fromkeys(p.module.rpartition(".")[2] for p in linear))


def _unknown(word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return f"unknown module {word!r}: {hint}The model's blocks have: {', '.join(names)}"


def _resolve_also(layout: ModelLayout, word: str, notes: list[str]) -> str:
    known = {
        "lm_head": layout.output_embeddings,
        "embeddings": layout.input_embeddings,
        "norm": layout.final_norm,
    }
    if word in known:
        module = known[word]
        if module is None:
            raise SelectionError("spec.layers.also", f"{word!r}: the model has none; remove it")
        if word == "lm_head" and layout.tied:
            notes.append(
                f"lm_head shares its weight with {layout.input_embeddings}: the shared tensor is trained, as input "
                "embedding and as head"
            )
            return layout.input_embeddings
        if word == "embeddings" and layout.tied:
            notes.append(f"{layout.input_embeddings} is also the head's weight: training it changes both")
        return module
    if layout.of_module(word):
        if layout.block_of(word) is not None:
            raise SelectionError("spec.layers.also", f"{word!r} lies in a block; choose it with ids and modules")
        return word
    outside = dict.fromkeys(p.module for p in layout.parameters if layout.block_of(p.path) is None)
    near = difflib.get_close_matches(word, [*ALSO, *outside], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise SelectionError(
        "spec.layers.also", f"unknown name {word!r}: {hint}Use {', '.join(ALSO)} or one of: {', '.join(outside)}"
    )


def _lora_biases(layout: ModelLayout, inside: Sequence[ParameterInfo], bias: LoraBias) -> set[str]:
    """The biases that PEFT trains for `bias: all` (every one of the model) and `lora_only` (of the adapted layers)."""
    if bias is LoraBias.NONE:
        return set()
    if bias is LoraBias.ALL:
        return {p.path for p in layout.parameters if p.path.endswith(".bias")}
    return {f"{p.module}.bias" for p in inside if f"{p.module}.bias" in layout.by_path}
