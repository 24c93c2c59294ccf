"""Where else jobs come from: folders of runs, as `finetune run` and its trainer write them, and a user's cluster."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.cli.dashboard import DashboardArguments, dashboard_command
from finetune_operator.dashboard.kubeconfig import KubeconfigSource
from finetune_operator.dashboard.runs import RunsSource
from finetune_operator.dashboard.scalars import Scalar, ScalarFile
from finetune_operator.errors import ClusterError, FinetuneError
from finetune_operator.local.store import Key, ObjectStore
from finetune_operator.observed import JobRef
from tests.dashboard import jobs
from tests.dashboard.serving import own_dashboard
from tests.waiting import eventually


def written(folder: Path, name: str, status: dict[str, Any], *, events: int = 0) -> ObjectStore:
    """A run's folder with its state."""
    folder.mkdir(parents=True, exist_ok=True)
    store = ObjectStore(folder / "state.json", lambda: 1_795_350_000.0)
    made = jobs.job(name, "Running", namespace="default")
    made["status"] = {}
    store.create(made)
    store.change(Key("FineTuneJob", "default", name), lambda job: job.__setitem__("status", status))
    for number in range(events):
        store.create(
            {
                "kind": "Event",
                "metadata": {"name": f"{name}.{number}", "namespace": "default"},
                "type": "Normal",
                "reason": "Training",
                "message": f"event {number}",
                "lastTimestamp": "2026-11-22T08:00:00Z",
            }
        )
    return store


async def test_runs_of_a_folder(tmp_path: Path) -> None:
    written(tmp_path / "one", "qa", {"phase": "Succeeded"}, events=12)
    written(tmp_path / "two", "qa", {"phase": "Running", "progress": {"step": 3, "loss": 1.5}})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    (tmp_path / "stranger").mkdir()
    (tmp_path / "odd").mkdir()
    odd = '{"version": 1, "resourceVersion": 1, "objects": [{"kind": "Event", "metadata": {"name": "x"}}]}'
    (tmp_path / "odd" / "state.json").write_text(odd)
    source = RunsSource(tmp_path)
    await source.refresh()
    assert {job.ref for job in source.jobs()} == {JobRef("one", "qa"), JobRef("two", "qa")}
    one, two = await source.record(JobRef("one", "qa")), await source.record(JobRef("two", "qa"))
    assert one is not None and [event.message for event in one.memory.events] == [f"event {n}" for n in range(12)]
    assert one.note == "" and two is not None and "finetune run continues it" in two.note
    assert two.memory.curves["loss"].points() == [(3, 1.5)]
    assert await source.record(JobRef("two", "other")) is None


async def test_a_run_that_goes_on_is_seen_to(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    store = written(folder, "qa", {"phase": "Running", "progress": {"percent": 1}})
    source = RunsSource(folder)
    await source.refresh()
    before = source.jobs()[0]
    store.change(Key("FineTuneJob", "default", "qa"), lambda job: job["status"].__setitem__("phase", "Succeeded"))
    await source.refresh()
    after = source.jobs()[0]
    assert (before.status["phase"], after.status["phase"]) == ("Running", "Succeeded")
    assert before.resource_version != after.resource_version and before.uid == after.uid
    (folder / "state.json").write_text("{")
    await source.refresh()
    assert source.jobs()[0].status["phase"] == "Succeeded", "a state that cannot be read now leaves what was read"


async def test_answers_are_those_of_the_result(tmp_path: Path) -> None:
    written(tmp_path / "run", "qa", {"phase": "Succeeded"})
    result = tmp_path / "run" / "result"
    result.mkdir()
    long = {"generations": [{"prompt": "q" * 11_000, "tuned": "t"}] * 100}
    none = ("{", "[]", "{}", '{"generations": 3}', "[" * 100_000)
    some = [('{"generations": [{"prompt": "p", "tuned": "t"}, 3]}', 1), (json.dumps(long), 100)]
    for text, found in [*some, *((text, 0) for text in none)]:
        (result / "evaluation.json").write_text(text)
        source = RunsSource(tmp_path)
        await source.refresh()
        record = await source.record(JobRef("run", "qa"))
        assert record is not None and len(record.answers) == found


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match="no such folder"):
        RunsSource(tmp_path / "missing")


def record_of(event: bytes) -> bytes:
    """A TFRecord; its checksums are not looked at."""
    return struct.pack("<Q", len(event)) + b"crc1" + event + b"crc2"


