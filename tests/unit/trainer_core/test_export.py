"""Artefacts on the local disk: deltas, adapters, cards, gates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_trainer.errors import InputMissing, InternalError, UsageError
from finetune_trainer.model import empty_model, read_config, read_tokenizer
from finetune_trainer.results.artefact import BaseReference, artifact_of, export
from finetune_trainer.results.delta import load_delta
from finetune_trainer.results.verify import verify_loads
from finetune_trainer.results.versions import library_versions
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer
from tests.trainer_jobs import Fitted, fit
from tests.unit.trainer_core.conftest import ModelFolder
from tests.unit.trainer_core.test_exactness import quick

BASE = BaseReference("hf://org/base", "abc123")


def fitted_and_exported(
    method: str, layers: dict[str, Any] | None, folder: Path, base: Path, **changes: Any
) -> tuple[Fitted, Path]:
    config = quick(method, layers, **changes)
    fitted = fit(base, config, folder / "run")
    target = export(fitted.tuned, fitted.layout, config, tiny_tokenizer(), BASE, folder / "out")
    verify_loads(target, artifact_of(config.method), fitted.layout, AutoConfig.from_pretrained(base))
    return fitted, target


@pytest.mark.parametrize("tied", [True, False])
def test_a_delta_is_exactly_what_changed(tied: bool, model_folder: ModelFolder, tmp_path: Path) -> None:
    base = model_folder("llama-biased", tie_word_embeddings=tied)
    fitted, target = fitted_and_exported("freeze", {"ids": [1, 3], "also": ["lm_head"]}, tmp_path, base)
    assert set(load_file(target / "delta.safetensors")) == fitted.changed()
    described = json.loads((target / "delta.json").read_text())
    assert (described["baseModel"], described["baseModelRevision"]) == ("hf://org/base", "abc123")

    model = AutoModelForCausalLM.from_pretrained(base)
    assert set(load_delta(model, target)) == fitted.changed()
    after = dict(fitted.tuned.model.named_parameters())
    assert all(torch.equal(parameter, after[name]) for name, parameter in model.named_parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_a_delta_of_another_model_is_refused(model_folder: ModelFolder, tmp_path: Path) -> None:
    _, target = fitted_and_exported("freeze", {"last": 1}, tmp_path, model_folder())
    other = tiny_model("gpt2")
    before = {name: parameter.clone() for name, parameter in other.named_parameters()}
    with pytest.raises(UsageError, match="does not fit this model; load its base model"):
        load_delta(other, target)
    assert all(torch.equal(parameter, before[name]) for name, parameter in other.named_parameters())


def test_a_whole_model_keeps_the_type_of_its_base(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    training = {"precision": "bf16", "learning_rate": 1e-4}
    fitted, target = fitted_and_exported("full", None, tmp_path, tmp_path / "base", training=training)
    assert {tensor.dtype for tensor in fitted.before.values()} == {torch.float32}
    again = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_an_adapter_names_its_base_and_is_the_same_bytes_each_time(model_folder: ModelFolder, tmp_path: Path) -> None:
    contents = []
    for number in range(2):
        _, target = fitted_and_exported("lora", {"last": 2}, tmp_path / str(number), model_folder())
        contents.append({path.name: path.read_bytes() for path in target.iterdir()})
    assert contents[0] == contents[1]
    config = json.loads(contents[0]["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc123")
    assert config["target_modules"] == sorted(config["target_modules"])
    assert set(contents[0]) >= {"adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert "README.md" not in contents[0]


def test_an_adapter_that_lost_a_tensor_does_not_pass(model_folder: ModelFolder, tmp_path: Path) -> None:
    fitted, target = fitted_and_exported("lora", {"last": 1}, tmp_path, model_folder())
    tensors = load_file(target / "adapter_model.safetensors")
    config = AutoConfig.from_pretrained(model_folder())
    for broken in (dict(list(tensors.items())[1:]), {**tensors, "surplus.weight": torch.zeros(1)}, {}):
        save_file(broken, target / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InternalError):
            verify_loads(target, "adapter", fitted.layout, config)


def test_versions_of_what_took_part() -> None:
    assert {"python", "torch", "transformers", "peft"} <= set(library_versions())


# ---- reading a base model ----


def test_folders_that_hold_no_model(tmp_path: Path, model_folder: ModelFolder) -> None:
    with pytest.raises(InputMissing, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text((model_folder() / "config.json").read_text())
    with pytest.raises(InputMissing, match="has no weights"):
        read_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputMissing, match=r"only pickled weights \(pytorch_model.bin\)"):
        read_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert read_config(tmp_path).model_type == "llama"
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(UsageError, match=r"transformers cannot read config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UsageError, match="encoder-decoder"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UsageError, match="no language model can be built"):
        empty_model(read_config(tmp_path))


def test_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="no usable tokenizer"):
        read_tokenizer(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id
