"""What people put into their clusters: Argo CD's settings, made from the Lua, and the examples."""

from __future__ import annotations

import re
from typing import Any

import pytest

from finetune_operator import constants as c
from finetune_operator.api import crd
from tests.gitops import customization as files

KEY = f"{c.GROUP}_{c.KIND}"
DOCS = (files.ROOT / "docs" / "gitops.md").read_text(encoding="utf-8")


def settings() -> dict[str, str]:
    """The entries of `argocd-cm`."""
    definitions = [{"name": name, "action.lua": files.ACTION_LUA[name]} for name in files.ACTIONS]
    actions = {"discovery.lua": files.DISCOVERY_LUA, "definitions": definitions}
    return {
        f"resource.customizations.health.{KEY}": files.HEALTH_LUA,
        f"resource.customizations.actions.{KEY}": files.dump(actions),
        f"resource.customizations.ignoreResourceUpdates.{KEY}": files.dump({"jsonPointers": ["/status/progress"]}),
    }


def schema() -> dict[str, Any]:

    found: dict[str, Any] = crd.openapi_schema()
    return found


def pointed_at(pointer: str) -> dict[str, Any]:
    """What a JSON pointer leads to in a FineTuneJob.

    Raises:
        KeyError: there is no such field.
    """
    at = schema()
    for step in pointer.strip("/").split("/"):
        at = at["properties"][step]
    return at


def test_argocd_cm_is_made_from_the_lua() -> None:
    patch = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "argocd-cm", "namespace": "argocd"},
        "data": settings(),
    }
    text = "# Made from finetune.dev/FineTuneJob by `UPDATE_GOLDEN=1 pytest tests/gitops`; see docs/gitops.md.\n"
    files.agreed(files.ARGOCD / "argocd-cm.yaml", text + files.dump(patch))


def test_argocd_reads_the_same_lua_back() -> None:
    data = files.load(files.ARGOCD / "argocd-cm.yaml")["data"]
    actions = files.yaml.safe_load(data[f"resource.customizations.actions.{KEY}"])
    assert data[f"resource.customizations.health.{KEY}"] == files.HEALTH_LUA
    assert actions["discovery.lua"] == files.DISCOVERY_LUA
    assert {one["name"]: one["action.lua"] for one in actions["definitions"]} == files.ACTION_LUA
    assert not any("useOpenLibs" in key for key in data), "nothing needs the standard libraries"


def test_what_is_ignored_exists() -> None:
    data = files.load(files.ARGOCD / "argocd-cm.yaml")["data"]
    ignored = files.yaml.safe_load(data[f"resource.customizations.ignoreResourceUpdates.{KEY}"])["jsonPointers"]
    template = files.load(files.ARGOCD / "examples" / "jobs-applicationset.yaml")["spec"]["template"]["spec"]
    for one in template["ignoreDifferences"]:
        assert (one["group"], one["kind"]) == (c.GROUP, c.KIND)
        ignored += one["jsonPointers"]
    assert ignored == ["/status/progress", "/spec/runPolicy/suspend"]
    assert [pointed_at(pointer)["type"] for pointer in ignored] == ["object", "boolean"]
    with pytest.raises(KeyError):
        pointed_at("/spec/suspend")


def test_the_operators_application_names_what_is_there() -> None:
    spec = files.load(files.ARGOCD / "examples" / "operator-application.yaml")["spec"]
    source = spec["source"]
    chart = files.ROOT / source["path"]
    assert (chart / "Chart.yaml").is_file()
    assert [(chart / path).is_file() for path in source["helm"]["valueFiles"]] == [True]
    assert spec["syncPolicy"]["automated"]["prune"] is False, "the CRD is in it"


def test_examples_apply_on_the_server_and_never_replace() -> None:
    application = files.load(files.ARGOCD / "examples" / "operator-application.yaml")["spec"]
    jobs = files.load(files.ARGOCD / "examples" / "jobs-applicationset.yaml")["spec"]["template"]["spec"]
    for spec in (application, jobs):
        options = spec["syncPolicy"]["syncOptions"]
        assert "ServerSideApply=true" in options
        # One would undo the actions, the other would delete a job and create, and train, it again.
        assert not {"Replace=true", "Force=true"} & set(options)
    assert "RespectIgnoreDifferences=true" in jobs["syncPolicy"]["syncOptions"]


def test_pieces_of_the_page_are_yaml_and_its_files_exist() -> None:
    for piece in re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL):
        assert files.yaml.safe_load(piece)
    named = re.findall(r"`((?:gitops|charts|tests|docs)/[\w./-]+)`", DOCS)
    assert named
    assert [path for path in named if not (files.ROOT / path).exists()] == []