def scalar(tag: str, step: int, value: float) -> bytes:
    """An event with one scalar."""
    name = tag.encode()
    inner = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", value)
    summary = b"\x0a" + bytes([len(inner)]) + inner
    return b"\x09" + struct.pack("<d", 1.0) + b"\x10" + bytes([step]) + b"\x2a" + bytes([len(summary)]) + summary


def test_scalars_are_those_that_tensorboards_own_writer_wrote(tmp_path: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path))
    for step in (1, 200, 70_000):
        value = Summary.Value(tag="train/loss", simple_value=step / 4)
        writer.add_event(Event(wall_time=1.5, step=step, summary=Summary(value=[value])))
    writer.close()
    found = list(ScalarFile(next(tmp_path.iterdir())).news())
    assert found == [Scalar("train/loss", step, step / 4) for step in (1, 200, 70_000)]


def test_a_file_is_read_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "events"
    whole = record_of(scalar("train/loss", 1, 0.5)) + record_of(scalar("train/loss", 2, 0.25))
    reader = ScalarFile(path)
    assert list(reader.news()) == [], "it is not there yet"
    seen: list[Scalar] = []
    for end in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:end])
        seen += reader.news()
    path.write_bytes(whole)
    seen += reader.news()
    assert seen == [Scalar("train/loss", 1, 0.5), Scalar("train/loss", 2, 0.25)]


NOT_RECORDS = [
    b"",
    b"x" * 50,
    struct.pack("<Q", 2**60) + b"crc1" + b"x" * 99,
    record_of(b"\x2a\xff\xff"),
    record_of(b"\x0b"),
]


