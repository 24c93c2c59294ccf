"""Plans a job from the command line, with the code that the operator plans with."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_operator.api.v1alpha1 import FineTuneJob, FineTuneJobSpec, FineTuneJobStatus, MemoryPerGpu
from finetune_operator.constants import Reason
from finetune_operator.errors import InvalidManifest, NotSupported, PlanningError
from finetune_operator.excerpts import observed_job
from finetune_operator.local.config_reader import LocalConfigReader
from finetune_operator.model_config import HubConfigReader
from finetune_operator.planner import PlanResult, plan_job, read_model
from finetune_operator.planning import Preparer
from finetune_operator.render import Attempt
from finetune_operator.settings import Settings
from finetune_operator.state import Fact

PLACEHOLDER_UID = "00000000-0000-0000-0000-000000000000"
"""Stands for the uid that the API server will give to the FineTuneJob."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A job and its plan."""

    attempt: Attempt
    """Its first attempt, with the plan."""
    note: str
    """What to know about the plan."""
    memory: MemoryPerGpu | None = None
    """Of a GPU; without GPUs of a process. None where the model's configuration could not be read."""
    blocks: tuple[int, ...] = ()
    """Decoder blocks that are trained or carry adapters."""
    block_count: int | None = None
    """Decoder blocks of the model; None where its configuration could not be read."""


def plan_first_attempt(job: FineTuneJob, settings: Settings, mirror: Path | None) -> Planned:
    """Check and plan a job.

    Raises:
        InvalidManifest: the operator would not accept it under these settings.
        NotSupported: this version cannot do it.
        PlanningError: it does not fit, or its words do not fit the model.
    """
    planner = _RememberingPlanner()
    manifest = job.to_manifest()
    manifest["metadata"]["uid"] = PLACEHOLDER_UID
    observed = observed_job(manifest)
    preparer = Preparer(settings, LocalConfigReader(HubConfigReader(), mirror=mirror), planner)
    preparation, spec = asyncio.run(preparer.prepare(observed, FineTuneJobStatus()))
    _raise_if_refused(preparation.accepted)
    planned = preparation.planned
    assert planned is not None and spec is not None
    _raise_if_refused(planned)
    assert preparation.plan is not None
    attempt = Attempt(observed.ref, observed.uid, 1, spec, preparation.plan, settings.trainer)
    result = planner.result
    if result is None:
        return Planned(attempt, planned.message)
    return Planned(
        attempt,
        planned.message,
        memory=result.plan.memory_per_gpu or result.host_memory,
        blocks=result.selection.blocks if result.selection is not None else (),
        block_count=planner.block_count,
    )


class _RememberingPlanner:
    """The planner, whose answer says more than a status holds."""

    def __init__(self) -> None:
        self.result: PlanResult | None = None
        self.block_count: int | None = None

    def __call__(
        self, spec: FineTuneJobSpec, config: Mapping[str, Any], *, gpu_memory: int, micro_batch_size: int | None
    ) -> PlanResult:
        self.result = plan_job(spec, config, gpu_memory=gpu_memory, micro_batch_size=micro_batch_size)
        self.block_count = read_model(config, remote_code=spec.model.trust_remote_code).layout.block_count
        return self.result


def _raise_if_refused(fact: Fact) -> None:
    if fact.status != "False":
        return
    if fact.reason == Reason.NOT_SUPPORTED:
        raise NotSupported(fact.message)
    if fact.reason in (Reason.DOES_NOT_FIT, Reason.INVALID_SELECTION):
        raise PlanningError(fact.message)
    raise InvalidManifest(fact.message.split("\n"))
