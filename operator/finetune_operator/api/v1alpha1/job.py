"""The FineTuneJob."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from finetune_operator.api.base import ApiModel
from finetune_operator.api.v1alpha1.adapters import Adapter
from finetune_operator.api.v1alpha1.inputs import Dataset, Model
from finetune_operator.api.v1alpha1.names import name_violations
from finetune_operator.api.v1alpha1.rules import violations
from finetune_operator.api.v1alpha1.running import (
    Checkpoints,
    Evaluation,
    Output,
    Resources,
    RunPolicy,
    Scheduling,
    Trainer,
)
from finetune_operator.api.v1alpha1.status import FineTuneJobStatus
from finetune_operator.api.v1alpha1.tuning import Head, Layers, Lora, Parallelism, Prompt, Quantization, Training
from finetune_trainer.contract.vocabulary import Method


class FineTuneJobSpec(ApiModel):
    """What is wanted. Once created, only `runPolicy` may change."""

    model: Model
    """The model to tune."""
    dataset: Dataset
    """The data to tune on."""
    method: Method = Method.LORA
    """How: `full`, `freeze`, `lora`, `qlora`, `bitfit`, `prefix`, `prompt`, `adapter`, `ia3`, `head`."""
    layers: Layers | None = None
    """Which decoder blocks, which parts of them, and what beside them. Default: all that the method can train."""
    lora: Lora | None = None
    """Low-rank adapters, for `lora` and `qlora`."""
    prompt: Prompt | None = None
    """The trained positions, for `prefix`, `prompt` and `adapter`."""
    quantization: Quantization | None = None
    """How the frozen base is stored, for `qlora`."""
    head: Head | None = None
    """What is predicted of a text, for `head`."""
    training: Training = Training()
    """The optimization."""
    parallelism: Parallelism = Parallelism()
    """How the work is spread over the GPUs."""
    resources: Resources = Resources()
    """What the job asks of the cluster."""
    scheduling: Scheduling = Scheduling()
    """Where the pods may run."""
    output: Output
    """Where results go."""
    evaluation: Evaluation = Evaluation()
    """What is computed on the held-out data."""
    adapters: tuple[Adapter, ...] | None = Field(default=None, min_length=1, max_length=16)
    """Several adapters on the one base, trained one after the other in this order, in place of one. Each has the job's
    `dataset`, `layers`, `lora` and `training` where it says nothing else. For method `lora` and `qlora`."""
    checkpoints: Checkpoints = Checkpoints()
    """Checkpoints in object storage."""
    run_policy: RunPolicy = RunPolicy()
    """How long and how often the job is tried."""
    trainer: Trainer = Trainer()
    """The trainer's pods."""

    def stages(self) -> tuple[tuple[str, FineTuneJobSpec], ...]:
        """Name and spec of each of several adapters, as if it were the only one; none without `adapters`."""
        return tuple((one.name, self._of(one)) for one in self.adapters or ())

    def _of(self, adapter: Adapter) -> FineTuneJobSpec:
        own = {name: getattr(adapter, name) for name in ("dataset", "layers", "lora")}
        changes = {name: value for name, value in own.items() if value is not None}
        if adapter.training is not None:
            given = {name: getattr(adapter.training, name) for name in adapter.training.model_fields_set}
            changes["training"] = self.training.model_copy(
                update={name: value for name, value in given.items() if value is not None}
            )
        return self.model_copy(update={**changes, "adapters": None})

    @model_validator(mode="after")
    def _cross_field_rules(self) -> FineTuneJobSpec:
        problems = violations(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


class ObjectMeta(ApiModel):
    """The part of metav1.ObjectMeta that a manifest needs; the rest is kept as it is."""

    model_config = ApiModel.model_config | {"extra": "allow"}

    name: str = Field(min_length=1, max_length=253)
    namespace: str = "default"
    uid: str = ""
    generation: int = 1
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class FineTuneJob(ApiModel):
    """One fine-tuning of one model on one data set."""

    api_version: str
    kind: str
    metadata: ObjectMeta
    spec: FineTuneJobSpec
    status: FineTuneJobStatus | None = None

    @model_validator(mode="after")
    def _name_rules(self) -> FineTuneJob:
        problems = name_violations(self.metadata.name)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def name(self) -> str:
        """`metadata.name`."""
        return self.metadata.name

    def to_manifest(self) -> dict[str, Any]:
        """The object as JSON."""
        return self.to_wire()
