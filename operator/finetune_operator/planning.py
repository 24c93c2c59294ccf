"""Getting to know a job before it runs: is it accepted, what does its model look like, what is the plan.

The model's `config.json` may have to be fetched: that is the injected reader's business, and its failure is none of the
job's. The trainer, which has to load the model anyway, checks again in its first seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from finetune_operator.acceptance import accept
from finetune_operator.api.base import quantity_to_bytes
from finetune_operator.api.v1alpha1 import FineTuneJobSpec, FineTuneJobStatus, PlanStatus
from finetune_operator.constants import Condition, Reason
from finetune_operator.errors import (
    ModelConfigUnavailable,
    NotSupported,
    PlanningError,
    PlanningTooLong,
    UnknownArchitecture,
)
from finetune_operator.observed import JobRef, ObservedJob
from finetune_operator.planner.support import check_supported
from finetune_operator.planning_thread import PlanningThread
from finetune_operator.settings import Settings
from finetune_operator.shape import unplanned
from finetune_operator.state import Fact, Preparation
from finetune_trainer.contract import SelectionError


class ModelConfigReader(Protocol):
    """Reads a model's configuration."""

    async def __call__(self, ref: JobRef, spec: FineTuneJobSpec) -> Mapping[str, Any]:
        """The content of `config.json`. Raises ModelConfigUnavailable when it cannot be read from here."""


class PlanResult(Protocol):
    """What a planner answers."""

    @property
    def plan(self) -> PlanStatus:
        """The plan."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about it."""


class Planner(Protocol):
    """Plans a job whose model is known. Called in a thread, by several of them at the same time."""

    def __call__(
        self, spec: FineTuneJobSpec, config: Mapping[str, Any], *, gpu_memory: int, micro_batch_size: int | None
    ) -> PlanResult:
        """The plan.

        Args:
            spec: the job.
            config: the model's `config.json`.
            gpu_memory: of one GPU, in bytes.
            micro_batch_size: takes the place of the spec's, after an attempt that ran out of memory.

        Raises:
            UnknownArchitecture: there is no shape for this model.
            PlanningError: any other: the job does not fit.
            SelectionError: the job's words do not fit the model.
            NotSupported: this version cannot do it.
        """


class Preparer:
    """Checks and plans specs. Holds no state: what was found stands in the job's status."""

    def __init__(
        self,
        settings: Settings,
        read_config: ModelConfigReader,
        planner: Planner,
        thread: PlanningThread | None = None,
    ) -> None:
        """thread: where the planner is run; None: one with the usual limits."""
        self._settings = settings
        self._read_config = read_config
        self._planner = planner
        self._thread = thread or PlanningThread()

    async def prepare(self, job: ObservedJob, status: FineTuneJobStatus) -> tuple[Preparation, FineTuneJobSpec | None]:
        """Check a job's spec, and plan it unless the status has the plan already; the spec when it is accepted."""
        accepted, spec = accept(job, self._settings.permissions, self._settings.trainer)
        if spec is None:
            return Preparation(accepted), None
        override = status.attempts.micro_batch_size if status.attempts else None
        known = _known(status, job.generation, override)
        if known is not None:
            return Preparation(accepted, known, status.plan), spec
        planned, plan = await self._plan(job.ref, spec, override)
        return Preparation(accepted, planned, plan), spec

    async def _plan(
        self, ref: JobRef, spec: FineTuneJobSpec, micro_batch_size: int | None
    ) -> tuple[Fact, PlanStatus | None]:
        resources = spec.resources
        quantity = resources.gpu_memory or self._settings.trainer.gpu_memory_of(resources.gpu_resource)
        gpu_memory = quantity_to_bytes(quantity)
        try:
            # Needs no model: what no trainer carries out is refused whether its model can be read or not.
            check_supported(spec)
            config = await self._read_config(ref, spec)
            result = await self._thread.run(
                lambda: self._planner(spec, config, gpu_memory=gpu_memory, micro_batch_size=micro_batch_size)
            )
        except (ModelConfigUnavailable, UnknownArchitecture, PlanningTooLong) as error:
            plan = unplanned(spec, micro_batch_size, gpu_memory)
            reason = Reason.PLANNING_TOO_LONG if isinstance(error, PlanningTooLong) else Reason.MODEL_UNKNOWN
            return Fact("Unknown", reason, _not_planned(error, plan)), plan
        except SelectionError as error:
            return Fact("False", Reason.INVALID_SELECTION, str(error)), None
        except NotSupported as error:
            return Fact("False", Reason.NOT_SUPPORTED, str(error)), None
        except PlanningError as error:
            return Fact("False", Reason.DOES_NOT_FIT, str(error)), None
        return Fact("True", Reason.FITS, "; ".join(result.notes)), result.plan


def _not_planned(error: Exception, plan: PlanStatus) -> str:
    """Why there is no plan, and what is done in its place."""
    recomputed = ", activations recomputed" if plan.gradient_checkpointing else ""
    fields = "training.microBatchSize"
    if plan.nodes * plan.gpus_per_node > 1:
        fields = f"parallelism.strategy and {fields}"
    return (
        f"{error}; not planned: strategy {plan.strategy}, micro-batch {plan.micro_batch_size}{recomputed} ({fields} "
        "choose otherwise); the trainer checks in its first seconds"
    )


def _known(status: FineTuneJobStatus, generation: int, override: int | None) -> Fact | None:
    """The condition Planned, when it and the plan in the status are of this spec and this micro-batch."""
    planned = next((one for one in status.conditions if one.type == Condition.PLANNED), None)
    plan = status.plan
    if planned is None or plan is None or planned.status == "False" or planned.observed_generation != generation:
        return None
    if override is not None and plan.micro_batch_size != override:
        return None
    return Fact(planned.status, planned.reason, planned.message)
