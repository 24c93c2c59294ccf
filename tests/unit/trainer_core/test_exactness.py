"""After real optimizer steps, exactly the selected tensors have changed; all others are bit for bit what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract.vocabulary import LoraVariant
from finetune_trainer.methods.lora import trained_names
from tests.trainer_jobs import Fitted, fit, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder

SELECTORS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "last": ({"last": 2}, (2, 3)),
    "first": ({"first": 1}, (0,)),
    "ids": ({"ids": [3, 1, 1]}, (1, 3)),
    "ranges": ({"ranges": ["0-1", "3-3"]}, (0, 1, 3)),
    "every": ({"every": 2}, (1, 3)),
    "all": ({"all": True}, (0, 1, 2, 3)),
}
"""Selector, and the blocks it means in a model of four."""

PARTS: dict[str, dict[str, Any]] = {
    "": {},
    "modules": {"modules": ["mlp"]},
    "leaf": {"modules": ["self_attn.v_proj", "up_proj"]},
    "also": {"also": ["embeddings", "norm"]},
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased": ("llama-biased", {"tie_word_embeddings": False}),
    "biased-tied": ("llama-biased", {"tie_word_embeddings": True}),
}

LINEAR = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
}


def quick(method: str, layers: dict[str, Any] | None, **changes: Any) -> Any:
    """Two steps of two rows."""
    training = {"max_steps": 2, "batch_size": 2, "micro_batch_size": 2, "gradient_accumulation": 1}
    training |= changes.pop("training", {})
    return trainer_config(Path("m"), Path("d"), method=method, layers=layers, training=training, **changes)


def cases() -> list[Any]:
    """Every method with every selector; parts and kinds of models change from one to the next, so that each of them
    meets each method."""
    found = []
    methods = ("full", "freeze", "lora", "qlora", "bitfit")
    for m, method in enumerate(methods):
        models = [name for name in MODELS if "biased" in name] if method == "bitfit" else list(MODELS)
        for s, selector in enumerate(SELECTORS):
            for turn in range(2):
                part = list(PARTS)[(m + s + 2 * turn) % len(PARTS)]
                model = models[(s + turn) % len(models)]
                found.append(pytest.param(method, selector, part, model, id=f"{method}-{selector}-{part}-{model}"))
    return found


def expected_paths(fitted: Fitted, blocks: tuple[int, ...], part: str, method: str) -> set[str]:
    """The selection, spelled out here without the code that resolves it."""
    words = {"modules": ("mlp",), "leaf": ("self_attn.v_proj", "mlp.up_proj")}.get(part)
    inside = set()
    for path in fitted.layout.by_path:
        segments = path.split(".")
        if segments[:2] != ["model", "layers"] or int(segments[2]) not in blocks:
            continue
        inner = ".".join(segments[3:])
        if words is None or any(inner.startswith(f"{word}.") for word in words):
            inside.add(path)
    if method == "bitfit":
        inside = {path for path in inside if path.endswith(".bias")}
    return inside


@pytest.mark.parametrize(("method", "selector", "part", "model"), cases())
def test_changed_tensors_are_the_selected_ones(
    method: str, selector: str, part: str, model: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    choice, blocks = SELECTORS[selector]
    architecture, overrides = MODELS[model]
    layers = {**choice, **PARTS[part]}
    fitted = fit(model_folder(architecture, **overrides), quick(method, layers), tmp_path)
    beside = {"model.embed_tokens.weight", "model.norm.weight"} if part == "also" else set()

    if method in ("lora", "qlora"):
        modules = {p.removesuffix(".weight") for p in expected_paths(fitted, blocks, part, method)}
        modules = {m for m in modules if m.split(".", 3)[-1] in LINEAR}
        expected = {f"base_model.model.{m}.lora_{side}.default.weight" for m in modules for side in "AB"}
        expected |= {f"base_model.model.{p[:-7]}.modules_to_save.default.weight" for p in beside}
    elif method == "full" and selector == "all" and part in ("", "also"):
        expected = set(fitted.layout.by_path)
    else:
        expected = expected_paths(fitted, blocks, part, method) | beside
    assert fitted.changed() == expected


@pytest.mark.parametrize("variant", list(LoraVariant))
@pytest.mark.parametrize("model", ["biased-tied", "untied"])
def test_lora_variants_train_their_adapters_and_nothing_else(
    variant: LoraVariant, model: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    architecture, overrides = MODELS[model]
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1, "variant": variant.value, "bias": "none"}
    layers = {"ids": [0, 3], "modules": ["mlp"], "also": ["norm"]}
    method = "qlora" if variant is LoraVariant.LOFTQ else "lora"
    fitted = fit(model_folder(architecture, **overrides), quick(method, layers, lora=lora), tmp_path)
    assert fitted.changed() == set(trained_names(fitted.selection, variant, fitted.tuned.adapters))
    assert len(fitted.selection.adapted) == 6
    assert fitted.tuned.trainable == sum(fitted.before[name].numel() for name in fitted.changed())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_lora_trains_the_biases_that_it_is_asked_for(bias: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0, "variant": "standard", "bias": bias}
    config = quick("lora", {"ids": [2], "modules": ["up_proj"]}, lora=lora)
    changed = fit(model_folder("llama-biased"), config, tmp_path).changed()
    biases = {name for name in changed if name.endswith(".bias")}
    assert "base_model.model.model.layers.2.mlp.up_proj.base_layer.bias" in biases
    assert len(biases) == (4 * 7 if bias == "all" else 1)
    assert len(changed - biases) == 2


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_qlora_leaves_the_quantized_weights_alone(kind: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    quantization = {"type": kind, "double_quant": kind == "nf4", "compute_dtype": "float32"}
    fitted = fit(
        model_folder("llama", tie_word_embeddings=True),
        quick("qlora", {"last": 2, "also": ["lm_head"]}, quantization=quantization),
        tmp_path,
    )
    assert fitted.changed() == set(trained_names(fitted.selection, LoraVariant.STANDARD))
    kept = fitted.before["base_model.model.model.layers.0.mlp.up_proj.weight"]
    assert kept.dtype.itemsize == 1


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("gpt2", {"ids": [1], "modules": ["mlp"]}),
        ("falcon", {"last": 1}),
        ("mixtral", {"ids": [0, 2], "modules": ["self_attn"]}),
        ("qwen3-moe", {"every": 2, "also": ["lm_head"]}),
        ("phi3", {"first": 2, "also": ["norm"]}),
        ("gemma3", {"last": 1, "modules": ["q_proj"]}),
    ],
)
@pytest.mark.parametrize("method", ["freeze", "lora"])
def test_other_architectures(
    architecture: str, layers: dict[str, Any], method: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    config = quick(method, layers)
    fitted = fit(model_folder(architecture, tie_word_embeddings=False), config, tmp_path)
    names = trained_names(fitted.selection, LoraVariant.STANDARD) if method == "lora" else fitted.selection.parameters
    assert fitted.changed() == set(names)
    assert names


@pytest.mark.parametrize("precision", ["bf16"])
@pytest.mark.parametrize("method", ["freeze", "lora", "qlora"])
def test_sixteen_bits_keep_masters_in_fp32(
    precision: str, method: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    config = quick(method, {"last": 1, "also": ["norm"]}, training={"precision": precision})
    fitted = fit(model_folder("llama", tie_word_embeddings=True), config, tmp_path)
    changed = fitted.changed()
    assert changed
    assert {str(fitted.before[name].dtype) for name in changed} == {"torch.float32"}
    frozen = {str(t.dtype) for name, t in fitted.before.items() if name.endswith("embed_tokens.weight")}
    assert frozen == {"torch.bfloat16"}
