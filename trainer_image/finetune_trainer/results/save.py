"""From a trained model to a result that exists: written, uploaded, read back, and only then the latest one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerState

from finetune_trainer.context import RunContext
from finetune_trainer.contract import (
    EvaluationResult,
    FileEntry,
    MergeReport,
    ModelLayout,
    ResultManifest,
    RunResult,
    Selection,
    TrainerConfig,
)
from finetune_trainer.contract.manifest import BaseModelRecord
from finetune_trainer.data import PreparedData
from finetune_trainer.evaluation import Judgement, check_gates
from finetune_trainer.methods import TunedModel
from finetune_trainer.results.artefact import BaseReference, artifact_of, export
from finetune_trainer.results.card import write_card
from finetune_trainer.results.licence import licence_of
from finetune_trainer.results.merge import merge
from finetune_trainer.results.pointers import MERGED, name_run
from finetune_trainer.results.verify import verify_loads
from finetune_trainer.results.versions import library_versions
from finetune_trainer.storage import S3Uri


@dataclass(frozen=True)
class Base:
    """The model to tune, before its weights are read."""

    folder: Path
    revision: str | None
    """The revision that was loaded, where the source has revisions."""
    config: PreTrainedConfig
    layout: ModelLayout
    selection: Selection
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    tuned: TunedModel
    state: TrainerState
    data: PreparedData
    before: Judgement | None
    after: Judgement

    def evaluation(self) -> EvaluationResult | None:
        """The metrics for the manifest; None without held-out data."""
        tuned = self.after.metrics()
        if not tuned:
            return None
        return EvaluationResult(
            base=self.before.metrics() if self.before is not None else None,
            tuned=tuned,
            samples=self.after.samples,
            tokens=self.after.scores.tokens if self.after.scores is not None else 0,
        )


def save_result(config: TrainerConfig, context: RunContext, base: Base, outcome: Outcome, folder: Path) -> RunResult:
    """Write the artefact, upload it with its manifest last, read it back, and make it the latest one.

    Raises UsageError with reason `GateNotMet` where a gate failed: the artefact is then kept, but not the latest.
    """
    reference = BaseReference(config.model.uri, base.revision or config.model.revision)
    artefact = export(outcome.tuned, base.layout, config, base.tokenizer, reference, folder)
    verify_loads(artefact, artifact_of(config.method), base.layout, base.config)
    merged = merge(outcome.tuned, config, base.tokenizer, base.folder, folder)
    evaluation = outcome.evaluation()
    _write_evaluation(config, outcome, evaluation, folder)
    described = _manifest(config, base, outcome, evaluation, merged)
    write_card(folder, described, config)

    def manifest(files: Sequence[FileEntry]) -> bytes:
        return described.model_copy(update={"files": tuple(files)}).to_json().encode()

    # Another attempt would have to evaluate again: from here on the result is finished, stop or not.
    context.stop.hold()
    uri = S3Uri.parse(config.run_uri)
    uploaded = context.store.put_tree(folder, uri, manifest, read_back=True)
    check_gates(config.evaluation, outcome.after)
    if config.adapter is None:
        name_run(config, context.store, uploaded.manifest_sha256, now())
    return RunResult(
        uri=config.run_uri,
        manifest_sha256=uploaded.manifest_sha256,
        size_bytes=uploaded.size_bytes,
        trainable_parameters=outcome.tuned.trainable,
        total_parameters=base.layout.total,
        evaluation=evaluation,
        merged_uri=f"{config.run_uri}/{MERGED}" if merged is not None else None,
    )


def _write_evaluation(
    config: TrainerConfig, outcome: Outcome, evaluation: EvaluationResult | None, folder: Path
) -> None:
    """`evaluation.json`: the metrics, and what both models answer to the first held-out prompts; where answers were
    compared with given ones, all of them in `predictions.jsonl`."""
    after = outcome.after.answers
    prompts = outcome.data.generation_prompts[: len(after)]
    before = outcome.before.answers if outcome.before is not None else (None,) * len(prompts)
    predictions: list[dict[str, Any]] = [
        {"prompt": prompt.messages, "reference": prompt.reference, "base": base, "tuned": tuned}
        for prompt, base, tuned in zip(prompts, before, after, strict=True)
    ]
    if outcome.after.text:
        lines = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
        (folder / "predictions.jsonl").write_text(lines, encoding="utf-8")
    generations = predictions[: config.evaluation.generations]
    content = {
        "metrics": None if evaluation is None else evaluation.model_dump(by_alias=True, mode="json", exclude_none=True),
        "generations": generations,
    }
    (folder / "evaluation.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _manifest(
    config: TrainerConfig,
    base: Base,
    outcome: Outcome,
    evaluation: EvaluationResult | None,
    merged: MergeReport | None,
) -> ResultManifest:
    """All but the files, which are known once they are uploaded."""
    losses = [float(entry["loss"]) for entry in outcome.state.log_history if "loss" in entry]
    return ResultManifest(
        job=f"{config.job.namespace}/{config.job.name}",
        uid=config.job.uid,
        attempt=config.job.attempt,
        created_at=now(),
        method=config.method.value,
        artifact=artifact_of(config.method),
        base_model=BaseModelRecord(
            uri=config.model.uri,
            revision=base.revision,
            config_sha256=hashlib.sha256((base.folder / "config.json").read_bytes()).hexdigest(),
            architecture=(base.config.architectures or [type(base.config).__name__])[0],
            parameters=base.layout.total,
            licence=licence_of(base.folder),
        ),
        data=outcome.data.report,
        config_sha256=config.digest(),
        trained_parameters=(*outcome.tuned.adapters, *base.selection.parameters),
        trainable_parameters=outcome.tuned.trainable,
        total_parameters=base.layout.total,
        steps=outcome.state.global_step,
        epochs=float(outcome.state.epoch or 0.0),
        train_loss=losses[-1] if losses else 0.0,
        evaluation=evaluation,
        merged=merged,
        configuration=config.model_dump(by_alias=True, mode="json", exclude_none=True),
        versions=library_versions(),
        notes=(*base.selection.notes, *outcome.data.notes),
        files=(),
    )


def now() -> str:
    """UTC, RFC 3339."""
    return datetime.now(UTC).isoformat(timespec="seconds")
