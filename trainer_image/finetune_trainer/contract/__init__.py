"""What the operator and the trainer agree on: pydantic and the standard library only, never torch.

`vocabulary` the shared words, `config` what goes in, `outcome` and `manifest` what comes out, `layout` and `selection`
which tensors a job trains.
"""

from finetune_trainer.contract.config import CONFIG_PATH, TrainerConfig
from finetune_trainer.contract.layout import ModelLayout, ParameterInfo, ParameterKind
from finetune_trainer.contract.manifest import CheckpointManifest, EvaluationResult, FileEntry, ResultManifest
from finetune_trainer.contract.outcome import ExitCode, RunResult, TerminationMessage
from finetune_trainer.contract.selection import LayerSelection, Selection, SelectionError, count_trainable, select

__all__ = [
    "CONFIG_PATH",
    "CheckpointManifest",
    "EvaluationResult",
    "ExitCode",
    "FileEntry",
    "LayerSelection",
    "ModelLayout",
    "ParameterInfo",
    "ParameterKind",
    "ResultManifest",
    "RunResult",
    "Selection",
    "SelectionError",
    "TerminationMessage",
    "TrainerConfig",
    "count_trainable",
    "select",
]
