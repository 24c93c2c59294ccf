"""What the planner computes for each method: the same as `finetune plan` shows."""

from __future__ import annotations

from typing import Any

from documentation.markdown import table
from finetune_operator.api.v1alpha1 import FineTuneJobSpec, PlanStatus
from finetune_operator.planner import plan_job

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
"""The shape of Llama 3.1 8B."""
GPU = 80 * 2**30
GIB = 2**30

JOBS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full", {"method": "full", "resources": {"gpus": 8}}),
    ("freeze, last 8 of 32", {"method": "freeze", "layers": {"last": 8}}),
    ("freeze, last 2 of 32", {"method": "freeze", "layers": {"last": 2}}),
    ("lora, rank 16", {"method": "lora"}),
    ("qlora nf4, rank 16", {"method": "qlora"}),
    ("qlora fp8, rank 16", {"method": "qlora", "quantization": {"type": "fp8", "keepTransposed": "never"}}),
    ("prompt, 20 tokens", {"method": "prompt"}),
    ("prefix, 20 tokens", {"method": "prefix"}),
    ("ia3", {"method": "ia3"}),
)


def planned(parts: dict[str, Any]) -> PlanStatus:
    """The plan of a job on Llama 3.1 8B: rows of 2,048 tokens, 8 rows a step, one row at a time."""
    spec = {
        "model": {"uri": "hf://meta-llama/Llama-3.1-8B"},
        "dataset": {"uri": "s3://data/x.jsonl", "maxLength": 2048, "packing": False},
        "output": {"uri": "s3://models/x"},
        "training": {"batchSize": 8, "microBatchSize": 1},
        **parts,
    }
    return plan_job(FineTuneJobSpec.model_validate(spec), LLAMA_8B, gpu_memory=GPU).plan


def memory_table() -> str:
    """A row for each method."""
    rows = []
    for name, parts in JOBS:
        plan = planned(parts)
        memory = plan.memory_per_gpu
        assert memory is not None
        trained = plan.trainable_parameters
        gpus = plan.nodes * plan.gpus_per_node
        how = f"{gpus} x {f'ZeRO-{plan.zero_stage}' if plan.zero_stage else plan.strategy}" if gpus > 1 else "1"
        rows.append(
            (
                name,
                how,
                "" if trained is None else f"{trained / 1e6:,.1f}",
                *(f"{getattr(memory, part) / GIB:.1f}" for part in ("weights", "gradients", "optimizer")),
                f"{(memory.activations + memory.logits) / GIB:.1f}",
                f"{memory.total / GIB:.1f}",
            )
        )
    of_a_gpu = ("Weights", "Gradients", "Optimizer", "Activations", "Total")
    return table(("Method", "GPUs", "Trained, millions", *of_a_gpu), rows)
