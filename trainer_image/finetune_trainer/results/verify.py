"""Opening what was written the way a user will."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from finetune_trainer.contract import ModelLayout
from finetune_trainer.errors import InternalError
from finetune_trainer.methods.lora import quiet_peft
from finetune_trainer.model import empty_model
from finetune_trainer.results.artefact import Artifact


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
