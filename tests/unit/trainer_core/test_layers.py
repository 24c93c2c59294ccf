"""Layouts of real architectures, and what a backward pass runs through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    TrainerCallback,
)

from finetune_trainer.contract import ParameterKind
from finetune_trainer.errors import InternalError, UsageError
from finetune_trainer.layers import (
    apply_selection,
    assert_trainable_is,
    checkpoint_blocks,
    decoder_blocks,
    layout_of,
    lowest_differentiated_block,
    trained_parameters,
)
from tests.tiny_models import ARCHITECTURES, BLOCKS, meta_model, tiny_model
from tests.trainer_jobs import fit
from tests.unit.trainer_core.conftest import ModelFolder
from tests.unit.trainer_core.test_exactness import quick

PLACES = {
    "gpt2": ("transformer.h", "transformer.wte", "transformer.ln_f"),
    "falcon": ("transformer.h", "transformer.word_embeddings", "transformer.ln_f"),
    "phi": ("model.layers", "model.embed_tokens", "model.final_layernorm"),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_layouts(architecture: str, tied: bool) -> None:
    model = meta_model(architecture, tie_word_embeddings=tied)
    layout = layout_of(model)
    places = PLACES.get(architecture, ("model.layers", "model.embed_tokens", "model.norm"))
    assert (layout.blocks, layout.input_embeddings, layout.final_norm) == places
    assert (layout.block_count, layout.output_embeddings, layout.tied) == (BLOCKS, "lm_head", tied)
    assert [p.path for p in layout.parameters] == [name for name, _ in model.named_parameters()]
    assert layout.total == model.num_parameters()
    assert ("lm_head.weight" in layout.by_path) is not tied
    assert {layout.block_of(path) for path in layout.by_path} == {None, 0, 1, 2, 3}


@pytest.mark.parametrize(
    ("architecture", "path", "kind"),
    [
        ("llama", "model.layers.0.mlp.up_proj.weight", ParameterKind.LINEAR),
        ("llama", "model.layers.0.input_layernorm.weight", ParameterKind.OTHER),
        ("llama", "model.embed_tokens.weight", ParameterKind.EMBEDDING),
        ("qwen2", "model.layers.2.self_attn.q_proj.bias", ParameterKind.BIAS),
        ("qwen3", "model.layers.2.self_attn.q_norm.weight", ParameterKind.OTHER),
        ("phi", "model.layers.0.input_layernorm.bias", ParameterKind.BIAS),
        ("mixtral", "model.layers.1.mlp.gate.weight", ParameterKind.OTHER),
        ("mixtral", "model.layers.1.mlp.experts.gate_up_proj", ParameterKind.EXPERTS),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", ParameterKind.CONV1D),
        ("gpt2", "transformer.wpe.weight", ParameterKind.EMBEDDING),
        ("falcon", "transformer.h.1.mlp.dense_h_to_4h.weight", ParameterKind.LINEAR),
    ],
)
def test_kinds(architecture: str, path: str, kind: ParameterKind) -> None:
    assert layout_of(meta_model(architecture)).by_path[path].kind is kind


def test_blocks_are_those_of_the_language_model_beside_an_image_encoder_of_the_same_depth() -> None:
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=16, patch_size=8
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    layout = layout_of(model)
    assert layout.blocks == "model.language_model.layers"
    assert layout.final_norm == "model.language_model.norm"


# ---- gradients ----


def test_apply_selection_is_exact_and_undoes_what_was_before() -> None:
    model = tiny_model()
    wanted = {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"}
    apply_selection(model, {"lm_head.weight"})
    apply_selection(model, wanted)
    assert set(trained_parameters(model)) == wanted
    assert_trainable_is(model, wanted)


NORM, HEAD = "model.norm.weight", "lm_head.weight"
UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("trained", "expected", "difference"),
    [
        ([NORM], [NORM, HEAD], f"1 selected but not trained: {HEAD}"),
        ([NORM, HEAD], [HEAD], f"1 trained but not selected: {NORM}"),
        ([NORM], [HEAD], f"1 selected but not trained: {HEAD}; 1 trained but not selected: {NORM}"),
        # Five are named, in order; of more it is said how many.
        (
            [UP.format(block) for block in (3, 2, 1, 0)] + [HEAD],
            [],
            f"5 trained but not selected: {HEAD}, {', '.join(UP.format(block) for block in range(4))}",
        ),
        (
            [UP.format(block) for block in range(4)] + [HEAD, NORM, "model.embed_tokens.weight"],
            [],
            f"7 trained but not selected: {HEAD}, model.embed_tokens.weight,"
            f" {', '.join(UP.format(block) for block in range(3))} and 2 more",
        ),
    ],
)
def test_a_difference_is_named_on_either_side(trained: list[str], expected: list[str], difference: str) -> None:
    model = tiny_model(tie_word_embeddings=False)
    apply_selection(model, trained)
    with pytest.raises(InternalError) as caught:
        assert_trainable_is(model, expected)
    assert caught.value.message == f"the trained parameters are not the selected ones: {difference}"


def test_what_the_model_does_not_have_cannot_be_selected() -> None:
    with pytest.raises(InternalError, match=r"selected parameters that the model does not have: model\.nothing$"):
        apply_selection(tiny_model(), {"model.nothing", NORM})


@pytest.mark.parametrize(
    ("tied", "trained", "lowest"),
    [
        (False, ["model.layers.2.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"], 2),
        (False, ["model.layers.0.mlp.up_proj.weight"], 0),
        (False, ["model.norm.weight", "lm_head.weight"], 4),
        (False, ["model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight"], 0),
        (True, ["model.embed_tokens.weight"], 0),
        (True, ["model.norm.weight"], 4),
    ],
)
def test_lowest_differentiated_block(tied: bool, trained: list[str], lowest: int) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    apply_selection(model, trained)
    assert lowest_differentiated_block(model, layout_of(model)) == lowest


class Recorder(TrainerCallback):
    """Notes which decoder blocks the backward pass runs through, and how often their forward runs."""

    def __init__(self) -> None:
        self.backward: set[int] = set()
        self.forwards = [0] * BLOCKS

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for index, block in enumerate(decoder_blocks(kwargs["model"], layout_of(meta_model()))):
            block.mlp.register_forward_hook(self._note_backward(index))
            # Recomputing stops early, where the last tensor that was needed is there again: look at the first module.
            block.input_layernorm.register_forward_hook(self._note_forward(index))

    def _note_backward(self, index: int) -> Any:
        def hook(_module: torch.nn.Module, _args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda _grad: self.backward.add(index))

        return hook

    def _note_forward(self, index: int) -> Any:
        def hook(_module: torch.nn.Module, _args: Any, _output: torch.Tensor) -> None:
            self.forwards[index] += 1

        return hook


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("method", "layers", "blocks"),
    [
        ("lora", {"last": 2}, {2, 3}),
        ("lora", {"ids": [1]}, {1, 2, 3}),
        ("lora", {"first": 1}, {0, 1, 2, 3}),
        ("freeze", {"last": 1}, {3}),
        ("freeze", {"last": 1, "also": ["embeddings"]}, {0, 1, 2, 3}),
        ("qlora", {"last": 2, "also": ["norm"]}, {2, 3}),
        ("full", {"last": 3}, {1, 2, 3}),
    ],
)
def test_backward_ends_at_the_lowest_trained_block(
    method: str,
    layers: dict[str, Any],
    blocks: set[int],
    checkpointing: bool,
    model_folder: ModelFolder,
    tmp_path: Path,
) -> None:
    """transformers and PEFT make the embeddings' output require a gradient wherever checkpointing is on."""
    config = quick(method, layers, training={"gradient_checkpointing": checkpointing, "max_steps": 1})
    seen = Recorder()
    fit(model_folder("llama", tie_word_embeddings=False), config, tmp_path, callbacks=[seen])
    assert seen.backward == blocks
    # A checkpointed block runs twice, and only one that the backward pass needs.
    assert seen.forwards == [2 if checkpointing and index in blocks else 1 for index in range(BLOCKS)]


