"""The operator's dashboard on a real API server: its tokens, its roles; and the user's own dashboard over it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controlplane import Binaries, ControlPlane
from finetune_operator import constants as c
from finetune_operator.api import crd
from finetune_operator.constants import PROGRESS_AUDIENCE
from finetune_operator.kubernetes import rbac
from tests.apiserver.conftest import apiserver_binaries
from tests.apiserver.world import MERGE_PATCH, SYSTEM, World, free_port
from tests.dashboard.serving import Client, own_dashboard
from tests.waiting import eventually

__all__ = ["apiserver_binaries"]
pytestmark = pytest.mark.apiserver

TEAMS = ("team-a", "team-b")
RBAC = "/apis/rbac.authorization.k8s.io/v1"
READER = {"apiGroups": [c.GROUP], "resources": [c.PLURAL], "verbs": ["list"]}


class Watched(World):
    """With people who look at it."""

    client = Client("")

    def person(self, name: str, *namespaces: str, everywhere: bool = False) -> None:
        """An account that may list jobs somewhere."""
        self.post(f"/api/v1/namespaces/{SYSTEM}/serviceaccounts", {"metadata": {"name": name}})
        subject = {"kind": "ServiceAccount", "name": name, "namespace": SYSTEM}
        for namespace in namespaces:
            self.bind(f"{RBAC}/namespaces/{namespace}/", "Role", name, [READER], subject)
        if everywhere:
            self.bind(f"{RBAC}/", "ClusterRole", name, [READER], subject)

    def bind(self, path: str, kind: str, name: str, rules: list[Any], subject: dict[str, str]) -> None:
        """A role and its binding."""
        self.post(f"{path}{kind.lower()}s", {"metadata": {"name": name}, "rules": rules})
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name}
        binding = {"metadata": {"name": name}, "roleRef": reference, "subjects": [subject]}
        self.post(f"{path}{kind.lower()}bindings", binding)
        # The API server learns of roles by a watch, too.
        who = f"--as=system:serviceaccount:{SYSTEM}:{name}"
        where = path.rstrip("/").rpartition("/")[2] if kind == "Role" else "default"
        ask = ("auth", "can-i", "list", f"{c.PLURAL}.{c.GROUP}", "-n", where, who)
        eventually(lambda: self.kubectl(*ask, code=None).startswith("yes"), what=f"{name} may list in {where}")

    def token(self, name: str, *audiences: str) -> str:
        """As `kubectl create token` gives it."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"audiences": list(audiences)} if audiences else {},
        }
        path = f"/api/v1/namespaces/{SYSTEM}/serviceaccounts/{name}/token"
        token: str = self.api.request("POST", path, body)["status"]["token"]
        return token

    def edit_role(self, path: str, rules: list[Any]) -> None:
        """Replace a role's rules."""
        self.api.request("PATCH", path, {"rules": rules}, MERGE_PATCH)

    def seen(self, token: str) -> tuple[int, set[str]]:
        """Status and names of the list of jobs."""
        answer = self.client.ask("api/jobs", token)
        return answer.status, {f"{one['namespace']}/{one['name']}" for one in answer.data.get("jobs", ())}


@pytest.fixture(scope="module")
def world(apiserver_binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("dashboard")
    path = folder / crd.FILE_NAME
    path.write_text(crd.render())
    with ControlPlane(binaries=apiserver_binaries, crds=[path]) as plane:
        made = Watched(plane, folder)
        made.install(dashboard=True)
        for team in TEAMS:
            made.post("/api/v1/namespaces", {"metadata": {"name": team}})
            made.create("qa", team)
        made.person("overseer", everywhere=True)
        made.person("one-team", "team-a")
        made.person("nobody")
        port = free_port()
        with made.operator(FINETUNE_DASHBOARD__PORT=str(port)):
            made.client = Client(f"http://127.0.0.1:{port}/")
            yield made


@pytest.mark.parametrize(
    ("who", "names"),
    [("overseer", {"team-a/qa", "team-b/qa"}), ("one-team", {"team-a/qa"}), ("nobody", set())],
)
def test_everybody_sees_what_the_api_server_lets_them_list(world: Watched, who: str, names: set[str]) -> None:
    assert eventually(lambda: (seen := world.seen(world.token(who)))[0] == 200 and seen)[1] == names
    path = "api/jobs/team-b/qa"
    assert world.client.ask(path, world.token(who)).status == (200 if "team-b/qa" in names else 404)


def test_tokens_that_are_for_something_else(world: Watched) -> None:
    good = world.token("overseer")
    assert world.client.ask("api/about", good).data["user"] == f"system:serviceaccount:{SYSTEM}:overseer"
    head, claims, signature = good.split(".")
    for wrong in (world.token("overseer", PROGRESS_AUDIENCE), f"{head}.{claims}.{signature[::-1]}", "x.y.z"):
        assert world.client.ask("api/jobs", wrong).status == 401


def test_a_job_of_the_cluster_is_shown_with_what_the_operator_found_out(world: Watched) -> None:
    def found() -> Any:
        page = world.client.ask("api/jobs/team-a/qa", world.token("one-team")).data
        return page if page["plan"] and page["events"] else None

    page = eventually(found, what="it is planned, and an event is remembered")
    assert page["uid"] == world.job("qa", "team-a")["metadata"]["uid"]
    assert {one["type"] for one in page["conditions"]} >= {"Accepted", "Planned"}


def test_without_its_rights_it_shows_nothing(world: Watched) -> None:
    """What `rbac.DASHBOARD` grants is needed, each verb of it."""
    path = f"{RBAC}/clusterroles/{rbac.NAME}"
    whole = world.api.request("GET", path)["rules"]
    for denied in ("subjectaccessreviews", "tokenreviews"):
        kept = [rule for rule in whole if denied not in rule["resources"]]
        world.edit_role(path, kept)
        world.person(f"new-{denied}", everywhere=True)
        fresh = world.token(f"new-{denied}")
        eventually(lambda fresh=fresh: world.seen(fresh)[0] == 503, 20, f"{denied} is refused")
        world.edit_role(path, whole)
        eventually(lambda fresh=fresh: world.seen(fresh)[0] == 200, 20)


def test_a_user_looks_with_their_own_rights(world: Watched, tmp_path: Path) -> None:
    kubeconfig = str(world.plane.service_account_kubeconfig(SYSTEM, "overseer"))
    with own_dashboard("--cluster", KUBECONFIG=kubeconfig) as (client, token):
        listed = client.ask("api/jobs", token)
        assert listed.status == 200, listed.data
        assert {one["namespace"] for one in listed.data["jobs"]} == set(TEAMS)
        page = client.ask("api/jobs/team-a/qa", token)
        assert page.status == 200 and page.data["events"] == [], "may list jobs, and no events"
    kubeconfig = str(world.plane.service_account_kubeconfig(SYSTEM, "one-team"))
    with own_dashboard("--cluster", KUBECONFIG=kubeconfig) as (client, token):
        refused = client.ask("api/jobs", token)
        assert refused.status == 502 and "name a namespace with -n" in refused.data["problem"]
    with own_dashboard("-n", "team-a", KUBECONFIG=kubeconfig) as (client, token):
        assert [one["name"] for one in client.ask("api/jobs", token).data["jobs"]] == ["qa"]
        assert "token" not in json.dumps(client.ask("api/about", token).data)
