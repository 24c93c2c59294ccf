"""Checks a manifest as `finetune validate` does, and plans it where that needs no network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_operator.api.base import quantity_to_bytes
from finetune_operator.api.documents import MAX_BYTES as MAX_TEXT
from finetune_operator.api.parse import load_manifests
from finetune_operator.api.v1alpha1 import FineTuneJob, FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.errors import FinetuneError, InvalidManifest, ModelConfigUnavailable
from finetune_operator.excerpts import observed_job
from finetune_operator.observed import JobRef
from finetune_operator.planner import plan_job
from finetune_operator.planning import ModelConfigReader, Preparer
from finetune_operator.settings import Settings
from finetune_operator.yaml_text import dump

MAX_BYTES = 192 * 1024
"""Of a request: a manifest, with a chat template perhaps, and a model's `config.json`."""
_SOURCE = ""
_NOT_HERE = "not read here: paste the model's config.json to see the plan"


class BadRequest(FinetuneError):
    """A request that is not of the form that the front end sends."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be checked."""

    text: str
    """The manifest."""
    config: Mapping[str, Any] | None = None
    """The model's `config.json`, where the user gave it."""

    @classmethod
    def parse(cls, body: bytes) -> Question:
        """Read a request: `{"manifest": text or object, "config": text or null}`. Raises BadRequest."""
        try:
            document = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BadRequest("the request is not JSON") from error
        if not isinstance(document, dict) or not isinstance(document.get("manifest"), str | dict):
            raise BadRequest('the request is not {"manifest": ..., "config": ...}')
        manifest = document["manifest"]
        try:
            text = manifest if isinstance(manifest, str) else dump(manifest)
        except (RecursionError, ValueError) as error:
            raise BadRequest(f"the manifest cannot be written as YAML: {error}") from error
        if len(text) > MAX_TEXT:
            # Each line of a deep object is indented: a small request would have an answer of many megabytes.
            raise BadRequest("the manifest is larger than 1 MiB as YAML; it refers to models and data by URI")
        return cls(text, _config(document.get("config")))


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of it."""

    text: str
    problems: list[str] = field(default_factory=list)
    plan: Mapping[str, Any] | None = None
    gpu_memory: int | None = None
    note: str = ""

    def to_wire(self) -> dict[str, Any]:
        """As it is sent."""
        return {
            "valid": not self.problems,
            "problems": self.problems,
            "text": self.text,
            "plan": self.plan,
            "gpuMemory": self.gpu_memory,
            "note": self.note,
        }


class NoReader:
    """A `planning.ModelConfigReader` that reads nothing."""

    async def __call__(self, ref: JobRef, spec: FineTuneJobSpec) -> Mapping[str, Any]:
        """Raises ModelConfigUnavailable."""
        raise ModelConfigUnavailable(f"spec.model.uri: {spec.model.uri}: {_NOT_HERE}")


@dataclass(frozen=True, slots=True)
class _Pasted:
    config: Mapping[str, Any]

    async def __call__(self, ref: JobRef, spec: FineTuneJobSpec) -> Mapping[str, Any]:
        return self.config


def check(question: Question, settings: Settings, reader: ModelConfigReader) -> Answer:
    """Check a manifest, and plan it.

    Args:
        question: what a user wrote.
        settings: permissions and GPUs that it is judged by.
        reader: asked for the model's configuration where the question has none; it must not use the network.
    """
    try:
        jobs = load_manifests(question.text, source=_SOURCE)
    except InvalidManifest as error:
        return Answer(question.text, error.problems)
    if len(jobs) > 1:
        return Answer(question.text, note=f"{len(jobs)} jobs; a plan is shown for one")
    return _planned(question, jobs[0], settings, reader)


def _planned(question: Question, job: FineTuneJob, settings: Settings, reader: ModelConfigReader) -> Answer:
    observed = observed_job(job.to_manifest())
    read = _Pasted(question.config) if question.config is not None else reader
    preparation, spec = asyncio.run(Preparer(settings, read, plan_job).prepare(observed, FineTuneJobStatus()))
    for fact in (preparation.accepted, preparation.planned):
        if fact is not None and fact.status == "False":
            return Answer(question.text, fact.message.split("\n"))
    assert spec is not None and preparation.planned is not None and preparation.plan is not None
    resources = spec.resources
    memory = resources.gpu_memory or settings.trainer.gpu_memory_of(resources.gpu_resource)
    return Answer(
        question.text,
        plan=preparation.plan.to_wire(),
        gpu_memory=quantity_to_bytes(memory) if resources.gpus else None,
        note=preparation.planned.message,
    )


def _config(value: object) -> Mapping[str, Any] | None:
    if value is None or value == "":
        return None
    try:
        config = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise BadRequest("config.json is not a JSON object")
    return config
