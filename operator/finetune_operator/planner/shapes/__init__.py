"""From a model's `config.json` to its layout, exactly as transformers builds it: same paths, shapes and order.

One builder for each family, held against transformers by the tests. Pure: nothing of the model is read but the dict.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from finetune_operator.errors import UnknownArchitecture
from finetune_operator.planner.shapes import decoders, gpt, mixtures, multimodal
from finetune_operator.planner.shapes.model import KnownModel
from finetune_operator.planner.shapes.reader import ConfigReader

__all__ = ["FAMILIES", "KnownModel", "read_model"]

FAMILIES: dict[str, Callable[[ConfigReader], KnownModel]] = {
    "falcon": gpt.falcon,
    "gemma": decoders.gemma,
    "gemma2": decoders.gemma2,
    "gemma3": multimodal.gemma3,
    "gemma3_text": decoders.gemma3_text,
    "gpt2": gpt.gpt2,
    "gpt_neox": gpt.gpt_neox,
    "llama": decoders.llama,
    "mistral": decoders.mistral,
    "mixtral": mixtures.mixtral,
    "phi": decoders.phi,
    "phi3": decoders.phi3,
    "qwen2": decoders.qwen2,
    "qwen2_moe": mixtures.qwen2_moe,
    "qwen3": decoders.qwen3,
    "qwen3_moe": mixtures.qwen3_moe,
    "smollm3": decoders.smollm3,
}
"""`model_type` to the function that knows its shape."""


def read_model(config: Mapping[str, Any], *, remote_code: bool = False) -> KnownModel:
    """What a model consists of.

    config: its `config.json`. remote_code: whether code that comes with the model builds it.

    Raises UnknownArchitecture for a model that we have no shape for, and PlanningError that names the key where the
    configuration is incomplete or contradicts itself.
    """
    reader = ConfigReader(config)
    kind = reader.text("model_type")
    if remote_code and "AutoModelForCausalLM" in reader.part("auto_map", {}):
        raise UnknownArchitecture(
            f"config.json: the code of {kind} comes with the model, so its shape is not known here"
        )
    if config.get("quantization_config") is not None:
        raise UnknownArchitecture(
            "config.json: quantization_config: the weights are quantized already, in a form whose shape is not known "
            "here; use the unquantized model, with method qlora where memory is short"
        )
    if kind not in FAMILIES:
        near = difflib.get_close_matches(kind, FAMILIES, n=1, cutoff=0.7)
        hint = f" (near: {near[0]})" if near else ""
        raise UnknownArchitecture(
            f"config.json: model_type {kind!r}{hint} is not known here. Known: {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind](reader)
