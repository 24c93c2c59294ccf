"""Decoders of Llama's kind: separate projections, a gated MLP, RMS norms; and Phi. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from finetune_operator.planner.shapes.model import (
    KnownModel,
    ModelShape,
    causal_model,
    embedding,
    head,
    linear,
    norm,
)
from finetune_operator.planner.shapes.reader import ConfigReader
from finetune_trainer.contract import MAX_BLOCKS, ParameterInfo

Parameters = list[ParameterInfo]
Block = Callable[[str, int], Parameters]


@dataclass(frozen=True, slots=True)
class Attention:
    """The projections of one attention layer."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    """Of queries, keys and values."""
    output_bias: bool = False
    output: str = "o_proj"
    head_norms: Sequence[str] = ()
    norm_bias: bool = False

    def parameters(self, path: str) -> Parameters:
        """All tensors, in the order in which transformers registers them."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            *linear(f"{path}.q_proj", self.hidden, query, bias=self.bias),
            *linear(f"{path}.k_proj", self.hidden, key, bias=self.bias),
            *linear(f"{path}.v_proj", self.hidden, key, bias=self.bias),
            *linear(f"{path}.{self.output}", query, self.hidden, bias=self.output_bias),
            *(p for name in self.head_norms for p in norm(f"{path}.{name}", self.head_dim, bias=self.norm_bias)),
        ]


def read_shape(
    config: ConfigReader, *, kv_heads: int | None = None, head_dim: int | None = None, mlp: int | None = None
) -> ModelShape:
    """What nearly every decoder's configuration says. The arguments are the family's own defaults."""
    heads = config.number("num_attention_heads")
    width = config.number("head_dim", head_dim or 0) or config.divided("hidden_size", "num_attention_heads")
    shape = ModelShape(
        architecture=config.text("model_type"),
        hidden=config.number("hidden_size"),
        blocks=config.number("num_hidden_layers", largest=MAX_BLOCKS),
        heads=heads,
        kv_heads=config.number("num_key_value_heads", kv_heads or heads),
        head_dim=width,
        mlp=config.number("intermediate_size") if mlp is None else mlp,
        vocabulary=config.number("vocab_size"),
        silu=config.is_silu(),
        dropout=config.has_dropout(),
    )
    if shape.heads % shape.kv_heads:
        raise config.error("num_key_value_heads", f"{shape.kv_heads} does not divide num_attention_heads {heads}")
    return shape


def attention_of(shape: ModelShape, *, bias: bool = False, output_bias: bool = False) -> Attention:
    """The usual attention of a shape."""
    names = ("q_norm", "k_norm") if shape.head_norms else ()
    return Attention(shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, bias, output_bias, head_norms=names)


def gated_mlp(path: str, hidden: int, width: int, *, bias: bool = False) -> Parameters:
    """gate_proj, up_proj, down_proj."""
    return [
        *linear(f"{path}.gate_proj", hidden, width, bias=bias),
        *linear(f"{path}.up_proj", hidden, width, bias=bias),
        *linear(f"{path}.down_proj", width, hidden, bias=bias),
    ]


def decoder(shape: ModelShape, block: Block, *, tied: bool, name: str = "model") -> KnownModel:
    """Token embedding, blocks, final norm and head."""
    parameters = embedding(f"{name}.embed_tokens", shape.vocabulary, shape.hidden)
    for index in range(shape.blocks):
        parameters += block(f"{name}.layers.{index}", index)
    parameters += norm(f"{name}.norm", shape.hidden)
    parameters += head("lm_head", shape.hidden, shape.vocabulary, tied=tied)
    return causal_model(parameters, shape, tied=tied, decoder=name)


LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = (*LLAMA_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def plain_block(
    shape: ModelShape, attention: Attention, *, mlp_bias: bool = False, norms: Sequence[str] = LLAMA_NORMS
) -> Block:
    """Attention, a gated MLP, then the norms."""

    def block(path: str, index: int) -> Parameters:
        return [
            *attention.parameters(f"{path}.self_attn"),
            *gated_mlp(f"{path}.mlp", shape.hidden, shape.mlp, bias=mlp_bias),
            *(p for name in norms for p in norm(f"{path}.{name}", shape.hidden)),
        ]

    return block


def llama(config: ConfigReader) -> KnownModel:
    """Llama 1 to 3, SmolLM, SmolLM2 and many others."""
    shape = read_shape(config)
    bias = config.flag("attention_bias", False)
    block = plain_block(
        shape, attention_of(shape, bias=bias, output_bias=bias), mlp_bias=config.flag("mlp_bias", False)
    )
    return decoder(shape, block, tied=config.flag("tie_word_embeddings", False))


def smollm3(config: ConfigReader) -> KnownModel:
    """SmolLM3: Llama's shape with other defaults; some blocks have no rotary embedding, which has no parameters."""
    shape = read_shape(config, kv_heads=4)
    bias = config.flag("attention_bias", False)
    block = plain_block(
        shape, attention_of(shape, bias=bias, output_bias=bias), mlp_bias=config.flag("mlp_bias", False)
    )
    return decoder(shape, block, tied=config.flag("tie_word_embeddings", True))


def mistral(config: ConfigReader) -> KnownModel:
    """Mistral 7B and its kin."""
    shape = read_shape(config, kv_heads=8)
    return decoder(shape, plain_block(shape, attention_of(shape)), tied=config.flag("tie_word_embeddings", False))


def qwen2(config: ConfigReader) -> KnownModel:
    """Qwen2 and Qwen2.5: biases on queries, keys and values."""
    shape = read_shape(config)
    block = plain_block(shape, attention_of(shape, bias=True))
    return decoder(shape, block, tied=config.flag("tie_word_embeddings", False))


def qwen3(config: ConfigReader) -> KnownModel:
    """Qwen3: queries and keys normalised head by head."""
    shape = replace(read_shape(config, head_dim=128), head_norms=True)
    bias = config.flag("attention_bias", False)
    block = plain_block(shape, attention_of(shape, bias=bias, output_bias=bias))
    return decoder(shape, block, tied=config.flag("tie_word_embeddings", False))


def gemma(config: ConfigReader) -> KnownModel:
    """Gemma 1."""
    shape = read_shape(config, kv_heads=16, head_dim=256)
    bias = config.flag("attention_bias", False)
    block = plain_block(shape, attention_of(shape, bias=bias, output_bias=bias))
    return decoder(shape, block, tied=config.flag("tie_word_embeddings", True))


def gemma2(config: ConfigReader) -> KnownModel:
    """Gemma 2: four norms in a block; its soft-capped scores are computed eagerly by transformers."""
    shape = replace(read_shape(config, kv_heads=4, head_dim=256), norms=4, caps_scores=True)
    bias = config.flag("attention_bias", False)
    block = plain_block(shape, attention_of(shape, bias=bias, output_bias=bias), norms=GEMMA_NORMS)
    return decoder(shape, block, tied=config.flag("tie_word_embeddings", True))


def gemma3_text(config: ConfigReader, *, name: str = "model", tied: bool | None = None) -> KnownModel:
    """Gemma 3 without images. `tied`: what the configuration around it says."""
    shape = replace(read_shape(config, kv_heads=4, head_dim=256), norms=4, head_norms=True)
    bias = config.flag("attention_bias", False)
    block = plain_block(shape, attention_of(shape, bias=bias, output_bias=bias), norms=GEMMA_NORMS)
    return decoder(shape, block, tied=config.flag("tie_word_embeddings", True) if tied is None else tied, name=name)


def phi3(config: ConfigReader) -> KnownModel:
    """Phi-3 and Phi-4: fused projections."""
    shape = read_shape(config)
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def block(path: str, index: int) -> Parameters:
        return [
            *linear(f"{path}.self_attn.o_proj", query, shape.hidden),
            *linear(f"{path}.self_attn.qkv_proj", shape.hidden, query + 2 * key),
            *linear(f"{path}.mlp.gate_up_proj", shape.hidden, 2 * shape.mlp),
            *linear(f"{path}.mlp.down_proj", shape.mlp, shape.hidden),
            *(p for name in LLAMA_NORMS for p in norm(f"{path}.{name}", shape.hidden)),
        ]

    return decoder(shape, block, tied=config.flag("tie_word_embeddings", False))


def phi(config: ConfigReader) -> KnownModel:
    """Phi-1 and Phi-2: one layer norm for attention and MLP side by side, biases everywhere, in the head too."""
    shape = replace(read_shape(config), gated=False, stepwise_gelu=config.is_stepwise_gelu("hidden_act"), norms=1)
    if config.flag("qk_layernorm", False):
        shape = replace(shape, head_norms=True)
    attention = replace(
        attention_of(shape, bias=True, output_bias=True),
        output="dense",
        head_norms=("q_layernorm", "k_layernorm") if shape.head_norms else (),
        norm_bias=True,
    )
    tied = config.flag("tie_word_embeddings", False)
    parameters = embedding("model.embed_tokens", shape.vocabulary, shape.hidden)
    for index in range(shape.blocks):
        path = f"model.layers.{index}"
        parameters += attention.parameters(f"{path}.self_attn")
        parameters += linear(f"{path}.mlp.fc1", shape.hidden, shape.mlp, bias=True)
        parameters += linear(f"{path}.mlp.fc2", shape.mlp, shape.hidden, bias=True)
        parameters += norm(f"{path}.input_layernorm", shape.hidden, bias=True)
    parameters += norm("model.final_layernorm", shape.hidden, bias=True)
    parameters += head("lm_head", shape.hidden, shape.vocabulary, tied=tied, bias=True)
    return causal_model(parameters, shape, tied=tied, final_norm="final_layernorm")
