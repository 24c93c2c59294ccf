"""Mixtures of experts. transformers 5 keeps a block's experts in two fused tensors. Pure: no I/O."""

from __future__ import annotations

from dataclasses import replace

from finetune_operator.planner.shapes.decoders import (
    LLAMA_NORMS,
    Attention,
    Parameters,
    attention_of,
    decoder,
    gated_mlp,
    read_shape,
)
from finetune_operator.planner.shapes.model import KnownModel, ModelShape, linear, norm
from finetune_operator.planner.shapes.reader import MAX_EXPERTS, ConfigReader
from finetune_trainer.contract import ParameterInfo, ParameterKind


def _router(path: str, hidden: int, experts: int) -> Parameters:
    """A router is no linear layer of torch, so nothing takes it for one."""
    return [ParameterInfo(f"{path}.weight", (experts, hidden), ParameterKind.OTHER)]


def _experts(path: str, hidden: int, width: int, experts: int) -> Parameters:
    return [
        ParameterInfo(f"{path}.gate_up_proj", (experts, 2 * width, hidden), ParameterKind.EXPERTS),
        ParameterInfo(f"{path}.down_proj", (experts, hidden, width), ParameterKind.EXPERTS),
    ]


def _norms(path: str, hidden: int) -> Parameters:
    return [p for name in LLAMA_NORMS for p in norm(f"{path}.{name}", hidden)]


def _routed(config: ConfigReader, default: int, experts: int) -> int:
    chosen = config.number("num_experts_per_tok", default, largest=MAX_EXPERTS)
    if chosen > experts:
        raise config.error("num_experts_per_tok", f"{chosen} is more than the {experts} experts")
    return chosen


def mixtral(config: ConfigReader) -> KnownModel:
    """Mixtral: every MLP is a mixture."""
    shape = read_shape(config, kv_heads=8)
    attention = attention_of(shape)
    width, experts = shape.mlp, config.number("num_local_experts", 8, largest=MAX_EXPERTS)

    def block(path: str, index: int) -> Parameters:
        return [
            *attention.parameters(f"{path}.self_attn"),
            *_router(f"{path}.mlp.gate", shape.hidden, experts),
            *_experts(f"{path}.mlp.experts", shape.hidden, width, experts),
            *_norms(path, shape.hidden),
        ]

    routed = _routed(config, 2, experts)
    return decoder(
        replace(shape, mlp=routed * width, routed=routed), block, tied=config.flag("tie_word_embeddings", False)
    )


def _is_sparse(config: ConfigReader, index: int) -> bool:
    """Whether a block of Qwen's mixtures is one: some blocks may have a plain MLP."""
    step = config.number("decoder_sparse_step", 1)
    return index not in config.numbers("mlp_only_layers") and (index + 1) % step == 0


def _width_of_widest_block(shape: ModelShape, config: ConfigReader, sparse: int) -> int:
    """What a token passes at most in one block."""
    kinds = {_is_sparse(config, index) for index in range(shape.blocks)}
    return max([sparse] * (True in kinds) + [shape.mlp] * (False in kinds))


def qwen2_moe(config: ConfigReader) -> KnownModel:
    """Qwen1.5-MoE and Qwen2-MoE: experts, and one that every token passes."""
    shape = read_shape(config)
    attention: Attention = attention_of(shape, bias=config.flag("qkv_bias", True))
    experts = config.number("num_experts", 60, largest=MAX_EXPERTS)
    width = config.number("moe_intermediate_size", 1408)
    shared = config.number("shared_expert_intermediate_size", 5632)

    def block(path: str, index: int) -> Parameters:
        mlp = (
            [
                *_router(f"{path}.mlp.gate", shape.hidden, experts),
                *_experts(f"{path}.mlp.experts", shape.hidden, width, experts),
                *gated_mlp(f"{path}.mlp.shared_expert", shape.hidden, shared),
                *linear(f"{path}.mlp.shared_expert_gate", shape.hidden, 1),
            ]
            if _is_sparse(config, index)
            else gated_mlp(f"{path}.mlp", shape.hidden, shape.mlp)
        )
        return [*attention.parameters(f"{path}.self_attn"), *mlp, *_norms(path, shape.hidden)]

    routed = _routed(config, 4, experts)
    total = _width_of_widest_block(shape, config, routed * width + shared)
    return decoder(replace(shape, mlp=total, routed=routed), block, tied=config.flag("tie_word_embeddings", False))


def qwen3_moe(config: ConfigReader) -> KnownModel:
    """Qwen3-MoE: queries and keys normalised head by head, no shared expert."""
    shape = replace(read_shape(config, kv_heads=4), head_norms=True)
    bias = config.flag("attention_bias", False)
    attention = attention_of(shape, bias=bias, output_bias=bias)
    experts = config.number("num_experts", config.number("num_local_experts", 128), largest=MAX_EXPERTS)
    width = config.number("moe_intermediate_size", 768)

    def block(path: str, index: int) -> Parameters:
        mlp = (
            [
                *_experts(f"{path}.mlp.experts", shape.hidden, width, experts),
                *_router(f"{path}.mlp.gate", shape.hidden, experts),
            ]
            if _is_sparse(config, index)
            else gated_mlp(f"{path}.mlp", shape.hidden, shape.mlp)
        )
        return [*attention.parameters(f"{path}.self_attn"), *mlp, *_norms(path, shape.hidden)]

    routed = _routed(config, 8, experts)
    total = _width_of_widest_block(shape, config, routed * width)
    return decoder(replace(shape, mlp=total, routed=routed), block, tied=config.flag("tie_word_embeddings", False))
