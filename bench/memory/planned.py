"""A setting as the operator sees it: a spec, the planner's plan for it, and the trainer's configuration. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.memory.settings import AUTO_BATCH, Setting
from bench.trainer.shapes import SHAPES
from finetune_operator.api.v1alpha1 import FineTuneJobSpec, MemoryPerGpu, PlanStatus
from finetune_operator.observed import JobRef
from finetune_operator.planner import plan_job, read_model
from finetune_operator.planner.memory import allocated_bytes, estimate
from finetune_operator.planner.search import select_for
from finetune_operator.planner.workload import Batch, Layout, Workload
from finetune_operator.render import Attempt, trainer_config
from finetune_operator.settings import TrainerDefaults
from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.vocabulary import Strategy

STEPS = 3
"""That are measured. The optimizer's state is there from the second on."""
_BEYOND = 2
"""Steps that the job would go on."""
ANY_ROOM = 2**60
"""Bytes of a GPU on which every job fits."""


@dataclass(frozen=True)
class Planned:
    """What the operator makes of a setting."""

    spec: FineTuneJobSpec
    plan: PlanStatus

    @property
    def rows_of_a_run(self) -> int:
        """Rows of data that a run reads, and a few more."""
        return self.plan.micro_batch_size * self.plan.gradient_accumulation * (STEPS + _BEYOND + 1)

    def config(self) -> TrainerConfig:
        """What the trainer is told."""
        return trainer_config(Attempt(JobRef("bench", "bench"), "bench", 1, self.spec, self.plan, TrainerDefaults()))


def planned(setting: Setting, gpu_memory: int, model: Path = Path("/model"), data: Path = Path("/data")) -> Planned:
    """Plan a setting for a GPU of so many bytes. One that leaves nothing open is planned whether or not there is room
    for it, so that it can be seen where the planner would be wrong to refuse it."""
    spec = spec_of(setting, model, data)
    room = gpu_memory if setting.automatic else ANY_ROOM
    return Planned(spec, plan_job(spec, _config(setting), gpu_memory=room).plan)


def spec_of(setting: Setting, model: Path, data: Path) -> FineTuneJobSpec:
    """The spec of a manifest."""
    training = {
        "epochs": 1,
        "maxSteps": STEPS + _BEYOND,
        "batchSize": AUTO_BATCH if setting.automatic else setting.rows,
        "microBatchSize": setting.rows,
        "gradientCheckpointing": setting.checkpointing,
        "torchCompile": "always" if setting.compiled else "never",
        "loggingSteps": 1,
    }
    sections = {name: section for name, section in setting.sections.items() if name != "training"}
    wire: dict[str, Any] = {
        **sections,
        "model": {"uri": f"file://{model}"},
        "dataset": {"uri": f"file://{data}", "maxLength": setting.length, "packing": setting.packed},
        "method": setting.method,
        "training": {**training, **setting.sections.get("training", {})},
        "evaluation": {"metrics": [], "compareWithBase": False, "generations": 0},
        "checkpoints": {"every": 1_000_000, "unit": "step", "resume": "never"},
        "resources": {"gpus": 1, "memory": "96Gi"},
        "output": {"uri": "s3://bench/results"},
    }
    return FineTuneJobSpec.model_validate(wire)


def predicted(setting: Setting, plan: PlanStatus) -> tuple[MemoryPerGpu, int]:
    """The estimate for a job that is run as a plan says: its parts, and the bytes that torch would count."""
    spec = spec_of(setting, Path("/model"), Path("/data"))
    known = read_model(_config(setting))
    work = Workload.of(spec, known, select_for(spec, known.layout))
    batch = Batch(
        plan.micro_batch_size,
        setting.length,
        plan.gradient_checkpointing,
        plan.recomputed_blocks,
        offloaded=plan.offload_activations,
        accumulating=plan.gradient_accumulation > 1,
    )
    layout = Layout(Strategy.SINGLE)
    return estimate(work, batch, layout), allocated_bytes(work, batch, layout)


def _config(setting: Setting) -> dict[str, Any]:
    return {"model_type": "llama", **SHAPES[setting.shape].config()}
