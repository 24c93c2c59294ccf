"""Which tensors a job's words mean: tables for the words, properties for the numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_trainer.contract import (
    LayerSelection,
    ModelLayout,
    ParameterInfo,
    ParameterKind,
    SelectionError,
    count_trainable,
    select,
)
from finetune_trainer.contract.selection import SELECTORS, resolve_blocks
from finetune_trainer.contract.vocabulary import LoraBias, LoraVariant, Method

HIDDEN, INNER, VOCABULARY = 8, 24, 50
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def layout(blocks: int = 4, *, tied: bool = False, biases: Sequence[str] = (), experts: bool = False) -> ModelLayout:
    """A decoder as transformers names it."""
    parameters = [ParameterInfo("model.embed_tokens.weight", (VOCABULARY, HIDDEN), ParameterKind.EMBEDDING)]
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        for name, shape in LINEARS.items():
            parameters.append(ParameterInfo(f"{prefix}.{name}.weight", shape, ParameterKind.LINEAR))
            if name.rpartition(".")[2] in biases:
                parameters.append(ParameterInfo(f"{prefix}.{name}.bias", shape[:1], ParameterKind.BIAS))
        if experts:
            parameters.append(ParameterInfo(f"{prefix}.mlp.gate.weight", (4, HIDDEN), ParameterKind.OTHER))
            for name, shape in (("gate_up_proj", (4, 6, HIDDEN)), ("down_proj", (4, HIDDEN, 3))):
                parameters.append(ParameterInfo(f"{prefix}.mlp.experts.{name}", shape, ParameterKind.EXPERTS))
        parameters.append(ParameterInfo(f"{prefix}.input_layernorm.weight", (HIDDEN,), ParameterKind.OTHER))
    parameters.append(ParameterInfo("model.norm.weight", (HIDDEN,), ParameterKind.OTHER))
    if not tied:
        parameters.append(ParameterInfo("lm_head.weight", (VOCABULARY, HIDDEN), ParameterKind.LINEAR))
    return ModelLayout(tuple(parameters), "model.layers", blocks, "model.embed_tokens", "lm_head", "model.norm", tied)


# ---- blocks ----


@pytest.mark.parametrize(
    ("words", "blocks"),
    [
        ({"last": 2}, (4, 5)),
        ({"last": 6}, (0, 1, 2, 3, 4, 5)),
        ({"first": 1}, (0,)),
        ({"ids": [5, 0, 5, 2]}, (0, 2, 5)),
        ({"ranges": ["1-2"]}, (1, 2)),
        ({"ranges": ["4-5", "0-1", "1-1"]}, (0, 1, 4, 5)),
        ({"ranges": [" 1 - 2 "]}, (1, 2)),
        ({"every": 1}, (0, 1, 2, 3, 4, 5)),
        ({"every": 2}, (1, 3, 5)),
        ({"every": 4}, (3,)),
        ({"every": 6}, (5,)),
        ({"all": True}, (0, 1, 2, 3, 4, 5)),
        ({"all": False, "last": 1}, (5,)),
        ({}, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_selectors(words: dict[str, Any], blocks: tuple[int, ...]) -> None:
    assert resolve_blocks(LayerSelection(**words), 6) == blocks


@pytest.mark.parametrize(
    ("words", "field", "says"),
    [
        ({"last": 7}, "spec.layers.last", "7 is more than the model's 6 blocks"),
        ({"first": 9}, "spec.layers.first", "9 is more than"),
        ({"every": 7}, "spec.layers.every", "7 is more than"),
        ({"ids": [0, 6, 9]}, "spec.layers.ids", "6, 9 outside the model: it has 6 blocks, 0 to 5"),
        ({"ids": [-1]}, "spec.layers.ids", "-1 outside"),
        ({"ranges": ["2"]}, "spec.layers.ranges", "'2' is not a range; write it like '8-15'"),
        ({"ranges": ["a-b"]}, "spec.layers.ranges", "'a-b' is not a range"),
        ({"ranges": ["\u00b2-3"]}, "spec.layers.ranges", "is not a range"),
        ({"ranges": ["3-1"]}, "spec.layers.ranges", "runs backwards; write '1-3'"),
        ({"ranges": ["2-6"]}, "spec.layers.ranges", "ends outside the model: its blocks are 0 to 5"),
    ],
)
def test_selectors_that_do_not_fit(words: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(SelectionError) as caught:
        resolve_blocks(LayerSelection(**words), 6)
    assert caught.value.field == field
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{field}: ")


def test_two_selectors_are_refused() -> None:
    with pytest.raises(ValidationError, match="layers has last and ids: set exactly one of last, first, ids"):
        LayerSelection(last=1, ids=(2,))


@pytest.mark.parametrize("words", [{"last": 0}, {"first": -1}, {"every": 0}, {"ids": []}, {"ranges": []}])
def test_empty_selectors_are_refused(words: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LayerSelection(**words)


@given(st.integers(1, 80), st.data())
def test_blocks_are_ascending_unique_and_inside(count: int, data: st.DataObject) -> None:
    number = st.integers(1, count)
    words = data.draw(
        st.one_of(
            st.fixed_dictionaries({"last": number}),
            st.fixed_dictionaries({"first": number}),
            st.fixed_dictionaries({"every": number}),
            st.fixed_dictionaries({"ids": st.lists(st.integers(0, count - 1), min_size=1, max_size=20)}),
            st.fixed_dictionaries({"all": st.just(True)}),
        )
    )
    blocks = resolve_blocks(LayerSelection(**words), count)
    assert list(blocks) == sorted(set(blocks))
    assert blocks
    assert all(0 <= block < count for block in blocks)
    if "ids" in words:
        assert set(blocks) == set(words["ids"])
    for name in ("last", "first"):
        if name in words:
            assert len(blocks) == words[name]
    if "every" in words:
        assert len(blocks) == count // words["every"]
        assert all((block + 1) % words["every"] == 0 for block in blocks)


@given(st.integers(1, 60), st.data())
def test_last_and_first_partition_the_model(count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, count))
    head = resolve_blocks(LayerSelection(first=first), count)
    if first < count:
        tail = resolve_blocks(LayerSelection(last=count - first), count)
        assert head + tail == tuple(range(count))
    assert head == resolve_blocks(LayerSelection(ranges=(f"0-{first - 1}",)), count)


# ---- modules ----


def inner(paths: Sequence[str], block: int = 0) -> set[str]:
    """The part below one block of those paths that lie in it."""
    prefix = f"model.layers.{block}."
    return {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["mlp"], {"mlp.up_proj.weight", "mlp.down_proj.weight"}),
        (["v_proj"], {"self_attn.v_proj.weight"}),
        (["self_attn.q_proj", "mlp.up_proj"], {"self_attn.q_proj.weight", "mlp.up_proj.weight"}),
        (["self_attn"], {f"self_attn.{x}_proj.weight" for x in "qkvo"}),
        (["input_layernorm"], {"input_layernorm.weight"}),
    ],
)
def test_modules_of_frozen_models(modules: list[str], expected: set[str]) -> None:
    selection = select(layout(), Method.FREEZE, LayerSelection(first=1, modules=tuple(modules)))
    assert inner(selection.parameters) == expected
    assert len(selection.parameters) == len(expected)


def test_a_word_has_to_equal_whole_segments() -> None:
    for word in ("proj", "self", "up_pro", "norm", "layers", "model", "q_proj.weigh", "mlp.down"):
        with pytest.raises(SelectionError, match="unknown module"):
            select(layout(), Method.FREEZE, LayerSelection(first=1, modules=(word,)))


def test_unknown_modules_list_the_near_ones() -> None:
    with pytest.raises(SelectionError, match=r"unknown module 'key_proj': did you mean .*k_proj") as caught:
        select(layout(), Method.LORA, LayerSelection(all=True, modules=("mlp", "key_proj")))
    assert caught.value.field == "spec.layers.modules"
    assert "The model's blocks have: self_attn, q_proj, k_proj" in str(caught.value)
    assert "0" not in str(caught.value).partition("blocks have:")[2]


def test_expert_numbers_are_not_block_numbers() -> None:
    parameters = tuple(
        ParameterInfo(f"model.layers.{b}.mlp.experts.{e}.up.weight", (4, 4), ParameterKind.LINEAR)
        for b in range(4)
        for e in range(8)
    )
    one_each = ModelLayout(parameters, "model.layers", 4, "model.embed_tokens", None, None, False)
    selection = select(one_each, Method.FREEZE, LayerSelection(ids=(3,)))
    assert {path.split(".")[2] for path in selection.parameters} == {"3"}
    assert len(selection.parameters) == 8


# ---- methods ----


def test_full_without_a_choice_is_the_whole_model() -> None:
    for layers in (None, LayerSelection(), LayerSelection(all=True), LayerSelection(also=("norm",))):
        selection = select(layout(), Method.FULL, layers)
        assert selection.parameters == tuple(layout().by_path)
    partial = select(layout(), Method.FULL, LayerSelection(all=True, modules=("mlp",)))
    assert {path.split(".")[3] for path in partial.parameters} == {"mlp"}


def test_freeze_of_all_blocks_leaves_the_rest() -> None:
    selection = select(layout(), Method.FREEZE, LayerSelection(all=True))
    assert set(layout().by_path) - set(selection.parameters) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_bitfit_takes_biases_only() -> None:
    biased = layout(biases=("q_proj", "up_proj"))
    selection = select(biased, Method.BITFIT, LayerSelection(ids=(1, 2), modules=("mlp",)))
    assert selection.parameters == ("model.layers.1.mlp.up_proj.bias", "model.layers.2.mlp.up_proj.bias")
    with pytest.raises(SelectionError, match="and the model has none; use lora"):
        select(layout(), Method.BITFIT, None)


def test_lora_takes_linear_layers_and_says_that_experts_are_left_out() -> None:
    selection = select(layout(experts=True), Method.LORA, LayerSelection(ids=(1,)))
    assert set(inner(selection.adapted, 1)) == set(LINEARS)
    assert selection.parameters == selection.adapted_experts == ()
    assert "the fused experts carry no adapters" in selection.notes[0]
    assert select(layout(), Method.LORA, None).notes == ()
    with pytest.raises(SelectionError, match=r"no linear layer .* those that can are: q_proj"):
        select(layout(experts=True), Method.LORA, LayerSelection(modules=("input_layernorm",)))


@pytest.mark.parametrize(
    ("modules", "adapted", "experts"),
    [
        (("experts",), (), ("gate_up_proj", "down_proj")),
        (("experts.down_proj",), (), ("down_proj",)),
        (("mlp",), ("mlp.up_proj", "mlp.down_proj"), ("gate_up_proj", "down_proj")),
        (("down_proj", "q_proj"), ("self_attn.q_proj", "mlp.down_proj"), ("down_proj",)),
        (("self_attn.v_proj",), ("self_attn.v_proj",), ()),
    ],
)
def test_experts_carry_adapters_where_a_word_names_them(
    modules: tuple[str, ...], adapted: tuple[str, ...], experts: tuple[str, ...]
) -> None:
    selection = select(layout(experts=True), Method.LORA, LayerSelection(ids=(2,), modules=modules))
    assert selection.adapted == tuple(f"model.layers.2.{name}" for name in adapted)
    assert selection.adapted_experts == tuple(f"model.layers.2.mlp.experts.{name}" for name in experts)
    assert selection.notes == ()


@pytest.mark.parametrize(("bias", "count"), [(LoraBias.NONE, 0), (LoraBias.LORA_ONLY, 1), (LoraBias.ALL, 8)])
def test_lora_biases(bias: LoraBias, count: int) -> None:
    biased = layout(biases=("q_proj", "up_proj"))
    chosen = LayerSelection(ids=(0,), modules=("q_proj", "v_proj"))
    selection = select(biased, Method.QLORA, chosen, bias)
    assert len(selection.parameters) == count
    assert all(path.endswith(".bias") for path in selection.parameters)


# ---- also ----


@pytest.mark.parametrize("method", [Method.FREEZE, Method.LORA])
def test_also_names_modules_outside_the_blocks(method: Method) -> None:
    chosen = LayerSelection(last=1, also=("norm", "lm_head", "norm", "model.embed_tokens"))
    selection = select(layout(), method, chosen)
    assert selection.saved_modules == ("model.norm", "lm_head", "model.embed_tokens")
    outside = [p for p in selection.parameters if ".layers." not in p]
    assert outside == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert selection.notes == ()


def test_also_of_a_tied_head_is_the_embedding_and_says_so() -> None:
    selection = select(layout(tied=True), Method.FREEZE, LayerSelection(last=1, also=("lm_head", "embeddings")))
    assert selection.saved_modules == ("model.embed_tokens",)
    assert [p for p in selection.parameters if ".layers." not in p] == ["model.embed_tokens.weight"]
    assert "lm_head shares its weight with model.embed_tokens" in selection.notes[0]
    assert "training it changes both" in selection.notes[1]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("lmhead", "did you mean lm_head"),
        ("model.layers.1.mlp", "lies in a block; choose it with ids and modules"),
        ("model.nrm", "did you mean model.norm"),
    ],
)
def test_unknown_names_in_also(word: str, says: str) -> None:
    with pytest.raises(SelectionError, match=says) as caught:
        select(layout(), Method.FREEZE, LayerSelection(last=1, also=(word,)))
    assert caught.value.field == "spec.layers.also"


def test_also_of_what_a_model_does_not_have() -> None:
    bare = ModelLayout(layout().parameters, "model.layers", 4, "model.embed_tokens", None, None, False)
    for word in ("lm_head", "norm"):
        with pytest.raises(SelectionError, match="the model has none; remove it"):
            select(bare, Method.FREEZE, LayerSelection(last=1, also=(word,)))


# ---- counts ----


@pytest.mark.parametrize(
    ("variant", "extra"), [(LoraVariant.STANDARD, 0), (LoraVariant.RSLORA, 0), (LoraVariant.DORA, 2 * HIDDEN)]
)
def test_adapters_are_counted_by_rank(variant: LoraVariant, extra: int) -> None:
    selection = select(layout(), Method.LORA, LayerSelection(ids=(0, 3), modules=("q_proj",), also=("norm",)))
    expected = 2 * 3 * (HIDDEN + HIDDEN) + HIDDEN + extra
    assert count_trainable(layout(), selection, rank=3, variant=variant) == expected


def test_dora_of_a_conv1d_counts_its_outputs() -> None:
    conv = ParameterInfo("h.0.attn.c_attn.weight", (4, 12), ParameterKind.CONV1D)
    gpt = ModelLayout((conv,), "h", 1, "wte", None, None, True)
    selection = select(gpt, Method.LORA, None)
    assert count_trainable(gpt, selection, rank=2) == 2 * 16
    assert count_trainable(gpt, selection, rank=2, variant=LoraVariant.DORA) == 2 * 16 + 12


@settings(max_examples=60)
@given(st.integers(1, 12), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_counts_add_up_over_a_partition(blocks: int, tied: bool, experts: bool, source: random.Random) -> None:
    model = layout(blocks, tied=tied, experts=experts, biases=("q_proj",))
    chosen = sorted(source.sample(range(blocks), source.randint(1, blocks)))
    rest = [block for block in range(blocks) if block not in chosen]

    def count(ids: list[int], also: tuple[str, ...] = ()) -> int:
        if not ids:
            return 0
        return count_trainable(model, select(model, Method.FREEZE, LayerSelection(ids=tuple(ids), also=also)))

    beside = ("embeddings", "norm", "lm_head")
    assert count(chosen, beside) + count(rest) == model.total
    assert count(chosen) == len(chosen) * count([0])


@settings(max_examples=60)
@given(st.integers(1, 10), st.data())
def test_selected_paths_are_in_model_order_and_exist(blocks: int, data: st.DataObject) -> None:
    model = layout(blocks, biases=("k_proj",))
    words = data.draw(
        st.lists(st.sampled_from(["mlp", "q_proj", "self_attn", "up_proj", "input_layernorm"]), max_size=3)
    )
    also = data.draw(st.lists(st.sampled_from(["norm", "lm_head", "embeddings"]), max_size=3))
    method = data.draw(st.sampled_from([Method.FREEZE, Method.FULL]))
    selection = select(model, method, LayerSelection(last=1, modules=tuple(words), also=tuple(also)))
    order = list(model.by_path)
    assert list(selection.parameters) == sorted(set(selection.parameters), key=order.index)
    in_blocks = {model.block_of(p) for p in selection.parameters} - {None}
    assert in_blocks == {blocks - 1}


def test_every_selector_is_a_field() -> None:
    assert set(SELECTORS) < set(LayerSelection.model_fields)


# ---- layout ----


def test_layout_reads_paths_by_segment() -> None:
    model = layout(12)
    assert model.block_of("model.layers.11.mlp.up_proj.weight") == 11
    assert model.block_of("model.layers_extra.1.weight") is None
    assert model.block_of("model.layers.scale") is None
    assert model.block_of("model.norm.weight") is None
    assert model.within_block("model.layers.3.mlp.up_proj.weight") == "mlp.up_proj.weight"
    assert [p.path for p in model.of_module("model.norm")] == ["model.norm.weight"]
    assert model.of_module("model.nor") == ()
    assert model.total == sum(p.size for p in model.parameters)
