"""Several named adapters on one base, trained one after the other.

Each is a stage with a run of its own at `<run>/adapters/<name>`: checkpoints, artefact and manifest are those of a job
that has only this adapter. A stage whose manifest and files are there is not trained again by a later attempt. The
job's own `manifest.json` lists them all, and is written when the last one is.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedModel

from finetune_trainer.context import RunContext
from finetune_trainer.contract import FileEntry, ResultManifest, RunResult, Selection, TrainerConfig
from finetune_trainer.contract.manifest import AdapterRecord, DataReport
from finetune_trainer.contract.outcome import AdapterResult
from finetune_trainer.contract.vocabulary import LoraBias, Method
from finetune_trainer.data import PreparedData
from finetune_trainer.distributed import shared_by_all
from finetune_trainer.errors import InputMissing, InternalError, TrainerError
from finetune_trainer.evaluation import missed_gates
from finetune_trainer.methods import TunedModel
from finetune_trainer.methods.lora import RESIDUAL_VARIANTS, quiet_peft
from finetune_trainer.progress import ProgressReporter
from finetune_trainer.results.pointers import is_complete, name_run
from finetune_trainer.results.save import Base, now
from finetune_trainer.storage import MANIFEST, S3Uri

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One adapter, ready to be trained."""

    config: TrainerConfig
    base: Base
    data: PreparedData

    @property
    def steps(self) -> int:
        """Optimizer steps, as far as they can be told before the rows are packed."""
        training, dataset = self.config.training, self.config.dataset
        lengths = self.data.train.lengths
        rows = math.ceil(int(lengths.sum()) / dataset.max_length) if dataset.packing else len(lengths)
        return training.max_steps or math.ceil(training.epochs * math.ceil(rows / training.batch_size))


class SharedBase:
    """A base model that one adapter leaves as it was and the next one can be put on, so that it is loaded once."""

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None
        self._loaded_as: object = None

    def take(self, config: TrainerConfig) -> PreTrainedModel | None:
        """The base, where one is kept that was loaded as this stage needs it."""
        model, self._model = self._model, None
        # What stands beside the adapters of a quantized base is left out of the quantization.
        beside = config.method is Method.QLORA and config.layers is not None and bool(config.layers.also)
        return model if self._loaded_as == config.training.precision and not beside else None

    def keep(self, config: TrainerConfig, selection: Selection, tuned: TunedModel) -> None:
        """Take the adapters off. A base that they were subtracted from, or of which more was trained or copied than
        adapters, is not what it was; a sharded one is no longer whole."""
        lora, model = config.lora, tuned.model
        if (
            config.adapter is None
            or config.parallelism.divides_weights
            or lora is None
            or lora.variant in RESIDUAL_VARIANTS
            or lora.bias is not LoraBias.NONE
            or selection.parameters
            or not isinstance(model, PeftModel)
        ):
            return
        with quiet_peft():
            base = model.unload()
        assert isinstance(base, PreTrainedModel)
        # PEFT looks for it, and warns of a model that is adapted twice.
        base.__dict__.pop("peft_config", None)
        base.requires_grad_(False)
        self._model, self._loaded_as = base, config.training.precision


class StageProgress(ProgressReporter):
    """Counts the steps of one stage among those of all."""

    def __init__(self, inner: ProgressReporter, before: int, after: int) -> None:
        self._inner = inner
        self._before = before
        self._after = after

    def report(
        self, step: int, total_steps: int, metrics: Mapping[str, float], remaining_seconds: float | None = None
    ) -> None:
        """Report to the job's own reporter; what is left takes as long for each step as it does here."""
        left = total_steps - step
        if remaining_seconds is not None and self._after:
            remaining_seconds = remaining_seconds * (left + self._after) / left if left else None
        total = self._before + total_steps + self._after if total_steps else 0
        self._inner.report(self._before + step if total_steps else 0, total, metrics, remaining_seconds)


@dataclass(frozen=True)
class FinishedAdapter:
    """An adapter whose result is in the object store."""

    name: str
    manifest: ResultManifest
    sha256: str
    size_bytes: int
    """Of its manifest."""


@contextmanager
def named(config: TrainerConfig) -> Iterator[None]:
    """Let a failure say which of several adapters it is about."""
    try:
        yield
    except TrainerError as error:
        if config.adapter is None:
            raise
        raise type(error)(f"adapter {config.adapter}: {error.message}", reason=error.reason, step=error.step) from error


