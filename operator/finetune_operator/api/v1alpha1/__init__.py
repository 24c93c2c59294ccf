"""`finetune.dev/v1alpha1`: the resource as Python types, from which the CRD is generated. Pure: no I/O."""

from finetune_operator.api.v1alpha1.inputs import Dataset, DataSource, Model, Validation
from finetune_operator.api.v1alpha1.job import FineTuneJob, FineTuneJobSpec, ObjectMeta
from finetune_operator.api.v1alpha1.running import (
    Checkpoints,
    Evaluation,
    Output,
    Resources,
    RunPolicy,
    Scheduling,
    Trainer,
)
from finetune_operator.api.v1alpha1.status import (
    AttemptsStatus,
    ConditionStatus,
    EvaluationStatus,
    FailureStatus,
    FineTuneJobStatus,
    MemoryPerGpu,
    PlanStatus,
    ProgressStatus,
    ResultStatus,
)
from finetune_operator.api.v1alpha1.tuning import Layers, Lora, Parallelism, Quantization, Training

__all__ = [
    "AttemptsStatus",
    "Checkpoints",
    "ConditionStatus",
    "DataSource",
    "Dataset",
    "Evaluation",
    "EvaluationStatus",
    "FailureStatus",
    "FineTuneJob",
    "FineTuneJobSpec",
    "FineTuneJobStatus",
    "Layers",
    "Lora",
    "MemoryPerGpu",
    "Model",
    "ObjectMeta",
    "Output",
    "Parallelism",
    "PlanStatus",
    "ProgressStatus",
    "Quantization",
    "Resources",
    "ResultStatus",
    "RunPolicy",
    "Scheduling",
    "Trainer",
    "Training",
    "Validation",
]
