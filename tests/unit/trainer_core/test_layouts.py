"""Where things are in models that are built unusually: each case is one rule of the search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OlmoConfig, PreTrainedConfig, PreTrainedModel

from finetune_trainer.contract import ModelLayout
from finetune_trainer.errors import UsageError
from finetune_trainer.layers import layout_of
from tests.tiny_models import BLOCKS, tiny_config


class Assembled(PreTrainedModel):
    """A model of modules at given paths, in that order. It is never run."""

    config_class = LlamaConfig

    def __init__(self, config: PreTrainedConfig, parts: dict[str, nn.Module], embedding: str, head: str | None) -> None:
        super().__init__(config)
        for path, part in parts.items():
            parent: nn.Module = self
            *folders, leaf = path.split(".")
            for folder in folders:
                if not hasattr(parent, folder):
                    parent.add_module(folder, nn.Module())
                parent = parent.get_submodule(folder)
            parent.add_module(leaf, part)
        self.places = embedding, head

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(self.places[0])

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.places[1] is None else self.get_submodule(self.places[1])


def blocks(count: int = BLOCKS) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(count))


def assembled(
    parts: dict[str, nn.Module], embedding: str, head: str | None = None, config: PreTrainedConfig | None = None
) -> Assembled:
    return Assembled(config or tiny_config(), {embedding: nn.Embedding(4, 2), **parts}, embedding, head)


@dataclass(frozen=True)
class Found:
    blocks: str
    embeddings: str
    final_norm: str | None = None
    head: str | None = None
    tied: bool = False

    @classmethod
    def of(cls, layout: ModelLayout) -> Found:
        return cls(layout.blocks, layout.input_embeddings, layout.final_norm, layout.output_embeddings, layout.tied)


def tied_head() -> Assembled:
    model = assembled({"layers": blocks(), "head": nn.Linear(2, 4, bias=False)}, "embed", "head")
    model.get_submodule("head").weight = model.get_submodule("embed").weight
    return model


def with_text_encoder() -> Assembled:
    """A composite configuration that describes an encoder of texts, too."""
    config = tiny_config()
    config.text_encoder = tiny_config(num_hidden_layers=9)
    return assembled({"encoder": blocks(9), "layers": blocks()}, "embed", config=config)


CASES: dict[str, tuple[Assembled, Found]] = {
    "no module around the blocks": (
        assembled({"layers": blocks(), "norm": nn.LayerNorm(2)}, "embed"),
        Found("layers", "embed", "norm"),
    ),
    "the blocks beside the embedding, not the outer ones": (
        assembled({"vision.layers": blocks(), "model.text.layers": blocks()}, "model.text.embed"),
        Found("model.text.layers", "model.text.embed"),
    ),
    "the blocks of the decoder that the embedding belongs to": (
        assembled({"a.vision.deep.layers": blocks(), "a.text.decoder.layers": blocks()}, "a.text.embed"),
        Found("a.text.decoder.layers", "a.text.embed"),
    ),
    "equal names further down count for nothing": (
        assembled({"x.text.layers": blocks(), "y.layers": blocks()}, "z.text.embed"),
        Found("y.layers", "z.text.embed"),
    ),
    "of several as near the outer one": (
        assembled({"model.side.inner.layers": blocks(), "model.layers": blocks()}, "model.embed"),
        Found("model.layers", "model.embed"),
    ),
    "lists of another length are no blocks": (
        assembled({"model.experts": blocks(BLOCKS + 1), "model.inner.layers": blocks()}, "model.embed"),
        Found("model.inner.layers", "model.embed"),
    ),
    "the decoder's number of blocks, not a text encoder's": (with_text_encoder(), Found("layers", "embed")),
    "the last norm is the final one": (
        assembled({"m.first_norm": nn.LayerNorm(2), "m.layers": blocks(), "m.last": nn.RMSNorm(2)}, "m.embed"),
        Found("m.layers", "m.embed", "m.last"),
    ),
    "a norm of the embedding is not": (
        assembled({"m.layers": blocks(), "m.embedding_norm": nn.LayerNorm(2)}, "m.embed"),
        Found("m.layers", "m.embed"),
    ),
    "nor one without parameters": (
        assembled({"m.layers": blocks(), "m.norm": nn.LayerNorm(2, elementwise_affine=False)}, "m.embed"),
        Found("m.layers", "m.embed"),
    ),
    "nor what is not a norm": (
        assembled({"m.layers": blocks(), "m.project_out": nn.Linear(2, 2)}, "m.embed"),
        Found("m.layers", "m.embed"),
    ),
    "a head of its own": (
        assembled({"layers": blocks(), "head": nn.Linear(2, 4)}, "embed", "head"),
        Found("layers", "embed", head="head"),
    ),
    "a tied head": (tied_head(), Found("layers", "embed", head="head", tied=True)),
    "a wrapped embedding, a wrapped head": (
        Assembled(
            tiny_config(),
            {"embed": nn.Sequential(nn.Embedding(4, 2)), "layers": blocks(), "head": nn.Sequential(nn.Linear(2, 4))},
            "embed",
            "head",
        ),
        Found("layers", "embed", head="head"),
    ),
}


@pytest.mark.parametrize(("model", "found"), CASES.values(), ids=CASES.keys())
def test_what_is_found(model: Assembled, found: Found) -> None:
    layout = layout_of(model)
    assert Found.of(layout) == found
    assert layout.block_count == BLOCKS


def test_a_model_whose_norms_have_no_parameters() -> None:
    config = OlmoConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=1,
    )
    with torch.device("meta"):
        layout = layout_of(AutoModelForCausalLM.from_config(config))
    assert Found.of(layout) == Found("model.layers", "model.embed_tokens", head="lm_head")


class Unfindable(Assembled):
    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError("not auto-handled")


class Detached(Assembled):
    """Hands out an embedding that is not one of its modules."""

    def get_input_embeddings(self) -> Any:
        return nn.Embedding(4, 2)


NO_EMBEDDING = "has no token embedding; use a decoder-only language model"
NO_BLOCKS = "has no list of its decoder blocks (num_hidden_layers is {}); this architecture is not supported"


class Uncounted(PreTrainedConfig):
    """As of remote code that names things its own way."""


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (Unfindable, tiny_config(), f"Unfindable {NO_EMBEDDING}"),
        (Detached, tiny_config(), f"Detached {NO_EMBEDDING}"),
        (Assembled, tiny_config(num_hidden_layers=3), f"Assembled {NO_BLOCKS.format(3)}"),
        (Assembled, Uncounted(), f"Assembled {NO_BLOCKS.format(None)}"),
    ],
)
def test_what_cannot_be_found_is_named(kind: type[Assembled], config: PreTrainedConfig, message: str) -> None:
    model = kind(config, {"embed": nn.Embedding(4, 2), "layers": blocks()}, "embed", None)
    with pytest.raises(UsageError) as caught:
        layout_of(model)
    assert caught.value.message == f"spec.model: {message}"
