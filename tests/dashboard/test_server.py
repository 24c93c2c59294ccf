"""What is answered: headers, tags, bounds, texts without credentials, manifests that are checked."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml

from finetune_operator.api.parse import load_manifests
from finetune_operator.dashboard import assets, server, views
from finetune_operator.dashboard.access import OwnMachine
from finetune_operator.dashboard.checking import MAX_BYTES
from finetune_operator.dashboard.redact import HIDDEN, clean, clean_text
from finetune_operator.dashboard.server import DashboardServer
from finetune_operator.observed import ObservedJob
from tests.dashboard import jobs
from tests.dashboard.serving import ADMIN, NOBODY, TEAM_A, Client, World, served

JOB = "api/jobs/team-a/medical-qa-8b"
MANIFEST: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "qa"},
    "spec": {
        "model": {"uri": "hf://meta-llama/Llama-3.1-8B"},
        "dataset": {"uri": "s3://data/qa.jsonl"},
        "output": {"uri": "s3://models/qa"},
    },
}


@pytest.mark.parametrize("path", ["", "static/main.js", "static/style.css", "api/jobs", JOB, "nowhere", "static/x.js"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_every_answer_is_guarded(client: Client, path: str, method: str) -> None:
    said = client.ask(path, method=method).headers
    policy = dict(part.strip().partition(" ")[::2] for part in said["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["img-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'" and policy["base-uri"] == policy["form-action"] == "'none'"
    assert said["X-Content-Type-Options"] == "nosniff" and said["X-Frame-Options"] == "DENY"
    assert said["Referrer-Policy"] == "no-referrer" and said["Cache-Control"] == "private, no-cache"
    assert "Set-Cookie" not in said and "Access-Control-Allow-Origin" not in said


def test_the_pages_have_no_script_or_style_of_their_own_and_name_no_other_host() -> None:
    found = assets.load()
    assert {"index.html", "main.js", "style.css", "icon.svg"} <= found.keys()
    page = found["index.html"].body.decode()
    for tag in re.findall(r"<(?!/)[^>]+>", page):
        assert not re.search(r"\s(style|on\w+)=|^<style", tag), tag
    assert re.findall(r"<script[^>]*>([^<]*)</script>", page) == ["", ""]
    for name, asset in found.items():
        text = asset.body.decode()
        hosts = {host for host in re.findall(r"\w+://([\w.-]+)", text) if "." in host}
        assert hosts <= {"www.w3.org"}, f"{name} names {hosts}"
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
            assert forbidden not in text, f"{name}: {forbidden}"


@pytest.mark.parametrize("path", ["api/jobs", JOB, "api/form", "api/about", "static/main.js", ""])
def test_what_has_not_changed_is_not_sent_again(client: Client, path: str) -> None:
    first = client.ask(path)
    tag = first.headers["ETag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = client.ask(path, If_None_Match=known)
        assert (again.status, again.body, again.headers["ETag"]) == (304, b"", tag)
    assert client.ask(path, If_None_Match='"other"').body == first.body


def test_what_has_changed_is_sent(world: World, client: Client) -> None:
    listed, shown = client.ask("api/jobs").headers["ETag"], client.ask(JOB).headers["ETag"]
    world.report("medical-qa-8b", "team-a", {"step": 977.0, "loss": 0.5})
    assert client.ask("api/jobs", If_None_Match=listed).status == 304, "the status is as it was"
    assert client.ask(JOB, If_None_Match=shown).data["curves"]["loss"][-1] == [977, 0.5]
    changed = jobs.running()
    changed["metadata"]["resourceVersion"] = "2"
    changed["status"]["progress"]["percent"] = 62
    world.put(changed)
    found = client.ask("api/jobs", If_None_Match=listed)
    rows = {one["name"]: one for one in found.data["jobs"]}
    assert found.status == 200 and rows["medical-qa-8b"]["progress"]["percent"] == 62


def test_tags_differ_by_who_is_asking(client: Client) -> None:
    tag = client.ask("api/jobs", ADMIN).headers["ETag"]
    assert client.ask("api/jobs", TEAM_A, If_None_Match=tag).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", ["", "api/jobs", JOB, "api/form", "static/main.js"])
def test_nothing_can_be_written(client: Client, path: str, method: str) -> None:
    answer = client.ask(path, method=method, body=b"{}")
    assert answer.status == 405 and "GET" in answer.headers["Allow"]


@pytest.mark.parametrize(
    "path",
    [
        "static/../server.py",
        "static/..%2fserver.py",
        "static/%2e%2e/server.py",
        "static/__init__.py",
        "static/",
        "../x",
    ],
)
def test_only_the_front_ends_own_files_are_served(client: Client, path: str) -> None:
    raw = socket.create_connection(("127.0.0.1", int(client.url.rstrip("/").rpartition(":")[2])))
    with raw:
        raw.sendall(f"GET /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        raw.settimeout(5)
        said = b"".join(iter(lambda: raw.recv(65536), b""))
    assert said.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")) and b"import" not in said


def test_a_standby_says_that_it_is_one(world: World, client: Client) -> None:
    world.leads = False
    assert "does not lead" in client.ask("api/about").data["trouble"]
    for path in ("api/jobs", JOB):
        answer = client.ask(path)
        assert answer.status == 503 and "does not lead" in answer.data["problem"]


def test_a_long_list_is_cut_off_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ROWS", 20)
    world = World()
    world.put(*(jobs.job(f"j{n:03}", created=f"2026-11-22T08:{n:02}:00Z") for n in range(50)))
    with served(world.dashboard.application) as client:
        data = client.ask("api/jobs").data
    assert data["total"] == 50 and [one["name"] for one in data["jobs"]] == [f"j{n:03}" for n in range(49, 29, -1)]


def test_a_row_is_made_once_for_each_version_of_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def row(job: ObservedJob, whole: Callable[[ObservedJob], Any] = views.row) -> Any:
        made.append(job.ref.name)
        return whole(job)

    monkeypatch.setattr(views, "row", row)
    world = World()
    world.put(*(jobs.job(f"job-{number}") for number in range(200)))
    with served(world.dashboard.application) as client:
        for token in (ADMIN, ADMIN, TEAM_A):
            assert client.ask("api/jobs", token).data["total"] == 200
        assert len(made) == 200
        world.put(jobs.job("job-7", version=2))
        client.ask("api/jobs")
        assert made[200:] == ["job-7"]


def test_another_host_name_is_turned_away_on_the_loopback(world: World) -> None:
    access = OwnMachine()
    made = DashboardServer(
        world.dashboard, access, lambda question: pytest.fail("unused"), hosts=frozenset({"127.0.0.1"})
    )
    with served(made.application) as client:
        assert client.ask("api/about", access.token).status == 200
        rebound = client.ask("api/about", access.token, Host="evil.example:80")
        assert rebound.status == 421 and "Content-Security-Policy" in rebound.headers


@pytest.mark.parametrize(("word", "text"), jobs.SECRET_TEXTS.values(), ids=list(jobs.SECRET_TEXTS))
def test_credentials_are_hidden(word: str, text: str) -> None:
    said = clean_text(text)
    assert HIDDEN in said and word.lower() in said.lower()
    assert not any(part in said for part in jobs.HIDDEN_PARTS), said


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/name",
        "s3://bucket/prefix",
        "token accuracy 32.2 %",
        "spec.model.tokenSecretRef",
        "a@b.example",
        "key: x_proj",
        "Basic instructions for the clerk",
        "a bearer certificate",
    ],
)
def test_ordinary_texts_stay_as_they_are(text: str) -> None:
    assert clean(text) == text


SECRET = "https://admin:hunter2hunter2@s3.example/ "  # allow-secret: made up


@pytest.mark.parametrize("before", ["x" * 40, "token hf_abcdefghijklmnopqrstuvwx " * 100], ids=["plain", "shrinking"])
def test_a_text_that_is_cut_has_no_half_of_a_credential(before: str) -> None:
    for padding in range(0, 1100, 3):
        said = clean_text(f"{before}{'x' * (8170 - len(before) + padding)} {SECRET}{'y' * 2000}")
        assert "hunter2" not in said and len(said) < 9300
        assert said.endswith(HIDDEN), "a form must not take it for the whole text"


def test_what_is_nested_too_deep_is_hidden() -> None:
    deep: Any = "x"
    for _ in range(40):
        deep = [deep]
    assert HIDDEN in json.dumps(clean(deep))


def test_nothing_secret_is_in_what_is_sent(world: World, client: Client) -> None:
    world.put(jobs.hostile())
    body = client.ask("api/jobs/team-a/hostile").body.decode()
    assert "topsecret" not in body and not any(part in body for part in jobs.HIDDEN_PARTS)
    assert json.loads(body)["spec"]["trainer"]["podTemplate"] == HIDDEN
    assert jobs.HOSTILE in json.loads(body)["model"], "markup is text: it is the browser that must not read it"


def test_statuses_that_somebody_else_wrote_are_shown_as_far_as_they_go(world: World, client: Client) -> None:
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    infinite = {"evaluation": {"tuned": {"perplexity": float("inf")}}}
    nothing = {"attempts": {"current": float("nan")}, "startTime": float("nan"), "completionTime": float("inf")}
    results: list[Any] = [{"result": one} for one in ("\ud800", deep, infinite)]
    others: list[Any] = [None, {}, {"phase": 7}, {"conditions": "x"}, {"progress": []}, {"attempts": "y"}, {"plan": 3}]
    for number, status in enumerate([*others, *results, nothing]):
        odd = jobs.job(f"odd-{number}", spec={"resources": {"gpus": float("inf")}})
        odd["status"] = status
        world.put(odd)
        body = client.ask(f"api/jobs/team-a/odd-{number}").body.decode()
        json.loads(body, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert client.ask("api/jobs").status == 200


def test_a_page_has_all_of_a_job(client: Client) -> None:
    page = client.ask(JOB).data
    assert page["plan"]["memoryPerGPU"]["total"] and page["gpuMemory"] == 80 * 2**30
    assert [one["reason"] for one in page["failures"]] == ["NodeLost"] and page["failures"][0]["attempt"] == 1
    assert [one["type"] for one in page["events"]] == ["Normal", "Warning", "Normal", "Normal"]
    assert [one["node"] for one in page["pods"]] == ["gpu-a-01"]
    assert set(page["curves"]) == {"loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second"}
    assert max(value for _, value in page["curves"]["grad_norm"]) > 5


def test_memory_of_a_gpu_is_the_operators_setting_where_the_job_does_not_say(world: World, client: Client) -> None:
    quiet = jobs.job("quiet", spec={"resources": {"gpus": 1}})
    odd = jobs.job("odd", spec={"resources": {"gpus": 1, "gpuMemory": "much"}})
    world.put(quiet, odd)
    assert client.ask("api/jobs/team-a/quiet").data["gpuMemory"] == 80 * 2**30
    assert client.ask("api/jobs/team-a/odd").data["gpuMemory"] == 80 * 2**30


def test_a_valid_manifest_is_valid_and_its_text_is_what_kubectl_reads(client: Client) -> None:
    answer = client.check(MANIFEST).data
    assert answer["valid"] and answer["problems"] == []
    assert yaml.safe_load(answer["text"]) == MANIFEST and load_manifests(answer["text"])[0].name == "qa"
    assert answer["plan"]["microBatchSize"] and "memoryPerGPU" not in answer["plan"]
    assert "config.json" in answer["note"]


def test_a_plan_is_made_of_a_config_that_was_pasted(client: Client) -> None:
    for config in (jobs.LLAMA, json.dumps(jobs.LLAMA)):
        answer = client.check(MANIFEST, config).data
        assert answer["plan"]["totalParameters"] > 8e9 and answer["plan"]["memoryPerGPU"]["total"] > 2**30
        assert answer["gpuMemory"] == 80 * 2**30
    small = {**MANIFEST, "spec": {**MANIFEST["spec"], "method": "full", "resources": {"gpuMemory": "16Gi"}}}
    refused = client.check(small, jobs.LLAMA).data
    assert not refused["valid"] and "GiB" in refused["problems"][0]


WRONG: list[tuple[str, Any, str]] = [
    ("nothing in it", "", "nothing in it"),
    ("another kind", "kind: Pod\napiVersion: v1", "kind: FineTuneJob"),
    ("unknown field", {**MANIFEST, "spec": {**MANIFEST["spec"], "lorra": {}}}, "spec.lorra"),
    ("wrong choice", {**MANIFEST, "spec": {**MANIFEST["spec"], "method": "lor"}}, "did you mean lora"),
    ("a rule", {**MANIFEST, "spec": {**MANIFEST["spec"], "layers": {"last": 1, "first": 1}}}, "spec.layers"),
    ("not permitted", {**MANIFEST, "spec": {**MANIFEST["spec"], "model": {"uri": "file:/etc"}}}, "file:/etc"),
    ("broken YAML", "a: [", "line 2"),
    (
        "a billion laughs",
        "a: &a [x,x]\nb: &b [*a,*a]\n"
        + "".join(
            f"{chr(99 + n)}: &{chr(99 + n)} [*{chr(98 + n)},*{chr(98 + n)},*{chr(98 + n)},*{chr(98 + n)}]\n"
            for n in range(20)
        ),
        "more than",
    ),
]


@pytest.mark.parametrize(("manifest", "said"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_what_is_wrong_is_said_as_finetune_validate_says_it(client: Client, manifest: Any, said: str) -> None:
    answer = client.check(manifest)
    assert answer.status == 200 and not answer.data["valid"]
    assert any(said in one for one in answer.data["problems"]), answer.data["problems"]


@pytest.mark.parametrize("config", ["{", "[]", "3", '{"model_type": "llama"}', '{"model_type": {}}', "[" * 50_000])
def test_a_config_that_is_none(client: Client, config: str) -> None:
    answer = client.check(MANIFEST, config)
    assert answer.status == 400 or not answer.data["valid"]


BODIES: list[tuple[bytes, str, int]] = [
    (b"x" * (MAX_BYTES + 1), "application/json", 413),
    (b"{", "application/json", 400),
    (b"[]", "application/json", 400),
    (b'{"manifest": 3}', "application/json", 400),
    (b"[" * 100_000, "application/json", 400),
    (b'{"manifest":' + b'{"a":' * 50 + b"[0" + b",0" * 20_000 + b"]" + b"}" * 51, "application/json", 400),
    (b'{"manifest": "a"}', "text/plain", 415),
    (b'{"manifest": "a"}', "application/x-www-form-urlencoded", 415),
]


@pytest.mark.parametrize(("body", "kind", "status"), BODIES, ids=[str(n) for n in range(len(BODIES))])
def test_bodies_that_are_none(client: Client, body: bytes, kind: str, status: int) -> None:
    assert client.ask("api/check", method="POST", body=body, Content_Type=kind).status == status


# As text, and as an object that has to be written as YAML first.
LARGEST: list[Any] = ["a: [" + "[],x," * 20_000 + "]", {"a": [0] * 63_000}]


@pytest.mark.parametrize("manifest", LARGEST, ids=["text", "object"])
def test_the_largest_manifests_do_not_hold_up_the_others(client: Client, manifest: Any) -> None:
    client.ask("api/about")
    whole, waited = time.perf_counter(), 0.0
    with ThreadPoolExecutor() as threads:
        checks = [threads.submit(client.check, manifest, token=NOBODY) for _ in range(3)]
        while not all(check.done() for check in checks):
            began = time.perf_counter()
            assert client.ask("api/about").status == 200
            waited += time.perf_counter() - began
            time.sleep(0.1)
    assert all(check.result().status == 200 and not check.result().data["valid"] for check in checks)
    # Otherwise somebody who asks waits nearly all the time; one that is slow may be a busy machine's.
    assert waited < 0.7 * (time.perf_counter() - whole)
