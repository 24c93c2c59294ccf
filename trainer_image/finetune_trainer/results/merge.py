"""The stand-alone model: adapter or delta merged into its base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.vocabulary import Merge, Method
from finetune_trainer.errors import UsageError
from finetune_trainer.methods import TunedModel
from finetune_trainer.methods.lora import quiet_peft
from finetune_trainer.results.artefact import save_whole
from finetune_trainer.results.delta import load_delta


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
