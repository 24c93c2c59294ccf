"""What the operator and the trainer agree on: pydantic and the standard library only, never torch.

`vocabulary` the shared words, `config` what goes in, `outcome` and `manifest` what comes out, `layout`, `selection` and
`adapters` which tensors a job trains.
"""

from finetune_trainer.contract.adapters import AdapterShape, adapter_shapes, check_experts, count_trainable
from finetune_trainer.contract.config import CONFIG_PATH, TrainerConfig
from finetune_trainer.contract.layout import MAX_BLOCKS, ModelLayout, ParameterInfo, ParameterKind
from finetune_trainer.contract.manifest import (
    CheckpointManifest,
    EvaluationResult,
    FileEntry,
    MergeReport,
    ResultManifest,
)
from finetune_trainer.contract.outcome import ExitCode, RunResult, TerminationMessage
from finetune_trainer.contract.selection import LayerSelection, Selection, SelectionError, select

__all__ = [
    "CONFIG_PATH",
    "MAX_BLOCKS",
    "AdapterShape",
    "CheckpointManifest",
    "EvaluationResult",
    "ExitCode",
    "FileEntry",
    "LayerSelection",
    "MergeReport",
    "ModelLayout",
    "ParameterInfo",
    "ParameterKind",
    "ResultManifest",
    "RunResult",
    "Selection",
    "SelectionError",
    "TerminationMessage",
    "TrainerConfig",
    "adapter_shapes",
    "check_experts",
    "count_trainable",
    "select",
]
