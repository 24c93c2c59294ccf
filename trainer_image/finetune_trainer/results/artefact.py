"""The artefact: what was trained and nothing else, with what a reader needs to use it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_trainer.contract import ModelLayout, TrainerConfig
from finetune_trainer.contract.vocabulary import Method
from finetune_trainer.heads.loading import describe_head
from finetune_trainer.methods import TunedModel
from finetune_trainer.methods.lora import RESIDUAL_VARIANTS, as_plain_adapter, as_plain_settings
from finetune_trainer.model import end_tokens
from finetune_trainer.results.delta import DELTA_DESCRIPTION, DELTA_FILE
from finetune_trainer.tensor_files import save_tensors

Artifact = Literal["adapter", "delta", "model"]

ADAPTER_FILE = "adapter_model.safetensors"


def artifact_of(method: Method) -> Artifact:
    """What a method leaves behind."""
    if method is Method.FULL:
        return "model"
    return "delta" if method.trains_base_weights else "adapter"


@dataclass(frozen=True)
class BaseReference:
    """Which base model an adapter or a delta belongs to."""

    uri: str
    revision: str | None

    @property
    def name(self) -> str:
        """The repository for a model of the hub, else its address."""
        return self.uri.removeprefix("hf://")


def export(
    tuned: TunedModel,
    layout: ModelLayout,
    config: TrainerConfig,
    tokenizer: PreTrainedTokenizerBase,
    base: BaseReference,
    folder: Path,
) -> Path:
    """Write the artefact with the tokenizer and its chat template into a new folder below `folder`; returns it."""
    kind = artifact_of(config.method)
    target = folder / kind
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    if kind == "model":
        assert isinstance(tuned.model, PreTrainedModel)
        save_whole(tuned.model, tokenizer, target)
    elif kind == "delta":
        _save_delta(tuned.model, config, base, target)
    else:
        assert isinstance(tuned.model, PeftModel)
        _save_adapter(tuned, config, base, target)
    tokenizer.save_pretrained(target)
    return target


def save_whole(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """The whole model in the type that its weights came in. Trained ones were held in fp32 until now; this ends it.

    Its generation ends at the end of an answer as the tokenizer has it, too: a template may have brought a new one.
    """
    nn.Module.to(model, model.config.dtype or torch.float32)
    if model.generation_config is not None:
        ends = end_tokens(model, tokenizer)
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.save_pretrained(target)


def _save_delta(model: nn.Module, config: TrainerConfig, base: BaseReference, target: Path) -> None:
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_tensors(tensors, target / DELTA_FILE)
    description: dict[str, Any] = {
        "format": "finetune-delta/1",
        "baseModel": base.uri,
        "baseModelRevision": base.revision,
        "method": config.method.value,
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    if config.head is not None:
        assert isinstance(model, PreTrainedModel)
        description["head"] = describe_head(config.head, model)
    (target / DELTA_DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _save_adapter(tuned: TunedModel, config: TrainerConfig, base: BaseReference, target: Path) -> None:
    model = tuned.model
    assert isinstance(model, PeftModel)
    settings = model.peft_config["default"]
    settings.base_model_name_or_path = base.name
    settings.revision = base.revision
    # "auto" would ask the hub for the base model's vocabulary size, which we never change.
    model.save_pretrained(str(target), save_embedding_layers=False)
    described = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
    if config.lora is not None and config.lora.variant in RESIDUAL_VARIANTS:
        tensors = as_plain_adapter(load_file(target / ADAPTER_FILE), tuned.initial_adapter)
        save_tensors(tensors, target / ADAPTER_FILE)
        described |= as_plain_settings(described)
    # PEFT writes sets: the same adapter should have the same bytes.
    for key in ("target_modules", "target_parameters"):
        if isinstance(described.get(key), list):
            described[key].sort()
    (target / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    (target / "README.md").unlink(missing_ok=True)