@pytest.mark.parametrize("data", NOT_RECORDS)
def test_a_file_of_another_form_gives_nothing(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "events"
    path.write_bytes(data)
    assert list(ScalarFile(path).news()) == []


async def test_curves_of_a_run_are_read_from_what_its_trainer_wrote(tmp_path: Path) -> None:
    written(tmp_path / "run", "qa", {"phase": "Running", "progress": {"step": 9, "loss": 9.0}})
    first = tmp_path / "run" / "pods" / "a" / "volumes" / "work" / "out" / "tensorboard" / "events.out.tfevents.1.x"
    first.parent.mkdir(parents=True)
    first.write_bytes(record_of(scalar("train/loss", 1, 0.5)) + record_of(scalar("train/grad_norm", 1, 2.0)))
    source = RunsSource(tmp_path)
    await source.refresh()
    ref = JobRef("run", "qa")
    record = await source.record(ref)
    assert record is not None and record.memory.curves["loss"].points() == [(1, 0.5)]
    assert record.memory.curves["grad_norm"].points() == [(1, 2.0)]
    final = tmp_path / "run" / "result" / "tensorboard" / first.name
    final.parent.mkdir(parents=True)
    final.write_bytes(first.read_bytes() + record_of(scalar("train/loss", 2, 0.25)))
    first.unlink()
    await source.record(ref)
    assert record.memory.curves["loss"].points() == [(1, 0.5), (2, 0.25)], "the same file, at its new place"


class Reader:
    """An API server that answers, or does not."""

    def __init__(self, *found: dict[str, Any]) -> None:
        self.found = list(found)
        self.asked: list[str] = []
        self.down = False

    async def jobs(self) -> Sequence[dict[str, Any]]:
        """What there is."""
        self.asked.append("jobs")
        await asyncio.sleep(0)
        if self.down:
            raise ClusterError("FineTuneJobs cannot be listed: no answer")
        return self.found

    async def events(self, ref: JobRef, uid: str) -> Sequence[dict[str, Any]]:
        """One."""
        self.asked.append("events")
        return [{"lastTimestamp": "2026-11-22T08:00:00Z", "type": "Normal", "reason": "Training", "message": str(ref)}]


async def test_a_cluster_is_asked_only_so_often_however_many_look() -> None:
    now = [100.0]
    reader = Reader(jobs.running())
    source = KubeconfigSource(reader, "here", clock=lambda: now[0])
    await asyncio.gather(*(source.refresh() for _ in range(20)))
    assert reader.asked == ["jobs"]
    ref = source.jobs()[0].ref
    for _ in range(3):
        record = await source.record(ref)
        assert record is not None and [event.message for event in record.memory.events] == [str(ref)]
    assert reader.asked == ["jobs", "events"]
    for step in (977, 978):
        now[0] += 3.0
        reader.found[0]["status"]["progress"]["step"] = step
        await source.refresh()
    record = await source.record(ref)
    assert record is not None and [one for one, _ in record.memory.curves["loss"].points()] == [976, 977, 978]


async def test_a_cluster_that_does_not_answer_is_waited_for_once_by_all() -> None:
    now = [100.0]
    reader = Reader(jobs.running())
    source = KubeconfigSource(reader, "here", clock=lambda: now[0])
    await source.refresh()
    reader.down = True
    now[0] += 3.0
    answers = await asyncio.gather(*(source.refresh() for _ in range(20)), return_exceptions=True)
    assert all(isinstance(one, ClusterError) and "no answer" in str(one) for one in answers)
    assert reader.asked == ["jobs", "jobs"] and source.jobs(), "what was read stays"
    reader.down = False
    now[0] += 3.0
    await source.refresh()
    assert len(reader.asked) == 3


def test_finetune_dashboard_serves_runs_to_who_has_its_address(tmp_path: Path) -> None:
    written(tmp_path / "one", "qa", {"phase": "Succeeded"})
    with own_dashboard(str(tmp_path)) as (client, token):
        assert client.ask("api/jobs", None).status == 401
        assert [one["name"] for one in client.ask("api/jobs", token).data["jobs"]] == ["qa"]
        assert client.ask("api/jobs/one/qa", token).data["phase"] == "Succeeded"
        assert client.ask("api/about", token).data["kind"] == "runs"
        local = {**jobs.job("x"), "status": None}
        local["spec"]["model"] = {"uri": "file:/nowhere"}
        assert "file" in json.dumps(client.check(local, token=token).data), "files of this machine may be named here"
        with pytest.raises(OSError):
            host = client.url.replace("127.0.0.1", "127.0.0.2")
            urllib.request.urlopen(host, timeout=5)


_BROWSER = """#!/bin/sh
page="${1#file://}"
stat -c %a "$page" > FOLDER/mode
cat "$page" > FOLDER/page
echo "$@" > FOLDER/said
while [ -e "$page" ]; do sleep 0.05; done
"""


def test_the_token_is_not_on_the_browsers_command_line(tmp_path: Path) -> None:
    """All users of a machine see command lines. This browser stays in the foreground, as text browsers do."""
    written(tmp_path / "runs" / "one", "qa", {"phase": "Succeeded"})
    browser = tmp_path / "browser"
    browser.write_text(_BROWSER.replace("FOLDER", str(tmp_path)))
    browser.chmod(0o755)
    with own_dashboard("--open", str(tmp_path / "runs"), BROWSER=str(browser)) as (client, token):
        said = eventually((tmp_path / "said").exists, what="the browser is called") and (tmp_path / "said").read_text()
        assert said.startswith("file:///") and token not in said
        assert (tmp_path / "mode").read_text() == "600\n"
        assert f'url={client.url}#token={token}"' in (tmp_path / "page").read_text()
        assert client.ask("api/about", token).status == 200, "it answers while the browser is there"
    assert not Path(said.strip().removeprefix("file://")).exists()


def test_manifests_for_a_cluster_are_judged_by_what_it_permits(tmp_path: Path) -> None:
    """Which is less than one's own machine does: also where it is shown because there are no runs here."""
    kubeconfig = tmp_path / "kubeconfig"
    cluster = {"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    users = [{"name": "u", "user": {}}]
    config = {"current-context": "c", "contexts": [context], "clusters": [cluster], "users": users}
    kubeconfig.write_text(json.dumps(config))
    with own_dashboard(cwd=tmp_path, KUBECONFIG=str(kubeconfig)) as (client, token):
        manifest = jobs.job("x", spec={"model": {"uri": "hf://a/b", "trustRemoteCode": True}}) | {"status": None}
        problems = client.check(manifest, jobs.LLAMA, token=token).data["problems"]
    assert any("trustRemoteCode" in one for one in problems), problems


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"runs": Path("missing-folder")}, "no such folder"),
    ({"runs": Path(), "cluster": True}, "or a cluster"),
    ({"runs": Path(), "namespace": "team-a"}, "or a cluster"),
    ({"cluster": True}, "KUBECONFIG"),
    ({}, "no runs in finetune-runs"),
]


@pytest.mark.parametrize(("given", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_what_cannot_be_served_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    nothing = DashboardArguments(None, False, None, 0, False, None)
    with pytest.raises(FinetuneError, match=said):
        dashboard_command(replace(nothing, **given))


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FinetuneError, match=f"--port {port}"):
            dashboard_command(DashboardArguments(tmp_path, False, None, port, False, None))
