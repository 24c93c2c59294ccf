"""The API's rules on the Python side; tests/apiserver runs the same table against a real API server."""

from __future__ import annotations

import re
from typing import Any

import pytest

from finetune_operator.api.parse import parse_manifest
from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.api.v1alpha1.names import NAME_RULES
from finetune_operator.api.v1alpha1.rules import IMMUTABLE, RULES, refused_changes
from finetune_operator.errors import InvalidManifest
from tests.unit.api.accepted_cases import ACCEPTED
from tests.unit.api.change_cases import ALLOWED_CHANGES, CHANGES, IMMUTABLE_WORDS
from tests.unit.api.field_cases import BROKEN_FIELDS, UNKNOWN_FIELDS
from tests.unit.api.manifests import MINIMAL, Accepted, Refused, manifest, merged
from tests.unit.api.refused_cases import BROKEN_RULES


def problems_of(data: dict[str, object]) -> list[str]:
    with pytest.raises(InvalidManifest) as caught:
        parse_manifest(data)
    return caught.value.problems


@pytest.mark.parametrize("case", BROKEN_RULES, ids=lambda case: case.id)
def test_a_broken_rule_is_explained_in_its_exact_words(case: Refused) -> None:
    assert f"{case.field}: {case.words}" in problems_of(case.manifest)


@pytest.mark.parametrize("case", [*BROKEN_FIELDS, *UNKNOWN_FIELDS], ids=lambda case: case.id)
def test_a_wrong_field_is_the_only_problem_and_is_explained(case: Refused) -> None:
    (problem,) = problems_of(case.manifest)
    assert problem.startswith(case.field)
    assert case.words in problem


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.id)
def test_valid_manifests_are_accepted(case: Accepted) -> None:
    assert parse_manifest(case.manifest).name == case.name


@pytest.mark.parametrize(
    ("adapter", "problem"),
    [
        (
            {"layers": {"last": 1, "ids": [2]}},
            "spec.adapters[1].layers: more than one selector; set exactly one of last, first, ids, ranges, every, all",
        ),
        ({"dataset": {}}, "spec.adapters[1].dataset: set exactly one of uri and sources"),
        (
            {"training": {"scheduler": "linear", "schedulerOptions": {"cycles": 2}}},
            "spec.adapters[1].training.schedulerOptions.cycles: cycles is for scheduler cosine_with_restarts; remove "
            "it, or change scheduler linear",
        ),
        ({"lora": {"variant": "loftq"}}, "spec.adapters[1].lora.variant: loftq makes up for"),
    ],
)
def test_an_adapters_own_words_keep_the_rules(adapter: dict[str, Any], problem: str) -> None:
    (found,) = problems_of(manifest(adapters=[{"name": "a"}, {"name": "b", **adapter}]))
    assert found.startswith(problem)


def test_every_rule_has_a_case() -> None:
    said = {(case.field.removeprefix("spec."), case.words) for case in BROKEN_RULES}
    for rule in RULES:
        if rule.message == "use 'auto' or a number of at least 1":
            continue  # the type of the field says it on this side; BROKEN_FIELDS has it for the API server
        assert any(rule.field == field and same_but_for_values(rule.message, words) for field, words in said), (
            f"no case for {rule.field}: {rule.message}"
        )
    for name_rule in NAME_RULES:
        assert ("metadata.name", name_rule.message) in said


def same_but_for_values(template: str, words: str) -> bool:
    pattern = "".join(".+" if i % 2 else re.escape(part) for i, part in enumerate(re.split(r"\{([\w.]+)\}", template)))
    return re.fullmatch(pattern, words) is not None


@pytest.mark.parametrize(("change", "field"), [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_a_change_after_creation_is_refused(change: dict[str, object], field: str) -> None:
    old, new = (FineTuneJobSpec.model_validate(m["spec"]) for m in (MINIMAL, merged(MINIMAL, {"spec": change})))
    assert f"{field}: {IMMUTABLE_WORDS}" in refused_changes(old, new)
    assert f"{field}: {IMMUTABLE_WORDS}" in refused_changes(new, old)


@pytest.mark.parametrize("change", ALLOWED_CHANGES, ids=str)
def test_run_policy_may_change(change: dict[str, object]) -> None:
    old, new = (FineTuneJobSpec.model_validate(m["spec"]) for m in (MINIMAL, merged(MINIMAL, {"spec": change})))
    assert refused_changes(old, new) == []


def test_every_field_but_run_policy_is_immutable_and_has_a_case() -> None:
    names = {info.alias for info in FineTuneJobSpec.model_fields.values()}
    assert set(IMMUTABLE) == names - {"runPolicy"}
    assert {field.removeprefix("spec.") for _, _, field in CHANGES} == set(IMMUTABLE)


def test_every_broken_rule_of_a_manifest_is_told() -> None:
    problems = problems_of(manifest(method="full", lora={}, layers={"last": 1, "first": 1}))
    assert [problem.partition(":")[0] for problem in problems] == ["spec.layers", "spec.lora"]
