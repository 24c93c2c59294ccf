"""Metrics are read off the store at every scrape; the heartbeat knows when a loop stands still."""

from __future__ import annotations

from prometheus_client import generate_latest

from finetune_operator.kubernetes.store import WatchStore
from finetune_operator.metrics import Heartbeat, Metrics
from finetune_operator.observed import JobRef


def put(store: WatchStore, name: str, status: dict[str, object]) -> None:
    meta = {"name": name, "namespace": "team", "uid": name, "resourceVersion": "1"}
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
