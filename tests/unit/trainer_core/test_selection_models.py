"""Selection in real architectures: a table of what words mean in each, and laws that hold in all of them, counted by
torch and PEFT."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaForCausalLM, PreTrainedModel

from finetune_trainer.contract import LayerSelection, ModelLayout, Selection, adapter_shapes, count_trainable, select
from finetune_trainer.contract.vocabulary import LoraBias, Method
from finetune_trainer.layers import apply_selection, layout_of
from finetune_trainer.methods.lora import quiet_peft
from tests.tiny_models import ARCHITECTURES, BLOCKS, meta_model, tiny_config


def unfused_mixture() -> PreTrainedModel:
    """A mixture whose experts are modules of their own, as in models with remote code: as many as there are blocks, and
    more."""
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config("llama", tie_word_embeddings=False))
        for block in model.model.layers:
            block.mlp = nn.ModuleDict({"gate": nn.Linear(64, 12, bias=False), "experts": nn.ModuleList()})
            for _ in range(12):
                block.mlp["experts"].append(
                    nn.ModuleDict({name: nn.Linear(64, 64, bias=False) for name in ("up_proj", "down_proj")})
                )
    return model


def gemma3_with_images() -> PreTrainedModel:
    """The multimodal layout, with an image encoder of as many blocks."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
    config = Gemma3Config(text_config=tiny_config("gemma3"), vision_config=vision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    return model


@cache
def model_of(name: str) -> tuple[PreTrainedModel, ModelLayout]:
    made = {"unfused": unfused_mixture, "gemma3-images": gemma3_with_images}
    model = made[name]() if name in made else meta_model(name, tie_word_embeddings=False)
    return model, layout_of(model)


LLAMA_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LLAMA_ATTENTION = tuple(f"self_attn.{x}_proj" for x in "qkvo")
TABLE: list[tuple[str, str, tuple[str, ...], tuple[str, ...]]] = [
    ("llama", "model.layers", (), (*LLAMA_ATTENTION, *LLAMA_MLP)),
    ("mixtral", "model.layers", ("self_attn",), LLAMA_ATTENTION),
    ("qwen3-moe", "model.layers", (), LLAMA_ATTENTION),
    ("unfused", "model.layers", ("experts.3.up_proj",), ("mlp.experts.3.up_proj",)),
    ("unfused", "model.layers", ("experts.3",), ("mlp.experts.3.up_proj", "mlp.experts.3.down_proj")),
    ("unfused", "model.layers", ("mlp.gate",), ("mlp.gate",)),
    ("gpt2", "transformer.h", (), ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    ("gpt2", "transformer.h", ("attn.c_proj",), ("attn.c_proj",)),
    ("gpt2", "transformer.h", ("c_proj",), ("attn.c_proj", "mlp.c_proj")),
    (
        "falcon",
        "transformer.h",
        (),
        ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    ("falcon", "transformer.h", ("self_attention.dense",), ("self_attention.dense",)),
    (
        "phi",
        "model.layers",
        (),
        (*(f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "dense")), "mlp.fc1", "mlp.fc2"),
    ),
    ("phi", "model.layers", ("dense",), ("self_attn.dense",)),
    ("phi3", "model.layers", (), ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    ("phi3", "model.layers", ("qkv_proj",), ("self_attn.qkv_proj",)),
    ("gemma3", "model.layers", ("mlp",), LLAMA_MLP),
    ("gemma3-images", "model.language_model.layers", (), (*LLAMA_ATTENTION, *LLAMA_MLP)),
    ("gemma3-images", "model.language_model.layers", ("q_proj",), ("self_attn.q_proj",)),
]


@pytest.mark.parametrize(("name", "blocks", "modules", "expected"), TABLE)
def test_what_words_mean_in_each_architecture(
    name: str, blocks: str, modules: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    _, layout = model_of(name)
    selection = select(layout, Method.LORA, LayerSelection(ids=(0, 3), modules=modules))
    assert layout.blocks == blocks
    assert set(selection.adapted) == {f"{blocks}.{block}.{inner}" for block in (0, 3) for inner in expected}
    assert len(selection.adapted) == 2 * len(expected)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "unfused", "gemma3-images"])
def test_frozen_blocks_are_told_by_their_number_alone(name: str) -> None:
    """Independently of the selection's code: by a pattern over the names."""
    _, layout = model_of(name)
    selection = select(layout, Method.FREEZE, LayerSelection(ids=(1, 3)))
    pattern = re.compile(rf"{re.escape(layout.blocks)}\.(1|3)\..*")
    assert selection.parameters == tuple(path for path in layout.by_path if pattern.fullmatch(path))
    assert selection.parameters


@pytest.mark.parametrize("name", ["llama", "gemma3-images", "gpt2"])
def test_tied_heads_are_their_embedding(name: str) -> None:
    made = {"gemma3-images": gemma3_with_images}
    model = made[name]() if name in made else meta_model(name, tie_word_embeddings=True)
    layout = layout_of(model)
    for method in (Method.FREEZE, Method.LORA):
        selection = select(layout, method, LayerSelection(last=1, also=("lm_head",)))
        assert selection.saved_modules == (layout.input_embeddings,)
        assert f"{layout.input_embeddings}.weight" in selection.parameters
        assert "the shared tensor is trained" in selection.notes[0]
    # The whole model has the shared tensor anyway, once.
    assert select(layout, Method.FULL, None).parameters.count(f"{layout.input_embeddings}.weight") == 1


# ---- laws ----

NAMES = ("llama-biased", "gpt2", "falcon", "phi", "phi3", "mixtral", "unfused", "gemma3-images")
ids = st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=BLOCKS).map(lambda found: tuple(sorted(set(found))))


def chosen(selection: Selection) -> set[str]:
    return {*selection.parameters, *selection.adapted, *selection.adapted_experts}


def words_of(layout: ModelLayout, method: Method) -> list[str]:
    """Words that mean something to a method: leaves and children of a block."""
    kinds = ("linear", "conv1d") if method.uses_lora else ("linear", "conv1d", "experts", "bias", "other")
    paths = [layout.within_block(p.path) for p in layout.parameters if p.kind in kinds and layout.block_of(p.path) == 0]
    return sorted({segment for path in paths for segment in path.split(".")[:-1] if not segment.isdigit()})


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from([Method.FREEZE, Method.LORA]), ids, ids, st.data())
def test_selections_of_blocks_and_of_modules_are_unions(
    name: str, method: Method, first: tuple[int, ...], second: tuple[int, ...], data: st.DataObject
) -> None:
    _, layout = model_of(name)
    words = data.draw(st.lists(st.sampled_from(words_of(layout, method)), min_size=1, max_size=3, unique=True))

    def of(blocks: tuple[int, ...], *modules: str) -> set[str]:
        return chosen(select(layout, method, LayerSelection(ids=blocks, modules=modules)))

    assert of((*first, *second), *words) == of(first, *words) | of(second, *words)
    assert of(first, *words) == set().union(*(of(first, word) for word in words))
    if not set(first) & set(second):
        assert not of(first, *words) & of(second, *words)
    rest = tuple(block for block in range(BLOCKS) if block not in first)
    if rest:
        assert of(tuple(range(BLOCKS)), *words) - of(first, *words) == of(rest, *words)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), ids, st.data())