def test_checkpointing_changes_no_gradient(model_folder: ModelFolder, tmp_path: Path) -> None:
    losses = []
    for checkpointing in (True, False):
        config = quick("lora", {"last": 3}, training={"gradient_checkpointing": checkpointing, "max_steps": 3})
        losses.append(fit(model_folder(), config, tmp_path / str(checkpointing)).losses)
    assert losses[0] == losses[1]


def test_checkpointing_is_switched_off_below() -> None:
    model = tiny_model()
    apply_selection(model, {"model.layers.2.mlp.up_proj.weight"})
    assert checkpoint_blocks(model, layout_of(model), enabled=True) == 2
    flags = [block.gradient_checkpointing for block in decoder_blocks(model, layout_of(model))]
    assert flags == [False, False, True, True]


@pytest.mark.parametrize("blocks", [1, 2, 3, 9])
def test_some_blocks_are_recomputed(blocks: int, model_folder: ModelFolder, tmp_path: Path) -> None:
    """The lowest of those that the backward pass reaches."""
    expected = fit(model_folder(), quick("lora", {"last": 3}, training={"max_steps": 2}), tmp_path / "none")
    training = {"gradient_checkpointing": True, "recomputed_blocks": blocks, "max_steps": 2}
    seen = Recorder()
    found = fit(model_folder(), quick("lora", {"last": 3}, training=training), tmp_path / "some", callbacks=[seen])
    assert found.losses == expected.losses
    assert [runs // seen.forwards[0] for runs in seen.forwards] == [1, 2, 1 + (blocks > 1), 1 + (blocks > 2)]


def test_blocks_that_cannot_be_checkpointed() -> None:
    """As in models with remote code: refused where it was asked for, left alone where it was not."""
    model = tiny_model()
    layout = layout_of(model)
    blocks = decoder_blocks(model, layout)
    assert checkpoint_blocks(model, layout, enabled=True) == 0
    blocks[0] = torch.nn.Identity()
    with pytest.raises(UsageError) as caught:
        checkpoint_blocks(model, layout, enabled=True)
    assert caught.value.message == (
        "spec.training.gradientCheckpointing: Identity does not support it; set it to never"
    )
    checkpoint_blocks(model, layout, enabled=False)
    assert [block.gradient_checkpointing for block in blocks[1:]] == [False, False, False]


def test_blocks_that_are_gone() -> None:
    model = tiny_model()
    layout = replace(layout_of(model), blocks="model.norm")
    with pytest.raises(InternalError, match=r"^model\.norm is no longer the list of decoder blocks$"):
        decoder_blocks(model, layout)
