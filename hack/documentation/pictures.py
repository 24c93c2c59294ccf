"""Pictures of what is trained, drawn from the selection that planner and trainer make. SVG within the page: its colours
are the page's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_operator.planner.shapes import read_model
from finetune_trainer.contract import ModelLayout, Selection, select
from finetune_trainer.contract.selection import LayerSelection
from finetune_trainer.contract.vocabulary import Method

MODEL: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}
"""A Llama of 8 blocks."""
PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)
CELL = 20
LABELS = 190
_STYLE = {"full": "picture-full", "adapter": "picture-adapter", "frozen": "picture-frozen"}
_LEGEND = {"full": "trained itself", "adapter": "frozen, with an adapter", "frozen": "frozen"}


@dataclass(frozen=True, slots=True)
class Example:
    """A selection to draw."""

    title: str
    """The YAML, in one line."""
    method: Method
    layers: Mapping[str, Any]


EXAMPLES: Mapping[str, Sequence[Example]] = {
    "blocks": (
        Example("layers: {last: 3}", Method.FREEZE, {"last": 3}),
        Example("layers: {ids: [1, 4, 7]}", Method.FREEZE, {"ids": [1, 4, 7]}),
        Example('layers: {ranges: ["0-1", "6-7"]}', Method.FREEZE, {"ranges": ["0-1", "6-7"]}),
        Example("layers: {every: 4}", Method.FREEZE, {"every": 4}),
    ),
    "modules": (
        Example("layers: {last: 4, modules: [mlp]}", Method.FREEZE, {"last": 4, "modules": ["mlp"]}),
        Example(
            "layers: {last: 4, modules: [q_proj, v_proj]}", Method.FREEZE, {"last": 4, "modules": ["q_proj", "v_proj"]}
        ),
    ),
    "methods": (
        Example(
            "method: freeze, layers: {last: 2, also: [norm, lm_head]}",
            Method.FREEZE,
            {"last": 2, "also": ["norm", "lm_head"]},
        ),
        Example(
            "method: lora, layers: {last: 2, also: [norm, lm_head]}",
            Method.LORA,
            {"last": 2, "also": ["norm", "lm_head"]},
        ),
    ),
}


def layout() -> ModelLayout:
    """Of the model that is drawn."""
    return read_model(MODEL).layout


def state_of(chosen: Selection, module: str) -> str:
    """`full`, `adapter` or `frozen`: what a selection makes of a module."""
    if f"{module}.weight" in chosen.parameters or module in chosen.saved_modules:
        return "full"
    return "adapter" if module in chosen.adapted else "frozen"


def _cell(x: float, y: float, state: str, label: str, width: float = CELL - 2) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{CELL - 2}" rx="3" class="{_STYLE[state]}">'
        f"<title>{label}: {_LEGEND[state]}</title></rect>"
    )


def _words(x: float, y: float, text: str, *, end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x}" y="{y}"{anchor}>{text}</text>'


def _picture(width: float, height: float, parts: Iterator[str], title: str) -> str:
    # Without an empty line: that would end it, in Markdown.
    body = "\n".join(parts)
    return (
        f'<figure class="picture"><figcaption><code>{_escaped(title)}</code></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{_escaped(title)}">\n{body}\n'
        "</svg></figure>"
    )


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def draw(example: Example) -> str:
    """Blocks from left to right, their parts from top to bottom, what is beside them around."""
    model = layout()
    chosen = select(model, example.method, LayerSelection.model_validate(dict(example.layers)))
    return _picture(
        LABELS + model.block_count * CELL + 150, (len(PARTS) + 3) * CELL, _grid(model, chosen), example.title
    )


def _grid(model: ModelLayout, chosen: Selection) -> Iterator[str]:
    for column in range(model.block_count):
        yield _words(LABELS + column * CELL + 5, 14, str(column))
    for row, part in enumerate(PARTS):
        yield _words(LABELS - 8, (row + 1) * CELL + 14, part, end=True)
        for column in range(model.block_count):
            module = f"{model.blocks}.{column}.{part}"
            yield _cell(LABELS + column * CELL, (row + 1) * CELL, state_of(chosen, module), module)
    right = LABELS + model.block_count * CELL + 20
    beside = (model.input_embeddings, model.final_norm, model.output_embeddings)
    for row, path in enumerate(one for one in beside if one is not None):
        yield _cell(right, (row + 1) * CELL, state_of(chosen, path), path)
        yield _words(right + CELL + 4, (row + 1) * CELL + 14, path.rpartition(".")[2])
    bottom = (len(PARTS) + 1.5) * CELL
    for left, state in zip((LABELS - 100, LABELS + 30, LABELS + 220), _STYLE, strict=True):
        yield _cell(left, bottom, state, state)
        yield _words(left + CELL + 4, bottom + 14, _LEGEND[state])


def draw_unfreezing(active: Callable[[int], int], blocks: Sequence[int], steps: int, title: str) -> str:
    """Blocks from top to bottom in the order in which they join, time from left to right.

    active: how many of them are trained at a step.
    """
    return _picture(LABELS + 420, (len(blocks) + 2) * CELL, _bars(active, blocks, steps), title)


def _bars(active: Callable[[int], int], blocks: Sequence[int], steps: int) -> Iterator[str]:
    joins = [next(step for step in range(steps) if active(step) > place) for place in range(len(blocks))]
    for step in joins:
        yield _words(LABELS + 400 * step / steps, 14, str(step))
    for row, (block, begin) in enumerate(zip(blocks, joins, strict=True)):
        left = LABELS + 400 * begin / steps
        yield _words(LABELS - 8, (row + 1) * CELL + 14, f"block {block}", end=True)
        yield _cell(LABELS, (row + 1) * CELL, "frozen", f"block {block}", 400)
        yield _cell(left, (row + 1) * CELL, "full", f"block {block} from step {begin}", LABELS + 400 - left)
    yield _words(LABELS, (len(blocks) + 1) * CELL + 14, f"steps, of {steps}")
