"""Configurations and specs for the planner's tests."""

from __future__ import annotations

from typing import Any

from documentation.memory import LLAMA_8B
from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.planner import PlanResult, plan
from finetune_operator.planner.memory import GIB
from finetune_operator.planner.search import select_for
from finetune_operator.planner.shapes import KnownModel, read_model
from finetune_operator.planner.support import STRATEGIES
from finetune_operator.planner.workload import Workload
from finetune_trainer.contract.vocabulary import Strategy

CACHED = {"cacheFrozenPrefix": "always"}
OLD_CARD, CARD, LARGE_CARD = 24 * GIB, 80 * GIB, 141 * GIB

LLAMA_8B_PARAMETERS = 8_030_261_248
"""As its model card counts them."""

SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SMOLLM2_135M_PARAMETERS = 134_515_008

MINIMAL: dict[str, Any] = {
    "model": {"uri": "hf://org/model"},
    "dataset": {"uri": "s3://data/train.jsonl", "packing": False},
    "output": {"uri": "s3://models/x"},
}


def spec(*, dataset: dict[str, Any] | None = None, **parts: Any) -> FineTuneJobSpec:
    """A valid spec without packing; `dataset` is laid over it."""
    return FineTuneJobSpec.model_validate({**MINIMAL, **parts, "dataset": {**MINIMAL["dataset"], **(dataset or {})}})


def known(config: dict[str, Any] | None = None, **overrides: Any) -> KnownModel:
    """Llama 3.1 8B's shape, or another."""
    return read_model({**(config or LLAMA_8B), **overrides})


def workload(config: dict[str, Any] | None = None, **parts: Any) -> Workload:
    """What a job does to a model."""
    job, model = spec(**parts), known(config)
    return Workload.of(job, model, select_for(job, model.layout))


def planned(
    config: dict[str, Any] | None = None,
    *,
    gpu_memory: int = CARD,
    micro_batch_size: int | None = None,
    strategies: frozenset[Strategy] = STRATEGIES,
    **parts: Any,
) -> PlanResult:
    """For Llama 3.1 8B, or another model, on cards of 80 GiB, or others."""
    return plan(
        spec(**parts), known(config), gpu_memory=gpu_memory, micro_batch_size=micro_batch_size, strategies=strategies
    )
