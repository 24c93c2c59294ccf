"""The form has every field of the API, as the API has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from finetune_operator.api.fields import model_in, wire_fields
from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.dashboard.form import FIRST, form
from finetune_trainer.contract.vocabulary import Method, Scheduler


def leaves(fields: list[dict[str, Any]], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for field in fields:
        path = f"{prefix}{field['name']}"
        if field["kind"] == "group":
            yield from leaves(field["fields"], f"{path}.")
        else:
            yield path, field


def of_model(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in wire_fields(model).items():
        inner, path = model_in(info.annotation), f"{prefix}{name}"
        if inner is None or "tuple" in str(info.annotation):
            yield path
        else:
            yield from of_model(inner, f"{path}.")


FIELDS = dict(leaves(form()["fields"]))


def test_every_field_of_the_api_is_there_and_described() -> None:
    assert set(FIELDS) == set(of_model(FineTuneJobSpec))
    assert all(field["description"] for field in FIELDS.values())


def test_it_begins_with_fields_that_there_are() -> None:
    assert set(FIRST) <= set(FIELDS)


def test_choices_bounds_and_defaults_are_the_apis() -> None:
    assert FIELDS["method"]["enum"] == [one.value for one in Method]
    assert FIELDS["training.scheduler"]["enum"] == [one.value for one in Scheduler]
    assert (
        FIELDS["lora.rank"] | {"minimum": 1, "maximum": 1024, "default": 16, "kind": "integer"} == FIELDS["lora.rank"]
    )
    assert FIELDS["dataset.packing"]["kind"] == "boolean" and FIELDS["dataset.packing"]["default"] is True
    assert FIELDS["output.uri"]["required"] is True and FIELDS["output.uri"]["pattern"].startswith("^s3://")


def test_kinds_of_what_is_no_single_word() -> None:
    kinds = {path: (FIELDS[path]["kind"], FIELDS[path].get("items")) for path in FIELDS}
    assert kinds["layers.ids"] == ("list", "integer") and kinds["layers.modules"] == ("list", "text")
    assert kinds["training.microBatchSize"] == kinds["resources.memory"] == ("scalar", None)
    for path in ("dataset.sources", "evaluation.gates", "adapters", "scheduling.nodeSelector", "trainer.podTemplate"):
        assert kinds[path] == ("json", None)