def tune_adapters(
    config: TrainerConfig, context: RunContext, stages: Sequence[Stage], tune: Callable[..., RunResult]
) -> RunResult:
    """Train the stages that are not finished, then write what lists them all. `tune` is `train.tune`."""
    shared = SharedBase()
    finished: list[FinishedAdapter] = []
    steps = [stage.steps for stage in stages]
    for number, stage in enumerate(stages):
        before = sum(found.manifest.steps for found in finished)
        known = _agreed(context, stage)
        if known is None:
            logger.info("adapter %s, %d of %d", stage.config.adapter, number + 1, len(stages))
            progress = StageProgress(context.progress, before, sum(steps[number + 1 :]))
            with named(stage.config):
                tune(stage.config, replace(context, progress=progress), stage.base, stage.data, shared=shared)
            context.stop.release(before + steps[number])
            known = _agreed(context, stage)
            # The trainer of the last stage refers to itself, and with it to its optimizer's state.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            logger.info("adapter %s is finished already, with %d steps", known.name, known.manifest.steps)
        if known is None:
            raise InternalError(f"adapter {stage.config.adapter} was written, but is not at {stage.config.run_uri}")
        finished.append(known)
    context.stop.hold()
    return shared_by_all(context, lambda: _save(config, context, finished))


def _agreed(context: RunContext, stage: Stage) -> FinishedAdapter | None:
    return shared_by_all(context, lambda: find_finished(context, stage.config))


def find_finished(context: RunContext, config: TrainerConfig) -> FinishedAdapter | None:
    """The result of a stage, if its manifest is of this job and configuration, all files that it lists are there, and
    it meets the gates: what missed them was written as well, and is judged again, as that of a job of its own."""
    uri = S3Uri.parse(config.run_uri)
    try:
        content = context.store.get_bytes(uri.child(MANIFEST))
        manifest = ResultManifest.model_validate_json(content)
        same = TrainerConfig.model_validate(manifest.configuration).resume_digest() == config.resume_digest()
    except InputMissing:
        return None
    except ValidationError as error:
        logger.warning("%s cannot be read, so the adapter is trained anew: %s", uri.child(MANIFEST), error)
        return None
    if not (same and manifest.uid == config.job.uid and is_complete(context.store, uri, manifest)):
        return None
    metrics = manifest.evaluation.tuned if manifest.evaluation is not None else {}
    if missed := missed_gates(config.evaluation, metrics):
        logger.warning("adapter %s missed a gate before: %s", config.adapter, "; ".join(missed))
        return None
    assert config.adapter is not None
    return FinishedAdapter(config.adapter, manifest, hashlib.sha256(content).hexdigest(), len(content))


def _save(config: TrainerConfig, context: RunContext, finished: Sequence[FinishedAdapter]) -> RunResult:
    """Write the job's manifest once everything is there that it lists, and make it the latest one."""
    files: list[FileEntry] = []
    for one in finished:
        folder = f"adapters/{one.name}"
        files += [entry.model_copy(update={"path": f"{folder}/{entry.path}"}) for entry in one.manifest.files]
        files.append(FileEntry(path=f"{folder}/{MANIFEST}", size_bytes=one.size_bytes, sha256=one.sha256))
    last = finished[-1].manifest
    trainable = sum(one.manifest.trainable_parameters for one in finished)
    manifest = last.model_copy(
        update={
            "attempt": config.job.attempt,
            "created_at": now(),
            "data": combined([one.manifest.data for one in finished]),
            "config_sha256": config.digest(),
            "configuration": config.model_dump(by_alias=True, mode="json"),
            "trained_parameters": (),
            "trainable_parameters": trainable,
            "steps": sum(one.manifest.steps for one in finished),
            "epochs": sum(one.manifest.epochs for one in finished),
            "evaluation": None,
            "merged": None,
            "notes": tuple(f"{one.name}: {note}" for one in finished for note in one.manifest.notes),
            "adapters": tuple(_record(one) for one in finished),
            "files": tuple(files),
        }
    )
    sha256 = context.store.put_manifest(S3Uri.parse(config.run_uri), tuple(files), manifest.to_json().encode())
    name_run(config, context.store, sha256, now())
    return RunResult(
        uri=config.run_uri,
        manifest_sha256=sha256,
        size_bytes=sum(entry.size_bytes for entry in files),
        trainable_parameters=trainable,
        total_parameters=last.total_parameters,
        adapters=tuple(
            AdapterResult(
                name=one.name,
                trainable_parameters=one.manifest.trainable_parameters,
                metrics=one.manifest.evaluation.tuned if one.manifest.evaluation is not None else {},
            )
            for one in finished
        ),
    )


def _record(one: FinishedAdapter) -> AdapterRecord:
    return AdapterRecord(
        name=one.name,
        manifest_sha256=one.sha256,
        trainable_parameters=one.manifest.trainable_parameters,
        steps=one.manifest.steps,
        evaluation=one.manifest.evaluation,
    )


def combined(reports: Sequence[DataReport]) -> DataReport:
    """Counts added up; the digest of the digests; formats one after the other."""
    counted = [name for name, info in DataReport.model_fields.items() if info.annotation is int]
    return DataReport.model_validate(
        {
            **{name: sum(getattr(report, name) for report in reports) for name in counted},
            "sha256": hashlib.sha256("\n".join(report.sha256 for report in reports).encode()).hexdigest(),
            "format": ", ".join(dict.fromkeys(report.format for report in reports)),
        }
    )
