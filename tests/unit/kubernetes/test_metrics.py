"""Metrics are read off the store at every scrape; the heartbeat knows when a loop stands still."""

from __future__ import annotations

from prometheus_client import generate_latest

from finetune_operator.kubernetes.store import WatchStore
from finetune_operator.metrics import Heartbeat, Metrics
from finetune_operator.observed import JobRef


def put(store: WatchStore, name: str, status: dict[str, object], *, created: str | None = None) -> None:
    meta = {"name": name, "namespace": "team", "uid": name, "resourceVersion": "1", "creationTimestamp": created}
    store.put("FineTuneJob", {"metadata": meta, "spec": {}, "status": status})


def test_gauges_follow_the_store() -> None:
    store, metrics = WatchStore(), Metrics()
    metrics.watch(store.jobs, store.job, lambda: 7)
    put(store, "a", {"phase": "Running", "progress": {"percent": 40, "loss": 1.5, "tokensPerSecond": 900.0}})
    put(store, "b", {"phase": "Succeeded", "progress": {"percent": 100, "loss": 0.5}})
    put(store, "c", {})
    metrics.count_request("create", "PyTorchJob")
    metrics.count_failure("Preempted")
    metrics.observe_reconcile("ok", 0.02)
    text = generate_latest(metrics.registry).decode()
    for line in (
        'finetune_jobs{phase="Running"} 1.0',
        'finetune_jobs{phase="Pending"} 1.0',
        'finetune_jobs{phase="Failed"} 0.0',
        "finetune_queue_depth 7.0",
        'finetune_job_progress_ratio{job="a",namespace="team"} 0.4',
        'finetune_job_loss{job="a",namespace="team"} 1.5',
        'finetune_job_tokens_per_second{job="a",namespace="team"} 900.0',
        'finetune_api_requests_total{kind="PyTorchJob",verb="create"} 1.0',
        'finetune_attempt_failures_total{reason="Preempted"} 1.0',
        'finetune_reconcile_seconds_count{outcome="ok"} 1.0',
    ):
        assert line in text.splitlines()
    # A finished job's last loss is no longer a live value.
    assert 'job="b"' not in text
    assert store.job(JobRef("team", "a")) is not None


def waiting(phase: str, **since: str) -> dict[str, object]:
    states = {"Running": "False", "Reconciling": "True"}
    conditions = [
        {"type": name, "status": states[name], "reason": "WaitingForPods", "lastTransitionTime": at}
        for name, at in since.items()
    ]
    return {"phase": phase, "conditions": conditions}


def test_since_when_jobs_wait() -> None:
    store, metrics = WatchStore(), Metrics()
    metrics.watch(store.jobs, store.job, lambda: 0)

    def since() -> dict[str, float]:
        lines = generate_latest(metrics.registry).decode().splitlines()
        found = (line.split() for line in lines if line.startswith("finetune_jobs_waiting_since_timestamp_seconds{"))
        return {name.split('"')[1]: float(value) for name, value in found}

    assert since() == {}
    put(store, "new", {}, created="2027-01-15T08:00:00Z")
    put(store, "queued", waiting("Queued", Running="2027-01-01T08:00:00Z"))
    put(store, "running", {"phase": "Running"}, created="2027-01-01T08:00:00Z")
    put(store, "odd", {"phase": "Starting", "conditions": ["?", {"type": "Running", "lastTransitionTime": 3}]})
    assert since() == {"Pending": 1_800_000_000.0}
    # One that ran before has waited since then; one that was suspended, since it was resumed.
    ran, resumed = "2027-01-15T08:10:00Z", "2027-01-15T08:20:00Z"
    put(
        store,
        "again",
        waiting("Starting", Running=ran, Reconciling="2027-01-02T00:00:00Z"),
        created="2027-01-02T00:00:00Z",
    )
    put(store, "on", waiting("Starting", Running="2027-01-02T00:00:00Z", Reconciling=resumed))
    assert since() == {"Pending": 1_800_000_000.0, "Starting": 1_800_000_600.0}


def test_a_heartbeat_stops() -> None:
    now = [0.0]
    heartbeat = Heartbeat(30, clock=lambda: now[0])
    now[0] = 29
    assert heartbeat.alive
    heartbeat.beat()
    now[0] = 58
    assert heartbeat.alive
    now[0] = 60
    assert not heartbeat.alive
