"""Every field of a FineTuneJob, from the schema that the API server checks with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from documentation.markdown import code, inline, page, table
from finetune_operator.api import crd
from finetune_operator.api.v1alpha1.names import NAME_RULES
from finetune_operator.api.v1alpha1.rules import IMMUTABLE, RULES

Schema = Mapping[str, Any]

EXAMPLES = {
    "spec.model": "model: {uri: hf://meta-llama/Llama-3.1-8B-Instruct, tokenSecretRef: {name: hf}}",
    "spec.dataset": "dataset: {uri: s3://data/qa.jsonl, maxLength: 2048, validation: {fraction: 0.05}}",
    "spec.dataset.sources": "sources: [{uri: s3://data/a.jsonl, weight: 2}, {uri: s3://data/b.jsonl, maxSamples: 500}]",
    "spec.dataset.columns": "columns: {prompt: question, response: answer}",
    "spec.dataset.tags": "tags: {roleTag: role, contentTag: content, userTag: user, assistantTag: assistant}",
    "spec.dataset.validation": "validation: {count: 500}",
    "spec.dataset.cleaning": "cleaning: {nearDuplicates: 0.8, minCharacters: 20}",
    "spec.layers": "layers: {last: 8, modules: [mlp, q_proj, v_proj], also: [norm]}",
    "spec.layers.unfreeze": "unfreeze: {every: 200, unit: step, order: top-down}",
    "spec.lora": "lora: {rank: 16, alpha: 32, variant: dora}",
    "spec.prompt": "prompt: {virtualTokens: 30, projection: true}",
    "spec.quantization": "quantization: {type: nf4, doubleQuant: true}",
    "spec.training": "training: {epochs: 3, learningRate: 2.0e-4, batchSize: 128}",
    "spec.parallelism": "parallelism: {strategy: fsdp}",
    "spec.parallelism.offload": "offload: {optimizer: cpu}",
    "spec.resources": "resources: {gpus: 4, gpuMemory: 80Gi, memory: 256Gi}",
    "spec.scheduling": "scheduling: {queue: team-a, nodeSelector: {gpu: h100}}",
    "spec.output": "output: {uri: s3://models/qa, s3: {endpoint: https://s3.example.com, secretRef: {name: s3}}}",
    "spec.evaluation": "evaluation: {metrics: [perplexity, rouge], gates: [{metric: perplexity, max: 12}]}",
    "spec.adapters": "adapters: [{name: support}, {name: sales, lora: {rank: 32}}]",
    "spec.checkpoints": "checkpoints: {every: 200, keep: 3}",
    "spec.runPolicy": "runPolicy: {retries: 5, activeDeadlineSeconds: 86400}",
    "spec.trainer": "trainer: {image: registry.example.com/trainer:1}",
}
"""One line of YAML for a section; a test applies each to a job."""


def anchor(path: str) -> str:
    """Where a field is on the page: `spec.layers.last` at `#spec-layers-last`."""
    return path.replace("[]", "").replace(".", "-").lower()


def sections(path: str, schema: Schema) -> Iterator[tuple[str, Schema]]:
    """Every object with fields of its own, outer ones first."""
    yield path, schema
    for name, child in schema["properties"].items():
        inner = child.get("items", child)
        if inner.get("properties"):
            yield from sections(f"{path}.{name}" + ("[]" if "items" in child else ""), inner)


def kind_of(schema: Schema) -> str:
    """The type of a field in words."""
    if schema.get("x-kubernetes-int-or-string"):
        return "number or text"
    if schema.get("type") == "array":
        return f"list of {kind_of(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), Mapping):
        return f"map of {kind_of(schema['additionalProperties'])}"
    kind = str(schema.get("type", "anything"))
    return {"string": "text", "boolean": "true or false"}.get(kind, kind)


def allowed(schema: Schema) -> str:
    """What values a field takes, beside its type."""
    inner = schema.get("items", schema)
    words = [", ".join(code(one) for one in inner["enum"])] if "enum" in inner else []
    for key, exclusive, sign in (("minimum", "exclusiveMinimum", ">"), ("maximum", "exclusiveMaximum", "<")):
        if key in inner and not inner.get("x-kubernetes-int-or-string"):
            words.append(f"{sign}{'' if inner.get(exclusive) else '='} {inner[key]:,}")
    for key, unit in (("maxItems", "entries"), ("maxProperties", "keys"), ("maxLength", "characters")):
        if key in schema and "enum" not in schema:
            words.append(f"at most {schema[key]:,} {unit}")
    if "pattern" in schema:
        words.append(f"pattern {code(schema['pattern'])}")
    return "; ".join(words)


def default_of(name: str, schema: Schema, owner: Schema) -> str:
    """The default, or that there has to be a value."""
    if name in owner.get("required", ()):
        return "**required**"
    if "default" not in schema or schema["default"] == {}:
        return ""
    value = schema["default"]
    text = str(value).lower() if isinstance(value, bool) else value
    return code('""' if text == "" else text)


def _rules(path: str) -> str:
    """The rules that blame a section or its fields; each stands in one section, the innermost."""
    own = path.removeprefix("spec").removeprefix(".")
    found = [(rule.field, rule.static_message) for rule in RULES if _section_of(rule.field) == own]
    if not found:
        return ""
    return "Rules:\n\n" + "\n".join(f"- {code(f'spec.{field}')}: {inline(text)}" for field, text in found)


def _section_of(field: str) -> str:
    objects = {path.removeprefix("spec").removeprefix(".") for path, _ in _spec_sections()}
    return field if field in objects else field.rpartition(".")[0]


@cache
def _spec_sections() -> tuple[tuple[str, Schema], ...]:
    return tuple(sections("spec", crd.openapi_schema()["properties"]["spec"]))


def _section(path: str, schema: Schema) -> str:
    rows = [
        (
            f'<a id="{anchor(f"{path}.{name}")}"></a>{code(name)}',
            kind_of(child),
            default_of(name, child, schema),
            " ".join(filter(None, (child.get("description", ""), _limits(child)))),
        )
        for name, child in schema["properties"].items()
    ]
    example = EXAMPLES.get(path.replace("[]", ""))
    parts = [
        f"## {path} {{ #{anchor(path)} }}",
        schema.get("description", ""),
        f"```yaml\n{example}\n```" if example else "",
        table(("Field", "Type", "Default", "Meaning"), rows),
        _rules(path) if path.startswith("spec") else "",
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part)


def _limits(schema: Schema) -> str:
    found = allowed(schema)
    return f"*Values: {found}.*" if found else ""


def fields_page() -> str:
    """The page."""
    status = crd.openapi_schema()["properties"]["status"]
    immutable = ", ".join(code(name) for name in IMMUTABLE)
    names = "\n".join(f"- {code('metadata.name')}: {inline(rule.message)}" for rule in NAME_RULES)
    return page(
        "Fields of FineTuneJob",
        "Made from the schema that the API server checks with. What a rule says is what the API server and "
        "`finetune validate` answer; both have it from one table.",
        f"Once a job is created, {code('spec.runPolicy')} may change, and nothing else of the spec: {immutable} stay. "
        "Status is the operator's.",
        names,
        *(_section(path, schema) for path, schema in _spec_sections()),
        *(_section(path, schema) for path, schema in sections("status", status)),
    )
