"""The generated CustomResourceDefinition: what a structural schema may hold, and that nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator import constants as c
from finetune_operator.api import crd
from finetune_operator.api.v1alpha1 import FineTuneJob, FineTuneJobSpec
from finetune_operator.api.v1alpha1.names import NAME_RULES
from finetune_operator.api.v1alpha1.rules import IMMUTABLE, RULES
from tests.unit.api.manifests import MINIMAL

VERSION = crd.manifest()["spec"]["versions"][0]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
SPEC = SCHEMA["properties"]["spec"]
STATUS = SCHEMA["properties"]["status"]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[]")


def at(path: str) -> dict[str, Any]:
    found = dict(nodes(SCHEMA))
    return found[path]


def test_the_schema_is_structural() -> None:
    for path, node in nodes(SCHEMA):
        assert not node.keys() & {"$ref", "anyOf", "oneOf", "allOf", "title", "const", "propertyNames"}, path
        if node.get("x-kubernetes-int-or-string"):
            assert "type" not in node, path
        else:
            assert isinstance(node.get("type"), str), path
        assert not ("properties" in node and "additionalProperties" in node), path
        for bound in ("exclusiveMinimum", "exclusiveMaximum"):
            assert node.get(bound, True) is True, f"{path}: OpenAPI v3.0 has {bound} as a boolean"
        assert set(node.get("required", ())) <= node.get("properties", {}).keys(), path


def test_every_field_says_what_it_is() -> None:
    undescribed = [path for path, node in nodes(SCHEMA) if "description" not in node and not path.endswith("[]")]
    assert undescribed == [".metadata", ".metadata.name"]
    assert "\n" not in "".join(node.get("description", "") for _, node in nodes(SCHEMA))


def test_everything_that_a_rule_reads_is_bounded() -> None:
    """An unbounded list, map or text under a rule is refused for its estimated cost."""
    for path, node in nodes(SPEC, ".spec"):
        if node.get("x-kubernetes-preserve-unknown-fields") or "enum" in node:
            continue
        if node.get("type") == "array":
            assert "maxItems" in node, path
        if node.get("type") == "string":
            assert "maxLength" in node, path
        if "additionalProperties" in node:
            assert "maxProperties" in node, path


def filled(schema: dict[str, Any], value: Any) -> Any:
    """What the API server makes of a value: defaults, level by level (Kubernetes, "Defaulting")."""
    if isinstance(value, list):
        return [filled(schema["items"], entry) for entry in value]
    if not isinstance(value, dict) or "properties" not in schema:
        return value
    result = dict(value)
    for name, child in schema["properties"].items():
        if name not in result and "default" in child:
            result[name] = child["default"]
        if name in result:
            result[name] = filled(child, result[name])
    return result


def test_the_servers_defaults_are_pythons() -> None:
    spec = filled(SPEC, MINIMAL["spec"])
    assert spec == FineTuneJobSpec.model_validate(MINIMAL["spec"]).to_wire()
    assert spec["parallelism"]["offload"] == {"optimizer": "none", "parameters": "none"}
    assert spec["scheduling"]["nodeSelector"] == {}
    given = {**MINIMAL["spec"], "lora": {}, "quantization": {}, "layers": {"unfreeze": {"every": 1}}, "method": "full"}
    assert filled(SPEC, given)["layers"]["unfreeze"] == {"every": 1, "unit": "step", "order": "top-down"}


def test_status_has_no_defaults() -> None:
    assert [path for path, node in nodes(STATUS) if "default" in node] == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (".spec.training.epochs", {"minimum": 0, "exclusiveMinimum": True, "maximum": 10_000, "format": "double"}),
        (".spec.lora.dropout", {"minimum": 0, "maximum": 1, "exclusiveMaximum": True, "default": 0.0}),
        (".spec.training.seed", {"type": "integer", "format": "int32", "default": 42}),
        (".spec.training.maxSteps", {"type": "integer", "format": "int64", "minimum": 1}),
        (".spec.parallelism.zeroStage", {"type": "integer", "enum": [1, 2, 3]}),
        (".spec.layers.all", {"type": "boolean", "enum": [True]}),
        (".spec.layers.ids", {"type": "array", "minItems": 1, "maxItems": 1024}),
        (".spec.trainer.podTemplate", {"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
        (".spec.scheduling.tolerations[]", {"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
        (".spec.resources.cpu", {"x-kubernetes-int-or-string": True, "default": "8", "minimum": 0}),
        (".spec.training.microBatchSize", {"x-kubernetes-int-or-string": True, "default": "auto", "maximum": 65_536}),
        (".status.conditions", {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
        (".status.startTime", {"type": "string", "format": "date-time"}),
        (".status.plan.memoryPerGPU.total", {"type": "integer", "format": "int64"}),
        (".status.result.evaluation.tuned[]", {"type": "number"}),
    ],
)
def test_fields_become_what_openapi_has_for_them(path: str, expected: dict[str, Any]) -> None:
    node = at(path)
    assert {key: node.get(key) for key in expected} == expected


def test_absent_is_how_a_null_default_is_written() -> None:
    for path in (".spec.lora", ".spec.layers", ".spec.layers.last", ".spec.training.maxSteps"):
        assert "default" not in at(path)
    assert "required" not in at(".spec.layers")
    assert SPEC["required"] == ["model", "dataset", "output"]
    assert SCHEMA["required"] == ["spec"]


def test_every_rule_and_every_immutable_field_is_in_it() -> None:
    validations = SPEC["x-kubernetes-validations"]
    assert [v["rule"] for v in validations[: len(RULES)]] == [rule.cel for rule in RULES]
    assert [v["fieldPath"] for v in validations] == [f".{f}" for f in [*(r.field for r in RULES), *IMMUTABLE]]
    assert all("oldSelf" in v["rule"] for v in validations[len(RULES) :])
    assert [v["rule"] for v in SCHEMA["x-kubernetes-validations"]] == [rule.cel for rule in NAME_RULES]
    known = dict(nodes(SCHEMA))
    assert all(f".spec{v['fieldPath']}" in known for v in validations)


def test_a_message_with_values_has_an_expression_and_a_text_without() -> None:
    entry = next(v for v in SPEC["x-kubernetes-validations"] if v["fieldPath"] == ".training.batchSize")
    assert entry["message"] == "batchSize training.batchSize is not divisible by gpus resources.gpus; use a multiple"
    assert entry["messageExpression"] == (
        "'batchSize %s is not divisible by gpus %s; use a multiple'"
        ".format([self.training.batchSize, self.resources.gpus])"
    )


def test_columns_and_selectable_fields_name_fields_of_the_schema() -> None:
    known = dict(nodes(SCHEMA))
    columns = {column["name"]: column for column in VERSION["additionalPrinterColumns"]}
    assert [name for name, column in columns.items() if not column.get("priority")] == (
        ["Phase", "Method", "Model", "Progress", "Loss", "GPUs", "Age"]
    )
    assert [name for name, column in columns.items() if column.get("priority") == 1] == (
        ["Attempt", "Tokens/s", "ETA", "Result"]
    )
    for column in columns.values():
        assert column["name"] == "Age" or known[column["jsonPath"]]["type"] == column["type"]
    paths = [entry["jsonPath"] for entry in VERSION["selectableFields"]]
    assert {".spec.method", ".status.phase"} <= set(paths)
    assert len(paths) <= 8 and all(known[path]["type"] in ("string", "boolean", "integer") for path in paths)


def test_names_are_those_that_the_operator_uses() -> None:
    spec = crd.manifest()["spec"]
    assert spec["names"]["shortNames"] == [c.SHORT_NAME] == ["ftj"]
    assert crd.manifest()["metadata"]["name"] == "finetunejobs.finetune.dev"
    assert VERSION["subresources"] == {"status": {}}


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "one type for each field"),
        ({"type": "string", "contentEncoding": "base64"}, "contentEncoding"),
        ({"type": "object", "propertyNames": {"pattern": "x"}}, "only the length"),
    ],
)
def test_what_cannot_be_expressed_is_refused_and_not_dropped(node: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        crd.structural(node, {}, defaults=True)


def test_the_text_is_the_same_every_time_and_yaml() -> None:
    text = crd.render()
    assert text == crd.render()
    assert yaml.safe_load(text) == crd.manifest()
    assert "&id" not in text and "*id" not in text


def test_the_command_writes_checks_and_finds_a_stale_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    path = folder / "finetune.dev_finetunejobs.yaml"
    assert crd.main([str(folder), "--check"]) == 1
    assert "run `make crds`" in capsys.readouterr().err
    assert not path.exists()
    assert crd.main([str(folder)]) == 0
    assert path.read_text() == crd.render()
    assert crd.main([str(folder), "--check"]) == 0
    path.write_text(path.read_text().replace("ftj", "ftx"))
    assert crd.main([str(folder), "--check"]) == 1


def test_what_is_in_the_repository_is_fresh() -> None:
    assert crd.main([str(Path(__file__).parents[3] / "crds"), "--check"]) == 0


def test_the_types_still_give_what_the_schema_was_made_of() -> None:
    assert SPEC["properties"].keys() == {info.alias for info in FineTuneJobSpec.model_fields.values()}
    assert SCHEMA["properties"].keys() == {info.alias or name for name, info in FineTuneJob.model_fields.items()}
