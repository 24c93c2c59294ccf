"""Decoders with a fused projection of queries, keys and values and a plain MLP: GPT-2, GPT-NeoX, Falcon. Pure."""

from __future__ import annotations

from dataclasses import replace

from finetune_operator.planner.shapes.decoders import Parameters, read_shape
from finetune_operator.planner.shapes.model import (
    KnownModel,
    ModelShape,
    causal_model,
    conv1d,
    embedding,
    head,
    linear,
    norm,
)
from finetune_operator.planner.shapes.reader import ConfigReader
from finetune_trainer.contract import MAX_BLOCKS


def gpt2(config: ConfigReader) -> KnownModel:
    """GPT-2: linear layers whose weights lie the other way round, learned positions."""
    hidden = config.number("n_embd")
    if config.flag("add_cross_attention", False):
        raise config.error("add_cross_attention", "the decoder of an encoder-decoder cannot be tuned on its own")
    shape = ModelShape(
        architecture="gpt2",
        hidden=hidden,
        blocks=config.number("n_layer", largest=MAX_BLOCKS),
        heads=config.number("n_head"),
        kv_heads=config.number("n_head"),
        head_dim=config.divided("n_embd", "n_head"),
        mlp=config.number("n_inner", 4 * hidden),
        vocabulary=config.number("vocab_size"),
        gated=False,
        stepwise_gelu=config.is_stepwise_gelu("activation_function"),
        dropout=config.has_dropout(),
    )
    tied = config.flag("tie_word_embeddings", True)
    parameters = embedding("transformer.wte", shape.vocabulary, hidden)
    parameters += embedding("transformer.wpe", config.number("n_positions", 1024), hidden)
    for index in range(shape.blocks):
        path = f"transformer.h.{index}"
        parameters += norm(f"{path}.ln_1", hidden, bias=True)
        parameters += conv1d(f"{path}.attn.c_attn", hidden, 3 * hidden)
        parameters += conv1d(f"{path}.attn.c_proj", hidden, hidden)
        parameters += norm(f"{path}.ln_2", hidden, bias=True)
        parameters += conv1d(f"{path}.mlp.c_fc", hidden, shape.mlp)
        parameters += conv1d(f"{path}.mlp.c_proj", shape.mlp, hidden)
    parameters += norm("transformer.ln_f", hidden, bias=True)
    parameters += head("lm_head", hidden, shape.vocabulary, tied=tied)
    return causal_model(
        parameters, shape, tied=tied, decoder="transformer", blocks="h", embeddings="wte", final_norm="ln_f"
    )


def gpt_neox(config: ConfigReader) -> KnownModel:
    """GPT-NeoX and Pythia."""
    shape = replace(read_shape(config), gated=False)
    bias = config.flag("attention_bias", True)
    hidden, tied = shape.hidden, config.flag("tie_word_embeddings", False)
    parameters = embedding("gpt_neox.embed_in", shape.vocabulary, hidden)
    for index in range(shape.blocks):
        path = f"gpt_neox.layers.{index}"
        parameters += norm(f"{path}.input_layernorm", hidden, bias=True)
        parameters += norm(f"{path}.post_attention_layernorm", hidden, bias=True)
        parameters += linear(f"{path}.attention.query_key_value", hidden, 3 * hidden, bias=bias)
        parameters += linear(f"{path}.attention.dense", hidden, hidden, bias=bias)
        parameters += linear(f"{path}.mlp.dense_h_to_4h", hidden, shape.mlp, bias=True)
        parameters += linear(f"{path}.mlp.dense_4h_to_h", shape.mlp, hidden, bias=True)
    parameters += norm("gpt_neox.final_layer_norm", hidden, bias=True)
    parameters += head("lm_head", hidden, shape.vocabulary, tied=tied)
    return causal_model(
        parameters, shape, tied=tied, decoder="gpt_neox", embeddings="embed_in", final_norm="final_layer_norm"
    )


def _falcon_shape(config: ConfigReader) -> ModelShape:
    heads = config.number("num_attention_heads")
    grouped = config.flag("new_decoder_architecture", False)
    kv_heads = heads
    if grouped:
        kv_heads = config.number("num_kv_heads", heads)
    elif config.flag("multi_query", True):
        kv_heads = 1
    hidden = config.number("hidden_size")
    return ModelShape(
        architecture="falcon",
        hidden=hidden,
        blocks=config.number("num_hidden_layers", largest=MAX_BLOCKS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.divided("hidden_size", "num_attention_heads"),
        mlp=config.number("ffn_hidden_size", 4 * hidden),
        vocabulary=config.number("vocab_size"),
        gated=False,
        # Its few keys and values are spread over the query heads in a way that no fused kernel of torch takes.
        keeps_scores=kv_heads != heads,
        dropout=config.has_dropout(),
    )


def _falcon_norms(config: ConfigReader, path: str, hidden: int) -> Parameters:
    """Which norms a block has, and in which order: it depends on whether attention and MLP stand side by side."""
    if not config.flag("parallel_attn", True):
        names = ["post_attention_layernorm", "input_layernorm"]
    elif config.number("num_ln_in_parallel_attn", 2 if config.flag("new_decoder_architecture", False) else 1) == 2:
        names = ["ln_attn", "ln_mlp"]
    else:
        names = ["input_layernorm"]
    return [p for name in names for p in norm(f"{path}.{name}", hidden, bias=True)]


def falcon(config: ConfigReader) -> KnownModel:
    """Falcon 7B, 40B, 180B and the older RefinedWeb shapes."""
    shape = _falcon_shape(config)
    hidden, bias = shape.hidden, config.flag("bias", False)
    fused = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    tied = config.flag("tie_word_embeddings", True)
    shape = replace(shape, norms=len(_falcon_norms(config, "", hidden)) // 2)
    parameters = embedding("transformer.word_embeddings", shape.vocabulary, hidden)
    for index in range(shape.blocks):
        path = f"transformer.h.{index}"
        parameters += linear(f"{path}.self_attention.query_key_value", hidden, fused, bias=bias)
        parameters += linear(f"{path}.self_attention.dense", hidden, hidden, bias=bias)
        parameters += linear(f"{path}.mlp.dense_h_to_4h", hidden, shape.mlp, bias=bias)
        parameters += linear(f"{path}.mlp.dense_4h_to_h", shape.mlp, hidden, bias=bias)
        parameters += _falcon_norms(config, path, hidden)
    parameters += norm("transformer.ln_f", hidden, bias=True)
    parameters += head("lm_head", hidden, shape.vocabulary, tied=tied)
    return causal_model(
        parameters,
        shape,
        tied=tied,
        decoder="transformer",
        blocks="h",
        embeddings="word_embeddings",
        final_norm="ln_f",
    )
