"""Small models of real architectures with random weights: 4 decoder blocks, hidden 64, 320 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 320
BLOCKS = 4

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _decoder(config: Callable[..., PreTrainedConfig], **changes: Any) -> Callable[..., PreTrainedConfig]:
    return lambda **overrides: config(**{**_DECODER, **changes, **overrides})


ARCHITECTURES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": _decoder(LlamaConfig),
    "llama-biased": _decoder(LlamaConfig, attention_bias=True, mlp_bias=True),
    "qwen2": _decoder(Qwen2Config),
    "qwen3": _decoder(Qwen3Config, head_dim=16),
    "mistral": _decoder(MistralConfig),
    "gemma": _decoder(GemmaConfig, head_dim=16),
    "gemma2": _decoder(Gemma2Config, head_dim=16, query_pre_attn_scalar=16),
    "gemma3": _decoder(Gemma3TextConfig, head_dim=16, query_pre_attn_scalar=16),
    "phi": _decoder(PhiConfig),
    "phi3": _decoder(Phi3Config),
    "mixtral": _decoder(MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": _decoder(
        Qwen3MoeConfig,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=1,
    ),
    "gpt2": lambda **overrides: GPT2Config(
        **{
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": BLOCKS,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **overrides,
        }
    ),
    "falcon": lambda **overrides: FalconConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **overrides,
        }
    ),
}
"""Name of an architecture to a function that makes its configuration; keyword arguments override its fields."""

UNPLANNED: dict[str, Callable[..., PreTrainedConfig]] = {
    "gpt-oss": _decoder(
        GptOssConfig,
        intermediate_size=32,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    # Its upper two blocks take the keys and values of the lower two.
    "gemma4": _decoder(
        Gemma4TextConfig,
        head_dim=16,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * (BLOCKS // 2),
        num_kv_shared_layers=BLOCKS // 2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        sliding_window=16,
    ),
}
"""The same of those that the operator does not know the memory of."""


def tiny_config(architecture: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """The configuration of a tiny model; `tie_word_embeddings` is the usual override."""
    return {**ARCHITECTURES, **UNPLANNED}[architecture](**overrides)


def tiny_model(architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny model in fp32 on the CPU. Norms and biases are random too, so that none of them starts at a value that
    training could leave by accident only."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **overrides), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def meta_model(architecture: str = "llama", **overrides: Any) -> PreTrainedModel:
    """The same without memory behind its tensors."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(architecture, **overrides))