def test_counts_are_those_of_torch(name: str, blocks: tuple[int, ...], data: st.DataObject) -> None:
    model, layout = model_of(name)
    also = data.draw(st.sets(st.sampled_from(["norm", "embeddings", "lm_head"])))
    selection = select(layout, Method.FREEZE, LayerSelection(ids=blocks, also=tuple(sorted(also))))
    apply_selection(model, selection.parameters)
    assert count_trainable(layout, selection) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(NAMES), ids, st.integers(1, 9), st.sampled_from(list(LoraBias)), st.booleans())
def test_counts_are_those_of_peft(
    name: str, blocks: tuple[int, ...], rank: int, bias: LoraBias, with_experts: bool
) -> None:
    _, layout = model_of(name)
    modules: tuple[str, ...] = ("mlp", "self_attn") if with_experts and name == "mixtral" else ()
    selection = select(layout, Method.LORA, LayerSelection(ids=blocks, modules=modules), bias)
    made: Any = {"unfused": unfused_mixture, "gemma3-images": gemma3_with_images}
    model = made[name]() if name in made else meta_model(name, tie_word_embeddings=False)
    config = LoraConfig(
        r=rank,
        bias=bias.value,
        target_modules=list(selection.adapted),
        target_parameters=list(selection.adapted_experts) or None,
        fan_in_fan_out=name == "gpt2",
    )
    with quiet_peft():
        tuned = get_peft_model(model, config)
    shapes = adapter_shapes(selection, rank=rank, alpha=1)
    assert count_trainable(layout, selection, shapes=shapes) == tuned.get_nb_trainable_parameters()[0]
