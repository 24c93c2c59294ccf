"""The trainer's configuration: `job` the whole, and its parts by subject."""

from __future__ import annotations

from finetune_trainer.contract.config.inputs import (
    CleaningConfig,
    ColumnsConfig,
    DatasetConfig,
    DataSource,
    ModelConfig,
    TagsConfig,
    ValidationConfig,
)
from finetune_trainer.contract.config.job import ADAPTER_NAME, AdapterConfig, JobIdentity, TrainerConfig
from finetune_trainer.contract.config.methods import HeadConfig, LoraConfig, PromptConfig, QuantizationConfig
from finetune_trainer.contract.config.outputs import CheckpointConfig, EvaluationConfig, Gate, OutputConfig, S3Config
from finetune_trainer.contract.config.training import (
    OffloadConfig,
    ParallelismConfig,
    PreferenceConfig,
    SchedulerOptions,
    TrainingConfig,
)

CONFIG_PATH = "/etc/finetune/config.json"

__all__ = [
    "ADAPTER_NAME",
    "CONFIG_PATH",
    "AdapterConfig",
    "CheckpointConfig",
    "CleaningConfig",
    "ColumnsConfig",
    "DataSource",
    "DatasetConfig",
    "EvaluationConfig",
    "Gate",
    "HeadConfig",
    "JobIdentity",
    "LoraConfig",
    "ModelConfig",
    "OffloadConfig",
    "OutputConfig",
    "ParallelismConfig",
    "PreferenceConfig",
    "PromptConfig",
    "QuantizationConfig",
    "S3Config",
    "SchedulerOptions",
    "TagsConfig",
    "TrainerConfig",
    "TrainingConfig",
    "ValidationConfig",
]
