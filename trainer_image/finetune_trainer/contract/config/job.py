"""The whole configuration. It is complete: the operator resolved every default, nothing is guessed later."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from finetune_trainer.contract import vocabulary as v
from finetune_trainer.contract.base import ContractModel
from finetune_trainer.contract.config.inputs import DatasetConfig, ModelConfig
from finetune_trainer.contract.config.methods import HeadConfig, LoraConfig, PromptConfig, QuantizationConfig
from finetune_trainer.contract.config.outputs import CheckpointConfig, EvaluationConfig, OutputConfig, S3Config
from finetune_trainer.contract.config.training import ParallelismConfig, TrainingConfig
from finetune_trainer.contract.selection import LayerSelection

ADAPTER_NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"


class JobIdentity(ContractModel):
    """Which job, and which attempt of it, this process works for."""

    name: str
    namespace: str
    uid: str
    """UID of the FineTuneJob: two jobs of the same name never share anything in storage."""
    attempt: int = Field(ge=1)
    spec_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the job's spec as its author wrote it, `runPolicy` left out; None where nobody computed it."""


class AdapterConfig(ContractModel):
    """One of several adapters on one base, trained one after the other: what it has of its own."""

    name: str = Field(pattern=ADAPTER_NAME, max_length=40)
    """Its result lies at `<run>/adapters/<name>`."""
    dataset: DatasetConfig
    layers: LayerSelection | None = None
    lora: LoraConfig
    training: TrainingConfig


class TrainerConfig(ContractModel):
    """Everything a run depends on, besides credentials."""

    version: Literal[1] = 1
    job: JobIdentity
    model: ModelConfig
    dataset: DatasetConfig
    method: v.Method
    layers: LayerSelection | None = None
    lora: LoraConfig | None = None
    prompt: PromptConfig | None = None
    quantization: QuantizationConfig | None = None
    head: HeadConfig | None = None
    training: TrainingConfig
    parallelism: ParallelismConfig
    s3: S3Config = S3Config()
    output: OutputConfig
    evaluation: EvaluationConfig
    checkpoints: CheckpointConfig
    adapters: tuple[AdapterConfig, ...] = ()
    """Several adapters in place of one; dataset, layers, lora and training are then theirs."""
    adapter: str | None = None
    """The adapter that this configuration is one of; see `stages`."""

    def stages(self) -> tuple[TrainerConfig, ...]:
        """The configuration of each adapter, as if it were the only one; of a job without a list, its own."""
        if not self.adapters:
            return (self,)
        return tuple(
            self.model_copy(
                update={
                    "dataset": one.dataset,
                    "layers": one.layers,
                    "lora": one.lora,
                    "training": one.training,
                    "adapters": (),
                    "adapter": one.name,
                }
            )
            for one in self.adapters
        )

    @property
    def folder_name(self) -> str:
        """Name of the folders that this attempt uses on a node."""
        name = f"{self.job.uid}-{self.job.attempt}"
        return name if self.adapter is None else f"{name}-{self.adapter}"

    @property
    def run_uri(self) -> str:
        """Where this job's objects lie, whatever its attempts: `<output.uri>/runs/<uid>`, and below it
        `adapters/<name>` for one of several adapters."""
        run = f"{self.output.uri.rstrip('/')}/runs/{self.job.uid}"
        return run if self.adapter is None else f"{run}/adapters/{self.adapter}"

    def digest(self) -> str:
        """SHA-256 of the whole configuration, its attempt left out."""
        return _sha256(self._without_attempt())

    def resume_digest(self) -> str:
        """SHA-256 of what a checkpoint depends on. Batch splitting, and how the same is computed, may change between
        attempts; the rest may not."""
        data = self._without_attempt()
        for name in (
            "microBatchSize",
            "gradientAccumulation",
            "gradientCheckpointing",
            "recomputedBlocks",
            "offloadActivations",
            "flashAttn",
            "torchCompile",
            "compileCache",
            "fuseAdapters",
            "cacheFrozenPrefix",
            "loggingSteps",
        ):
            data["training"].pop(name, None)
        for name in ("evaluation", "checkpoints", "s3", "parallelism"):
            data.pop(name, None)
        data["output"].pop("reuse", None)
        return _sha256(data)

    def _without_attempt(self) -> dict[str, Any]:
        data = self.model_dump(by_alias=True, mode="json")
        # What is computed of the spec may change with the operator; what it says is in the rest.
        for name in ("attempt", "specSha256"):
            data["job"].pop(name)
        return data


def _sha256(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
