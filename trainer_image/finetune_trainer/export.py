"""The artefact: what was trained and nothing else, with what a reader needs to use it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_trainer.contract import ModelLayout, TrainerConfig
from finetune_trainer.contract.vocabulary import LoraVariant, Merge, Method
from finetune_trainer.errors import InternalError, UsageError
from finetune_trainer.methods import TunedModel
from finetune_trainer.methods.lora import RESIDUAL_VARIANTS, as_plain_adapter, quiet_peft
from finetune_trainer.model import empty_model

Artifact = Literal["adapter", "delta", "model"]

DELTA_FILE = "delta.safetensors"
DELTA_DESCRIPTION = "delta.json"
ADAPTER_FILE = "adapter_model.safetensors"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers")


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
        save_whole(tuned.model, target)
    elif kind == "delta":
        _save_delta(tuned.model, config, base, target)
    else:
        assert isinstance(tuned.model, PeftModel)
        _save_adapter(tuned, config, base, target)
    tokenizer.save_pretrained(target)
    return target


def save_whole(model: PreTrainedModel, target: Path) -> None:
    """The whole model in the type that its weights came in. Trained ones were held in fp32 until now; this ends it."""
    nn.Module.to(model, model.config.dtype or torch.float32)
    model.save_pretrained(target)


def _save_delta(model: nn.Module, config: TrainerConfig, base: BaseReference, target: Path) -> None:
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, target / DELTA_FILE, metadata={"format": "pt"})
    description = {
        "format": "finetune-delta/1",
        "baseModel": base.uri,
        "baseModelRevision": base.revision,
        "method": config.method.value,
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    (target / DELTA_DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_delta(model: nn.Module, folder: Path) -> tuple[str, ...]:
    """Put the trained tensors of a freeze or bitfit run into their base model; returns their names.

    Each tensor of `delta.safetensors` replaces the parameter of its name; a tied parameter stays tied. Raises
    UsageError where the model has no such parameter or one of another shape: it is not the base of this delta.
    """
    parameters = dict(model.named_parameters())
    tensors = load_file(folder / DELTA_FILE)
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise UsageError(f"{folder}: {name} {tuple(tensor.shape)} does not fit this model; load its base model")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return tuple(tensors)


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
        save_file(tensors, target / ADAPTER_FILE, metadata={"format": "pt"})
        described |= {"init_lora_weights": True, "r": 2 * config.lora.rank, "lora_alpha": 2 * config.lora.alpha}
    # PEFT writes a set: the same adapter should have the same bytes.
    if isinstance(described.get("target_modules"), list):
        described["target_modules"].sort()
    (target / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    (target / "README.md").unlink(missing_ok=True)


def verify_loads(target: Path, kind: Artifact, layout: ModelLayout, model_config: Any) -> None:
    """Open what was written the way a user will.

    The same bytes are in the object store, whose SHA-256 are compared. Raises InternalError where it does not load.
    """
    files = sorted(target.glob("*.safetensors"))
    if not files:
        raise InternalError(f"nothing was written to {target.name}/")
    names = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    if not names:
        raise InternalError(f"{target.name}/ holds no tensor")
    if kind == "delta" and not names <= set(layout.by_path):
        raise InternalError("the delta holds tensors that the base model does not have")
    if kind == "adapter":
        _verify_adapter(target, names, model_config)


def _verify_adapter(target: Path, names: set[str], model_config: Any) -> None:
    """Load an adapter with PEFT around an empty base model: every tensor has to find its place there."""
    with quiet_peft(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        # Nothing can be copied into an empty model; what matters is that shapes fit, which is checked before.
        warnings.filterwarnings("ignore", message="for .*copying from a non-meta parameter")
        try:
            loaded = PeftModel.from_pretrained(empty_model(model_config), str(target))
        except (ValueError, KeyError, RuntimeError, UserWarning) as error:
            raise InternalError(f"PEFT does not load the adapter that was written: {error}") from error
        known = set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
    if known != names:
        different = ", ".join(sorted(known ^ names)[:5])
        raise InternalError(f"PEFT does not read back what was written; the difference: {different}")


def merge(
    tuned: TunedModel, config: TrainerConfig, tokenizer: PreTrainedTokenizerBase, base_folder: Path, folder: Path
) -> Path | None:
    """The stand-alone model, where the job asks for one and the artefact is not one already.

    `base16` merges the adapter into the base as it was published, `dequantized` into what the quantized base expands
    to, which is what the adapter was trained on.
    """
    if config.output.merge is Merge.NONE or config.method is Method.FULL:
        return None
    target = folder / "merged"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    save_whole(_merged(config, base_folder, folder, tuned), target)
    tokenizer.save_pretrained(target)
    return target


def check_merge(config: TrainerConfig) -> None:
    """Refuse what cannot be merged.

    Raises UsageError that names the field and the remedy.
    """
    merging = config.output.merge
    if merging is Merge.NONE:
        return
    if config.method in (Method.PREFIX, Method.PROMPT, Method.ADAPTER):
        raise UsageError(f"spec.output.merge: method {config.method} does not change weights; set it to none")
    if merging is Merge.DEQUANTIZED and config.method is not Method.QLORA:
        raise UsageError("spec.output.merge: dequantized is for method qlora; use base16")


def _merged(config: TrainerConfig, base_folder: Path, folder: Path, tuned: TunedModel) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": "auto"}
    if config.output.merge is Merge.DEQUANTIZED:
        assert isinstance(tuned.model, PeftModel)
        loaded: Any = tuned.model.get_base_model()
        options["quantization_config"] = loaded.config.quantization_config
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, use_safetensors=True, trust_remote_code=config.model.trust_remote_code, **options
    )
    if config.method.trains_base_weights:
        load_delta(base, folder / "delta")
        assert isinstance(base, PreTrainedModel)
        return base
    if config.output.merge is Merge.DEQUANTIZED:
        base = base.dequantize()
    with quiet_peft():
        merged = PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    return merged


def library_versions() -> dict[str, str]:
    """Version of every library that has a part in a result."""
    found = {"python": python_version()}
    for name in (*LIBRARIES, "finetune-operator"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_card(
    folder: Path,
    config: TrainerConfig,
    base: BaseReference,
    metrics: Mapping[str, Mapping[str, float]],
    notes: tuple[str, ...],
) -> None:
    """`README.md`: what this is, how to load it, and what was measured."""
    kind = artifact_of(config.method)
    loading = {
        "adapter": (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base.name}")\n'
            'model = PeftModel.from_pretrained(base, "adapter")'
        ),
        "delta": (
            "from pathlib import Path\n\nfrom finetune_trainer.export import load_delta\n"
            "from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{base.name}")\nload_delta(model, Path("delta"))'
        ),
        "model": (
            'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("model")'
        ),
    }[kind]
    lines = [
        f"# {config.job.name}",
        "",
        f"`{base.uri}`{f' at {base.revision}' if base.revision else ''}, tuned with method {config.method}.",
        "",
        "```python",
        loading,
        "```",
        "",
    ]
    if metrics:
        names = sorted({name for values in metrics.values() for name in values})
        lines += [f"| held-out | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for who, values in metrics.items():
            lines.append(f"| {who} | {' | '.join(f'{values[n]:.4g}' if n in values else '' for n in names)} |")
        lines.append("")
    lines += [f"- {note}" for note in notes]
    if config.lora is not None and config.method.uses_lora and config.lora.variant is not LoraVariant.STANDARD:
        lines.append(f"- Trained as {config.lora.variant}.")
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
