"""Whatever stands in a status, a manifest or a config.json: it is shown, or it is said what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.dashboard import views
from finetune_operator.dashboard.checking import BadRequest, NoReader, Question, check
from finetune_operator.dashboard.memory import JobMemory
from finetune_operator.dashboard.source import JobRecord
from finetune_operator.excerpts import observed_job
from finetune_operator.settings import Settings
from tests.dashboard import jobs

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
STATUS_WORDS = ["phase", "conditions", "progress", "attempts", "last", "plan", "result", "type", "reason", "evaluation"]
SPEC_WORDS = ["model", "uri", "method", "resources", "gpus", "gpuMemory", "scheduling", "queue", "trainer", "training"]


def trees(words: list[str]) -> st.SearchStrategy[Any]:
    """JSON whose names are those that matter."""
    return st.recursive(
        SCALARS | st.sampled_from(["Running", "Failed", "80Gi", "9" * 400 + "Gi", "True"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(words), inner, max_size=5),
        max_leaves=15,
    )


@given(trees(STATUS_WORDS), trees(SPEC_WORDS), st.integers(0, 2**31))
def test_any_job_is_shown(status: Any, spec: Any, created: int) -> None:
    made = jobs.job("odd") | {"status": status, "spec": spec}
    job = observed_job(made)
    memory = JobMemory()
    memory.look(job.status)
    for shown in (views.row(job), views.page(JobRecord(job, memory, gpu_memory=created))):
        json.loads(json.dumps(shown, allow_nan=False))


FAMILIES = ["llama", "qwen3", "gpt2", "mixtral", "gemma3", "falcon", "phi3", "x"]
NUMBERS = {name: value for name, value in jobs.LLAMA.items() if type(value) is int}
CONFIG = st.fixed_dictionaries(
    {"model_type": st.sampled_from(FAMILIES)},
    optional={name: SCALARS | st.integers(1, 2**31) | st.just(value) for name, value in NUMBERS.items()},
)
WHOLE = st.builds(lambda odd: {**jobs.LLAMA, **odd}, CONFIG)


@given(CONFIG | WHOLE)
def test_any_config_is_planned_or_refused(config: Any) -> None:
    manifest = jobs.job("qa")
    del manifest["status"]
    answer = check(Question(json.dumps(manifest), config), Settings(), NoReader()).to_wire()
    assert answer["valid"] == (answer["plan"] is not None)
    assert answer["valid"] or all(answer["problems"])
    json.dumps(answer, allow_nan=False)


@given(trees(["apiVersion", "kind", "metadata", "name", "spec", *SPEC_WORDS]) | st.text(max_size=60))
def test_any_manifest_is_answered(manifest: Any) -> None:
    body = json.dumps({"manifest": manifest, "config": None}).encode()
    try:
        question = Question.parse(body)
    except BadRequest:
        return
    answer = check(question, Settings(), NoReader()).to_wire()
    assert not answer["valid"] and all(answer["problems"])


@given(st.binary(max_size=200))
def test_any_body_is_answered(body: bytes) -> None:
    try:
        check(Question.parse(body), Settings(), NoReader())
    except BadRequest as error:
        assert str(error)
