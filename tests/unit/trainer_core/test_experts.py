"""Fused experts, which transformers keeps as one tensor for all experts of a block: trained themselves, and with an
adapter for each expert through PEFT's `target_parameters`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_trainer.contract.vocabulary import LoraVariant
from finetune_trainer.methods.lora import adapters, quiet_peft, trained_names
from finetune_trainer.results.artefact import export
from finetune_trainer.results.delta import load_delta
from finetune_trainer.results.verify import verify_loads
from tests.tiny_tokenizer import tiny_tokenizer
from tests.trainer_jobs import fit
from tests.unit.trainer_core.conftest import ModelFolder
from tests.unit.trainer_core.test_exactness import quick
from tests.unit.trainer_core.test_export import BASE

IDS = torch.arange(3, 15)[None]
LORA: dict[str, Any] = {"rank": 2, "alpha": 4, "dropout": 0.0, "variant": "standard", "bias": "none"}


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize(
    ("method", "variant", "checkpointing"),
    [("lora", "standard", False), ("lora", "rslora", True), ("lora", "lora+", False), ("qlora", "standard", False)],
)
def test_adapters_of_experts_are_trained_exactly_and_load_and_merge(
    architecture: str, method: str, variant: str, checkpointing: bool, model_folder: ModelFolder, tmp_path: Path
) -> None:
    base = model_folder(architecture, tie_word_embeddings=False)
    lora = {**LORA, "variant": variant, "rank_pattern": {"1.mlp.experts.down_proj": 3}}
    layers = {"ids": [1, 3], "modules": ["mlp", "q_proj"]}
    training = {"gradient_checkpointing": checkpointing, "learning_rate": 1e-2, "max_steps": 4}
    config = quick(method, layers, lora=lora, training=training)
    fitted = fit(base, config, tmp_path / "run")
    assert fitted.changed() == set(trained_names(fitted.selection, LoraVariant(variant)))
    assert len(fitted.changed()) == 2 * (2 + 1) * 2
    assert fitted.tuned.trainable == sum(fitted.before[name].numel() for name in fitted.changed())
    found = adapters(fitted.tuned.model)
    assert found["model.layers.1.mlp.experts.down_proj"].r["default"] == 3
    assert found["model.layers.3.mlp.experts.down_proj"].r["default"] == 2
    if method == "qlora":
        return

    target = export(fitted.tuned, fitted.layout, config, tiny_tokenizer(), BASE, tmp_path / "out")
    verify_loads(target, "adapter", fitted.layout, AutoConfig.from_pretrained(base))
    described = json.loads((target / "adapter_config.json").read_text())
    assert described["target_parameters"] == sorted(fitted.selection.adapted_experts)
    fitted.tuned.model.eval()
    logits = fitted.tuned.model(input_ids=IDS).logits
    with quiet_peft():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), target)
    torch.testing.assert_close(loaded(input_ids=IDS).logits, logits)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(base)(input_ids=IDS).logits, logits, atol=1e-4)


def test_the_loss_falls_and_a_run_goes_on_from_its_checkpoint(model_folder: ModelFolder, tmp_path: Path) -> None:
    base = model_folder("mixtral", tie_word_embeddings=False)
    training = {"max_steps": 8, "learning_rate": 2e-2, "batch_size": 8, "micro_batch_size": 8}
    config = quick(
        "lora", {"modules": ["experts"]}, lora=LORA, training=training, checkpoints={"every": 4, "unit": "step"}
    )
    whole = fit(base, config, tmp_path / "whole")
    assert whole.losses[-1] < 0.97 * whole.losses[0]
    again = fit(base, config, tmp_path / "again", resume=tmp_path / "whole" / "checkpoint-4")
    assert again.losses[-4:] == whole.losses[-4:]


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize(
    ("method", "modules", "expected"),
    [
        ("freeze", ["experts"], ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
        ("freeze", ["experts.down_proj"], ("mlp.experts.down_proj",)),
        ("full", ["mlp"], ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")),
    ],
)
def test_experts_are_trained_themselves_by_exact_path(
    architecture: str,
    method: str,
    modules: list[str],
    expected: tuple[str, ...],
    model_folder: ModelFolder,
    tmp_path: Path,
) -> None:
    base = model_folder(architecture, tie_word_embeddings=False)
    config = quick(method, {"ids": [2], "modules": modules}, training={"learning_rate": 1e-3})
    fitted = fit(base, config, tmp_path / "run")
    assert fitted.changed() == {f"model.layers.2.{name}" for name in expected}
    if method != "freeze":
        return
    target = export(fitted.tuned, fitted.layout, config, tiny_tokenizer(), BASE, tmp_path / "out")
    assert set(load_file(target / "delta.safetensors")) == fitted.changed()
    again = AutoModelForCausalLM.from_pretrained(base)
    load_delta(again, target)
    fitted.tuned.model.eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, fitted.tuned.model(input_ids=IDS).logits)
