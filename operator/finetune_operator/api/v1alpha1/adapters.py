"""Several adapters on one base: what each of them has of its own."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_operator.api.base import ApiModel
from finetune_operator.api.v1alpha1.inputs import Dataset
from finetune_operator.api.v1alpha1.tuning import Layers, Lora, SchedulerOptions
from finetune_trainer.contract import vocabulary as v
from finetune_trainer.contract.config import ADAPTER_NAME

AdapterName = Annotated[str, Field(min_length=1, max_length=40, pattern=ADAPTER_NAME)]


class AdapterTraining(ApiModel):
    """What one adapter's optimization has of its own; batches, precision and optimizer are the job's."""

    epochs: float | None = Field(default=None, gt=0, le=10_000)
    """Passes over the adapter's data."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, whatever `epochs` says."""
    learning_rate: float | None = Field(default=None, gt=0, le=10)
    """Peak learning rate."""
    scheduler: v.Scheduler | None = None
    """Course of the learning rate."""
    scheduler_options: SchedulerOptions | None = None
    """What some schedulers want to know besides."""
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps over which the learning rate rises, 0 to 1."""
    warmup_steps: int | None = Field(default=None, ge=0, le=1_000_000_000)
    """Steps over which the learning rate rises, in place of `warmupRatio`."""
    weight_decay: float | None = Field(default=None, ge=0, le=10)
    """Decoupled weight decay."""
    neftune_alpha: float | None = Field(default=None, gt=0, le=1000)
    """Noise on the embeddings while training (NEFTune)."""
    seed: int | None = Field(default=None, ge=0, le=2_147_483_647)
    """Seed of everything random."""


class Adapter(ApiModel):
    """One of several adapters. `dataset`, `layers` and `lora` take the place of the job's whole section; of `training`
    only what is set here."""

    name: AdapterName
    """The adapter's result lies at `<output.uri>/runs/<uid>/adapters/<name>`."""
    dataset: Dataset | None = None
    """The data to tune it on."""
    layers: Layers | None = None
    """Which decoder blocks carry it, and what is trained beside it."""
    lora: Lora | None = None
    """Rank, alpha, variant and so on."""
    training: AdapterTraining | None = None
    """Its optimization."""
