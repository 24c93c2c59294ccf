"""Layouts from `config.json`, held against the models that transformers builds: names, shapes, kinds, order."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from finetune_operator.errors import PlanningError, UnknownArchitecture
from finetune_operator.planner.shapes import FAMILIES, read_model
from finetune_trainer.layers import layout_of
from tests.tiny_models import ARCHITECTURES
from tests.unit.planner.models import (
    LLAMA_8B,
    LLAMA_8B_PARAMETERS,
    SMOLLM2_135M,
    SMOLLM2_135M_PARAMETERS,
)

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    **TOKENS,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
IMAGES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}

MORE: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama-one-kv": lambda **o: LlamaConfig(**{**SMALL, "num_key_value_heads": 1, "head_dim": 24, **o}),
    "llama-mha": lambda **o: LlamaConfig(**{**SMALL, **o}),
    "qwen3-default-head": lambda **o: Qwen3Config(**{**GROUPED, "attention_bias": True, **o}),
    "phi-normed": lambda **o: PhiConfig(**{**GROUPED, "qk_layernorm": True, **o}),
    "smollm3": lambda **o: SmolLM3Config(**{**GROUPED, **o}),
    "neox": lambda **o: GPTNeoXConfig(**{**SMALL, **o}),
    "neox-unbiased": lambda **o: GPTNeoXConfig(**{**SMALL, "attention_bias": False, **o}),
    "falcon-grouped": lambda **o: FalconConfig(
        **{**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "ffn_hidden_size": 96, **o}
    ),
    "falcon-one-norm": lambda **o: FalconConfig(
        **{**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, **o}
    ),
    "falcon-sequential": lambda **o: FalconConfig(**{**SMALL, "parallel_attn": False, "multi_query": False, **o}),
    "mixtral": lambda **o: MixtralConfig(**{**GROUPED, "num_local_experts": 3, "head_dim": 24, **o}),
    "qwen2-moe": lambda **o: Qwen2MoeConfig(
        **{**GROUPED, "num_experts": 6, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, **o}
    ),
    "qwen2-moe-mixed": lambda **o: Qwen2MoeConfig(
        **{
            **GROUPED,
            "num_experts": 6,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "qkv_bias": False,
            **o,
        }
    ),
    "qwen3-moe-mixed": lambda **o: Qwen3MoeConfig(
        **{**GROUPED, "num_experts": 8, "moe_intermediate_size": 32, "mlp_only_layers": [0], "head_dim": 24, **o}
    ),
    "gemma3-images": lambda **o: Gemma3Config(text_config=GROUPED, vision_config=IMAGES, **o),
    "gemma3-images-headless": lambda **o: Gemma3Config(
        text_config=GROUPED, vision_config={**IMAGES, "vision_use_head": False, "image_size": 56, "patch_size": 14}, **o
    ),
}
ALL = {**ARCHITECTURES, **MORE}


def as_saved(config: PreTrainedConfig) -> dict[str, Any]:
    """What stands in the file: keys that have the value of every model's default are left out."""
    saved: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return saved


@pytest.mark.parametrize("tied", [None, True, False], ids=["default", "tied", "untied"])
@pytest.mark.parametrize("name", ALL)
def test_the_layout_is_that_of_the_model(name: str, tied: bool | None) -> None:
    config = ALL[name](**({} if tied is None else {"tie_word_embeddings": tied}))
    with torch.device("meta"):
        expected = layout_of(AutoModelForCausalLM.from_config(config))
    assert tied is None or expected.tied is tied
    for source in (as_saved(config), config.to_dict()):
        layout = read_model(source).layout
        assert layout.parameters == expected.parameters
        assert layout == expected


@pytest.mark.parametrize(
    ("config", "expected"), [(LLAMA_8B, LLAMA_8B_PARAMETERS), (SMOLLM2_135M, SMOLLM2_135M_PARAMETERS)]
)
def test_parameter_counts_of_published_models(config: dict[str, Any], expected: int) -> None:
    assert read_model(config).layout.total == expected


def test_every_family_is_held_against_transformers() -> None:
    assert {config().model_type for config in ALL.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"mlp": 128, "gated": True, "routed": 1, "norms": 2}),
        ("mixtral", {"mlp": 2 * 128, "routed": 2}),
        ("qwen2-moe", {"mlp": 4 * 32 + 48, "routed": 4}),
        ("qwen2-moe-mixed", {"mlp": 4 * 1408 + 5632, "routed": 4}),
        ("qwen3-moe-mixed", {"mlp": 8 * 32, "head_norms": True}),
        ("gemma2", {"caps_scores": True, "keeps_scores": False, "norms": 4}),
        ("gemma3-images", {"architecture": "gemma3", "hidden": 64, "norms": 4, "head_norms": True}),
        ("phi", {"gated": False, "stepwise_gelu": True, "norms": 1}),
        ("neox", {"gated": False, "stepwise_gelu": False}),
        ("falcon", {"kv_heads": 1, "keeps_scores": True, "norms": 1}),
        ("falcon-grouped", {"kv_heads": 2, "norms": 2}),
    ],
)
def test_the_shape_has_what_activations_depend_on(name: str, expected: dict[str, Any]) -> None:
    shape = read_model(ALL[name]().to_dict()).shape
    assert {key: getattr(shape, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "config.json: hidden_size: missing"),
        ({"hidden_size": "4096"}, "hidden_size: '4096' is not a whole number from 1 to"),
        ({"hidden_size": 4096.0}, "hidden_size: 4096.0 is not a whole number"),
        ({"hidden_size": True}, "hidden_size: True is not a whole number"),
        ({"hidden_size": -1}, "hidden_size: -1 is not a whole number"),
        ({"vocab_size": 10**30}, "vocab_size: 1000000000000000000000000000000 is not a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is not a whole number from 1 to 1024"),
        ({"hidden_size": 4097}, "num_attention_heads: 32 does not divide hidden_size 4097"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: 5 does not divide num_attention_heads 32"),
        ({"attention_bias": "yes"}, "attention_bias: 'yes' is not true or false"),
        ({"model_type": None}, "model_type: None is not a text"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok: 9 is more than the 8 experts"),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": "all"},
            "mlp_only_layers: 'all' is not a list of whole numbers",
        ),
        ({"model_type": "gemma3"}, "vision_config: missing"),
        (
            {"model_type": "gemma3", "vision_config": {}, "text_config": {"model_type": "x"}},
            "text_config.num_attention_heads: missing",
        ),
    ],
)
def test_an_odd_configuration_is_refused_with_the_key(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanningError) as caught:
        read_model({**LLAMA_8B, **changes})
    assert words in str(caught.value)
    assert not isinstance(caught.value, UnknownArchitecture)


def test_a_configuration_without_a_kind_is_refused() -> None:
    with pytest.raises(PlanningError, match=r"config\.json: model_type: missing"):
        read_model({})


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(UnknownArchitecture) as caught:
        read_model({**LLAMA_8B, "model_type": "qwen3_moee"})
    assert "model_type 'qwen3_moee' (near: qwen3_moe) is not known here. Known: falcon, gemma," in str(caught.value)


def test_what_is_not_built_by_transformers_itself_is_unknown() -> None:
    remote = {**LLAMA_8B, "auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}}
    assert read_model(remote).layout.total == LLAMA_8B_PARAMETERS
    with pytest.raises(UnknownArchitecture, match="the code of llama comes with the model"):
        read_model(remote, remote_code=True)
    with pytest.raises(UnknownArchitecture, match="quantization_config"):
        read_model({**LLAMA_8B, "quantization_config": {"quant_method": "gptq"}})
