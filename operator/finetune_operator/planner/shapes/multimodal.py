"""Language models with an image encoder beside them, of which only the text is tuned. Pure: no I/O."""

from __future__ import annotations

from dataclasses import replace

from finetune_operator.planner.shapes.decoders import Parameters, gemma3_text
from finetune_operator.planner.shapes.model import KnownModel, embedding, linear, norm
from finetune_operator.planner.shapes.reader import ConfigReader
from finetune_trainer.contract import MAX_BLOCKS, ParameterInfo, ParameterKind

_TOWER = "model.vision_tower"


def _other(path: str, *shape: int) -> ParameterInfo:
    return ParameterInfo(path, shape, ParameterKind.OTHER)


def _mlp(path: str, width: int, inner: int) -> Parameters:
    return [*linear(f"{path}.fc1", width, inner, bias=True), *linear(f"{path}.fc2", inner, width, bias=True)]


def _siglip(config: ConfigReader) -> Parameters:
    """SigLIP's image encoder."""
    width, inner = config.number("hidden_size", 768), config.number("intermediate_size", 3072)
    patch, channels = config.number("patch_size", 16), config.number("num_channels", 3)
    positions = (config.number("image_size", 224) // patch) ** 2
    patches = f"{_TOWER}.embeddings.patch_embedding"
    parameters = [
        _other(f"{patches}.weight", width, channels, patch, patch),
        ParameterInfo(f"{patches}.bias", (width,), ParameterKind.BIAS),
        *embedding(f"{_TOWER}.embeddings.position_embedding", positions, width),
    ]
    for index in range(config.number("num_hidden_layers", 12, largest=MAX_BLOCKS)):
        path = f"{_TOWER}.encoder.layers.{index}"
        parameters += norm(f"{path}.layer_norm1", width, bias=True)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            parameters += linear(f"{path}.self_attn.{name}", width, width, bias=True)
        parameters += norm(f"{path}.layer_norm2", width, bias=True)
        parameters += _mlp(f"{path}.mlp", width, inner)
    parameters += norm(f"{_TOWER}.post_layernorm", width, bias=True)
    if config.flag("vision_use_head", True):
        parameters += _pooling_head(f"{_TOWER}.head", width, inner)
    return parameters


def _pooling_head(path: str, width: int, inner: int) -> Parameters:
    return [
        ParameterInfo(f"{path}.probe", (1, 1, width), ParameterKind.EXPERTS),
        _other(f"{path}.attention.in_proj_weight", 3 * width, width),
        _other(f"{path}.attention.in_proj_bias", 3 * width),
        *linear(f"{path}.attention.out_proj", width, width, bias=True),
        *norm(f"{path}.layernorm", width, bias=True),
        *_mlp(f"{path}.mlp", width, inner),
    ]


def gemma3(config: ConfigReader) -> KnownModel:
    """Gemma 3 with images: the text model, preceded by the image encoder and the projection into its width."""
    vision = config.below("vision_config")
    known = gemma3_text(
        config.below("text_config"),
        name="model.language_model",
        tied=config.flag("tie_word_embeddings", True),
    )
    width = vision.number("hidden_size", 768)
    beside = [
        *_siglip(vision),
        _other("model.multi_modal_projector.mm_input_projection_weight", width, known.shape.hidden),
        _other("model.multi_modal_projector.mm_soft_emb_norm.weight", width),
    ]
    layout = replace(known.layout, parameters=(*beside, *known.layout.parameters))
    return KnownModel(layout, replace(known.shape, architecture="gemma3"))
