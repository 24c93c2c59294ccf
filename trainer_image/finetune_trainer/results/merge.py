"""The stand-alone model that a job asks for beside its artefact."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, Literal, cast

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import MergeReport, TrainerConfig
from finetune_trainer.contract.vocabulary import Merge, Method
from finetune_trainer.errors import UsageError
from finetune_trainer.merging.merge import MergeSource, merge_model
from finetune_trainer.methods import TunedModel
from finetune_trainer.model import DTYPES
from finetune_trainer.results.artefact import artifact_of, save_whole
from finetune_trainer.results.pointers import MERGED

logger = logging.getLogger(__name__)


def merge(
    tuned: TunedModel, config: TrainerConfig, tokenizer: PreTrainedTokenizerBase, base_folder: Path, folder: Path
) -> MergeReport | None:
    """Write `merged/` below `folder`, where the job asks for it and the artefact is not a whole model already.

    `base16` merges into the base as it was published, `dequantized` into what the quantized base expands to, which is
    what the adapter was trained on.
    """
    if config.output.merge is Merge.NONE or config.method is Method.FULL:
        return None
    kind = cast(Literal["adapter", "delta"], artifact_of(config.method))
    quantization = None
    if config.method is Method.QLORA:
        assert isinstance(tuned.model, PeftModel)
        loaded: Any = tuned.model.get_base_model()
        quantization = loaded.config.quantization_config
    source = MergeSource(
        base_folder,
        folder / kind,
        kind,
        config.output.merge,
        quantization,
        config.model.trust_remote_code,
        DTYPES[config.training.precision],
    )
    merged = merge_model(source, logger.info)
    target = folder / MERGED
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    save_whole(merged.model, tokenizer, target)
    tokenizer.save_pretrained(target)
    return merged.report


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
