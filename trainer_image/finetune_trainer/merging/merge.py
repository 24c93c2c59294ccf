"""Merging an adapter or a delta into its base model, and measuring what that changed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from finetune_trainer.contract import MergeReport
from finetune_trainer.contract.vocabulary import Merge
from finetune_trainer.methods.lora import quiet_peft
from finetune_trainer.methods.qlora import prepare_quantized
from finetune_trainer.results.delta import load_delta

_PROBE_ROWS, _PROBE_LENGTH = 4, 64


@dataclass(frozen=True)
class MergeSource:
    """What is merged into what."""

    base: Path
    """Folder of the base model, as it was published."""
    artefact: Path
    """Folder of the adapter or the delta."""
    kind: Literal["adapter", "delta"]
    into: Merge
    """`base16`: the base as it was published. `dequantized`: what the quantized base expands to."""
    quantization: QuantizationConfigMixin | None = None
    """How the base was stored in training; None where it was not quantized."""
    trust_remote_code: bool = False
    dtype: torch.dtype | None = None
    """What a quantized base was quantized from: scales and codes follow from it. None for the type of its files."""


@dataclass(frozen=True)
class Merged:
    """A stand-alone model on the CPU, or wherever torch puts it by default."""

    model: PreTrainedModel
    report: MergeReport


def merge_model(source: MergeSource, progress: Callable[[str], None]) -> Merged:
    """Merge, and compare the logits of the result with those of the adapter on the base that it was trained on.

    No more than one copy of the model is in memory at a time. Raises UsageError where the artefact does not fit the
    base, and what transformers, PEFT and torch raise for files that cannot be read.
    """
    if source.kind == "delta":
        model, before, after = _merge_delta(source, progress)
    else:
        model, before, after = _merge_adapter(source, progress)
    report = MergeReport(
        into=source.into.value,
        largest_logit_difference=float((after - before).abs().max()),
        largest_logit=float(before.abs().max()),
        same_first_choice=float((after.argmax(-1) == before.argmax(-1)).float().mean()),
    )
    return Merged(model, report)


def _merge_adapter(
    source: MergeSource, progress: Callable[[str], None]
) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    progress("loading the base model as it was in training")
    base = _load(source, quantized=True)
    with quiet_peft():
        tuned = PeftModel.from_pretrained(base, str(source.artefact))
        before = _logits(tuned)
        if source.quantization is not None:
            if source.into is Merge.DEQUANTIZED:
                progress("expanding the quantized base")
                base = cast(PreTrainedModel, tuned.unload()).dequantize()
            else:
                del tuned, base
                gc.collect()
                progress("loading the base model as it was published")
                base = _load(source, quantized=False)
            tuned = PeftModel.from_pretrained(base, str(source.artefact))
        progress("merging")
        merged = tuned.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    return merged, before, _logits(merged)


def _merge_delta(
    source: MergeSource, progress: Callable[[str], None]
) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    progress("loading the base model")
    model = _load(source, quantized=False)
    dtype = model.dtype
    # As in training: what was trained in fp32, the rest as it is.
    load_delta(model, source.artefact, dtype=torch.float32)
    before = _logits(model, autocast=dtype)
    progress("merging")
    nn.Module.to(model, dtype)
    return model, before, _logits(model, autocast=dtype)


def _load(source: MergeSource, *, quantized: bool) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": "auto"}
    if quantized and source.quantization is not None:
        options |= {"quantization_config": source.quantization, "dtype": source.dtype or "auto"}
    model = AutoModelForCausalLM.from_pretrained(  # nosec B615  # a folder on this disk
        source.base, use_safetensors=True, trust_remote_code=source.trust_remote_code, **options
    )
    assert isinstance(model, PreTrainedModel)
    if quantized and source.quantization is not None:
        # A forward pass may otherwise leave weights that no longer expand to what they were.
        prepare_quantized(model, ())
    model.eval()
    return model


@torch.no_grad()
def _logits(model: nn.Module, autocast: torch.dtype | None = None) -> torch.Tensor:
    """(rows, length, vocabulary) in fp32 on the CPU, of the same random tokens for every model of a vocabulary."""
    config: Any = model.config
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (_PROBE_ROWS, _PROBE_LENGTH), generator=generator)
    device = next(model.parameters()).device
    enabled = autocast in (torch.bfloat16, torch.float16)
    with torch.autocast(device.type, dtype=autocast if enabled else torch.bfloat16, enabled=enabled):
        logits = model(input_ids=tokens.to(device), use_cache=False).logits
    return cast(torch.Tensor, logits).float().cpu()
