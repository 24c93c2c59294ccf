"""The part of a plan that follows from the spec alone, whatever the model. Pure: no I/O."""

from __future__ import annotations

from finetune_operator.api.v1alpha1 import FineTuneJobSpec, PlanStatus
from finetune_trainer.contract.vocabulary import OffloadTarget


def unplanned(spec: FineTuneJobSpec, micro_batch_size: int | None = None) -> PlanStatus:
    """A careful plan for a model that is not known here: one row at a time, activations recomputed.

    micro_batch_size: takes the place of the spec's.
    """
    gpus = spec.resources.gpus
    per_node = (spec.resources.gpus_per_node or min(8, gpus)) if gpus else 0
    processes = max(1, gpus)
    wanted = spec.training.micro_batch_size
    micro = micro_batch_size or (1 if wanted == "auto" else wanted)
    strategy = "ddp" if spec.parallelism.strategy == "auto" else spec.parallelism.strategy
    return PlanStatus(
        nodes=gpus // per_node if per_node else 1,
        gpus_per_node=per_node,
        strategy="single" if processes == 1 and strategy == "ddp" else strategy,
        zero_stage=(spec.parallelism.zero_stage or 3) if strategy == "deepspeed" else None,
        offload_optimizer=spec.parallelism.offload.optimizer is not OffloadTarget.NONE,
        offload_parameters=spec.parallelism.offload.parameters is not OffloadTarget.NONE,
        micro_batch_size=micro,
        gradient_accumulation=spec.training.batch_size // (micro * processes),
        gradient_checkpointing=spec.training.gradient_checkpointing != "never",
        offload_activations=spec.training.gradient_checkpointing == "offload",
    )
