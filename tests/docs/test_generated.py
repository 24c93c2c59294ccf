"""The generated pages leave nothing out, and what they say is what the code does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from chart import values as chart_values
from documentation import commands, configuration, drawings, fields, memory, monitoring, pictures, troubles
from documentation.markdown import inline, table
from documentation.source import documented, errors_made, retries
from finetune_operator import constants
from finetune_operator.api import crd
from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.api.v1alpha1.rules import RULES
from finetune_operator.constants import Reason
from finetune_operator.failures import Failure, Retry, classify
from finetune_operator.settings import Settings
from finetune_trainer.contract import ExitCode, outcome, select
from finetune_trainer.contract.selection import LayerSelection
from tests.builders import NOW, attempt, container, deep_merged, pod

BASE: dict[str, Any] = {
    "model": {"uri": "hf://org/model"},
    "dataset": {"uri": "s3://data/x.jsonl"},
    "output": {"uri": "s3://models/x"},
}
CONTEXT: dict[str, dict[str, Any]] = {
    "spec.layers.unfreeze": {"method": "freeze", "layers": {"last": 4}},
    "spec.prompt": {"method": "prefix", "dataset": {"packing": False}},
    "spec.quantization": {"method": "qlora"},
    "spec.parallelism.offload": {"parallelism": {"strategy": "fsdp"}, "resources": {"gpus": 8}},
    "spec.evaluation": {"dataset": {"validation": {"count": 10}}},
    "spec.training": {"resources": {"gpus": 4}},
    "spec.parallelism": {"resources": {"gpus": 8}},
}
"""What some examples need beside them."""


@pytest.mark.parametrize("name", ["Reason", "Condition", "Phase"])
def test_every_word_of_a_status_is_explained(name: str) -> None:
    texts = documented(constants, name)
    words = {key for key, value in vars(getattr(constants, name)).items() if isinstance(value, str) and key.isupper()}
    assert texts.keys() >= words
    assert [key for key in sorted(words) if len(texts[key]) < 10 and key != "RUNNING"] == []
    page = troubles.errors_page()
    assert all(f"`{getattr(getattr(constants, name), key)}`" in page for key in words)


def test_every_exit_code_is_explained() -> None:
    texts = documented(outcome, "ExitCode")
    assert [one.name for one in ExitCode if not texts[one.name]] == ["OK"]


@pytest.mark.parametrize("code", [one for one in ExitCode if one is not ExitCode.OK])
def test_what_the_page_says_of_an_exit_code_is_what_follows(code: ExitCode) -> None:
    failure = classify(attempt(1, "Failed"), [pod("master", container(code=int(code)))], NOW)
    assert isinstance(failure, Failure)
    row = next(line for line in troubles.errors_page().splitlines() if line.startswith(f"| {int(code)} |"))
    assert row.endswith(f"| {troubles.FOLLOWS[failure.retry]} |")


def test_what_follows_a_reason_is_read_from_the_code() -> None:
    found = retries(Path(str(troubles.failures.__file__)).parent)
    assert found == {
        "USER_ERROR": {"NEVER"},
        "HOST_OUT_OF_MEMORY": {"NEVER"},
        "GPU_OUT_OF_MEMORY": {"SMALLER"},
        "PREEMPTED": {"FREE"},
        "NODE_LOST": {"FREE"},
        "INFRASTRUCTURE": {"COUNTED"},
        "IMAGE_PULL": {"COUNTED"},
        "PROGRESS_STALLED": {"COUNTED"},
        "CHILD_DELETED": {"COUNTED"},
    }
    assert found.keys() <= vars(Reason).keys()
    shown = {key: follows for key, _, _, follows in troubles.reasons()}
    never, waits = troubles.FOLLOWS[Retry.NEVER], "the job waits, and goes on by itself"
    assert {key for key, follows in shown.items() if follows == never} == {
        *("INVALID_SPEC", "NOT_PERMITTED", "NOT_SUPPORTED", "DOES_NOT_FIT", "INVALID_SELECTION", "REJECTED"),
        *("USER_ERROR", "HOST_OUT_OF_MEMORY", "RETRIES_EXHAUSTED", "DEADLINE_EXCEEDED"),
    }
    assert {key for key, follows in shown.items() if follows == waits} == {
        *("NAME_TAKEN", "CREATE_REFUSED", "CREATE_FAILED", "TRAINING_OPERATOR_MISSING"),
    }


def test_the_messages_of_a_module_are_found(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "raise Mine(f'{name} is not there; ' + 'look for it', reason='Lost')\n"
        "WORD = 'Gone'\nraise Mine('it went away', reason=WORD)\n"
        "raise Mine(str(error))\nraise Other('somebody else says this')\nfailure = Mine('nothing but ' f'{x}')\n"
    )
    found = sorted((one.reason, one.message) for one in errors_made(tmp_path, {"Mine": 0}))
    assert found == [("", "nothing but ..."), ("Gone", "it went away"), ("Lost", "... is not there; look for it")]


def test_messages_of_every_kind_of_error_are_listed() -> None:
    page = troubles.messages_page()
    assert {one.__name__ for one in troubles.trainer_errors()} >= {"UsageError", "DataError", "Unavailable", "DiskFull"}
    for name in ("UsageError", "DataError", "InputMissing", "Unavailable", "PermissionDenied"):
        assert f"## {name}: exit " in page
    assert all(f"`{word}`" in page for word in ("ModelGated", "NoTrainedTokens", "PeerLost"))


def _leaves(schema: dict[str, Any], path: str) -> list[str]:
    found = []
    for name, child in schema.get("properties", {}).items():
        found += [f"{path}.{name}", *_leaves(child.get("items", child), f"{path}.{name}")]
    return found


def test_every_field_has_its_place() -> None:
    page = fields.fields_page()
    root = crd.openapi_schema()["properties"]
    paths = _leaves(root["spec"], "spec") + _leaves(root["status"], "status")
    assert len(paths) > 200
    assert [path for path in paths if f'<a id="{fields.anchor(path)}">' not in page] == []
    assert [rule.field for rule in RULES if inline(rule.static_message) not in page] == []


@pytest.mark.parametrize("path", fields.EXAMPLES)
def test_an_example_of_a_section_is_valid(path: str) -> None:
    change = yaml.safe_load(fields.EXAMPLES[path])
    (name,) = change
    assert name == path.rpartition(".")[2]
    parents = path.split(".")[1:-1]
    for parent in reversed(parents):
        change = {parent: change}
    base = deep_merged(BASE, CONTEXT.get(path, {}))
    if path == "spec.dataset.sources":
        base["dataset"] = {}
    FineTuneJobSpec.model_validate(deep_merged(base, change))


def test_every_setting_is_listed() -> None:
    page = configuration.settings_page()
    variables = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `FINETUNE_")]
    assert "FINETUNE_TRAINER__S3_LINK_LOCAL" in variables and "FINETUNE_DASHBOARD__PORT" in variables
    assert len(variables) == len(set(variables)) >= len(Settings.model_fields)
    given = {name: "x" for name in ("FINETUNE_NAMESPACE", "FINETUNE_TRAINER__IMAGE")}
    assert given.keys() <= set(variables)
    assert Settings.from_env(given).trainer.image == "x"


def test_every_value_of_the_chart_is_listed() -> None:
    page = configuration.values_page()
    default = yaml.safe_load((configuration.CHART / "values.yaml").read_text())
    schema = chart_values.ChartValues.model_json_schema(by_alias=True)

    def paths(node: Any, path: str = "") -> list[str]:
        if not isinstance(node, dict) or not node:
            return [path]
        return [found for name, child in node.items() for found in paths(child, f"{path}.{name}" if path else name)]

    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    free = ("metrics.dashboard.labels.", "resources.")
    assert [one for one in paths(default) if one not in listed and not one.startswith(free)] == []
    assert {one.partition(".")[0].removesuffix("[]") for one in listed} == schema["properties"].keys()


def test_every_metric_and_alert_is_listed() -> None:
    page = monitoring.monitoring_page()
    for name in ("finetune_jobs", "finetune_attempt_failures_total", "finetune_reconcile_seconds_bucket"):
        assert name in page
    assert all(one["alert"] in page and one["expr"] in page for one in monitoring.alerts())
    labels = {name: found for name, _, found, _ in monitoring.metrics()}
    assert labels["finetune_job_loss"] == "`namespace`, `job`" and labels["finetune_queue_depth"] == ""


def test_every_command_is_listed() -> None:
    page = commands.commands_page()
    assert {"run", "plan", "validate", "render", "merge", "convert", "status", "version"} <= set(
        commands.command_names()
    )
    assert all(f"## finetune {name}" in page for name in commands.command_names())
    assert "| `-o`, `--output` | `DIR` | The run's folder. Default: finetune-runs/NAME. |" in page


@pytest.mark.parametrize(
    "example", [one for group in pictures.EXAMPLES.values() for one in group], ids=lambda o: o.title
)
def test_a_picture_shows_the_selection(example: pictures.Example) -> None:
    model = pictures.layout()
    chosen = select(model, example.method, LayerSelection.model_validate(dict(example.layers)))
    drawn = pictures.draw(example)
    words = dict(line.split(": ", 1) for line in _titles(drawn))
    modules = {path.removesuffix(".weight") for path in chosen.parameters} | set(chosen.saved_modules)
    shown = {path for path, state in words.items() if state == "trained itself"} - {"full"}
    assert shown == modules
    assert {path for path, state in words.items() if "adapter" in state} - {"adapter"} == set(chosen.adapted)
    assert "\n\n" not in drawn, "an empty line ends the picture in Markdown"


def _titles(drawn: str) -> list[str]:
    return [part.partition("</title>")[0] for part in drawn.split("<title>")[1:]]


def test_the_picture_of_unfreezing_shows_when_blocks_join() -> None:
    joined = [one for one in _titles(drawings.unfreezing()) if one.endswith("trained itself")]
    assert joined == [
        f"block {block} from step {step}: trained itself" for block, step in ((7, 0), (6, 200), (5, 400), (4, 600))
    ]


def test_the_table_of_memory_is_what_the_planner_computes() -> None:
    rows = [line.split(" | ") for line in memory.memory_table().splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == [name for name, _ in memory.JOBS]
    total = {row[0].removeprefix("| "): float(row[7].removesuffix(" |")) for row in rows}
    assert total["qlora nf4, rank 16"] < total["qlora fp8, rank 16"] < total["lora, rank 16"]
    for name, parts in memory.JOBS:
        plan = memory.planned(parts)
        found = plan.memory_per_gpu
        assert not plan.gradient_checkpointing, "the page says that nothing is recomputed"
        assert found is not None and total[name] == pytest.approx(found.total / memory.GIB, abs=0.05)


def test_a_cell_cannot_break_its_table() -> None:
    assert table(("a",), [("x | y\nz",)]) == "| a |\n| --- |\n| x \\| y z |\n"
    assert inline("a*b & <c> {d}") == "a&#42;b &#38; &#60;c&#62; &#123;d&#125;"
