"""`finetune run`: a job on this machine, with the operator's own reconcile code, from its start to its result."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator import constants as c
from finetune_operator.api.v1alpha1 import FineTuneJob
from finetune_operator.errors import ClusterError
from finetune_operator.local import prepare
from finetune_operator.local.buckets import download_result, named_buckets, s3_client, seed
from finetune_operator.local.cluster import LocalCluster
from finetune_operator.local.config_reader import LocalConfigReader
from finetune_operator.local.core import reconciler
from finetune_operator.local.gpus import Gpu, GpuPool, find_gpus, visible
from finetune_operator.local.loop import RunLoop, Wiring
from finetune_operator.local.machine import this_machine
from finetune_operator.local.options import End, Observer, Outcome, RunOptions
from finetune_operator.local.run_directory import RunDirectory
from finetune_operator.local.seaweed import REGION, SeaweedError, SeaweedServer
from finetune_operator.model_config import HubConfigReader
from finetune_operator.observed import JobRef
from finetune_operator.settings import Permissions, Settings, TrainerDefaults
from finetune_operator.times import rfc3339

LOCAL_SECRET = "finetune-local-s3"  # nosec B105  # of a server on the loopback address
"""Name under which pods get the credentials of the embedded S3 server."""
PROGRESS_PATCH_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ObjectStorage:
    """The object store of a run, as pods and this process reach it."""

    endpoint: str | None
    region: str | None
    credentials: Mapping[str, str]
    embedded: bool


def run_job(job: FineTuneJob, options: RunOptions, observer: Observer) -> Outcome:
    """Run a job to its end, or until the user stops it.

    Call it from the main thread: it handles SIGINT and SIGTERM meanwhile. The first of them suspends the job, with a
    checkpoint; a second one kills it. Called again with the same folder it continues.

    Args:
        job: with absolute `file:` URIs.
        options: folder, buckets, secrets.
        observer: is told what happens.

    Raises:
        InvalidManifest: a Secret is missing.
        PlanningError: the job needs more GPUs than there are.
        FinetuneError: the folder is in use, or holds another job; the object store does not answer.
    """
    prepare.check_secrets(job, options.secrets)
    job = job.model_copy(update={"spec": prepare.without_reuse(job.spec)})
    gpus = visible(find_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    prepare.check_gpus(job, gpus)
    directory = RunDirectory(options.directory)
    with directory.opened(fresh=options.fresh):
        cluster = LocalCluster(directory.state, time.time)
        for other in cluster.store.select(c.KIND):
            prepare.check_changes(directory.path, other, job)
        finished = _finished(cluster, job, directory)
        if finished is not None:
            return finished
        _apply(cluster, job)
        if not gpus:
            observer.note(_on_cpu(job))
        with _object_storage(job, options, directory) as storage:
            if storage.embedded:
                _seed(job, options, storage, observer)
            reader = LocalConfigReader(
                HubConfigReader(),
                mirror=options.model_mirror,
                claims=directory.claims,
                s3=lambda: s3_client(storage.endpoint, storage.region, storage.credentials),
            )
            wiring = Wiring(
                cluster,
                directory,
                machine=this_machine(options, directory, os.environ),
                gpus=GpuPool(gpus, job.spec.resources.gpu_resource),
                secrets={**options.secrets, LOCAL_SECRET: storage.credentials},
                settings=_settings(job, gpus, storage),
                reconcile=lambda settings: reconciler(cluster, settings, reader),
            )
            asyncio.run(RunLoop(wiring, _ref(job), observer).run())
            return _outcome(cluster, job, directory, storage)


def _apply(cluster: LocalCluster, job: FineTuneJob) -> None:
    """Create the job or continue it; one that had failed is tried once more."""
    manifest = job.to_manifest()
    # What only the store may say.
    for field in ("uid", "generation"):
        manifest["metadata"].pop(field, None)
    manifest.pop("status", None)
    previous = cluster.job(_ref(job))
    if previous is not None:
        annotations = previous["metadata"].get("annotations") or {}
        if c.ANNOTATION_RETRY in annotations:
            prepare.retry_annotation(manifest, annotations[c.ANNOTATION_RETRY])
        if _phase(previous) == c.Phase.FAILED:
            prepare.retry_annotation(manifest, rfc3339(time.time()))
    cluster.apply_job(manifest)


def _finished(cluster: LocalCluster, job: FineTuneJob, directory: RunDirectory) -> Outcome | None:
    """The outcome of a run that succeeded before and whose result is here."""
    found = cluster.job(_ref(job))
    if found is None or _phase(found) != c.Phase.SUCCEEDED or not (directory.result / "manifest.json").exists():
        return None
    return Outcome(
        End.SUCCEEDED,
        found,
        directory.path,
        manifest=directory.read_result_manifest(),
        result=directory.result,
        already=True,
    )


def _settings(job: FineTuneJob, gpus: tuple[Gpu, ...], storage: ObjectStorage) -> Settings:
    """What an administrator would set: this is the user's own machine, so it may do what the user may."""
    return Settings(
        trainer=TrainerDefaults(
            image="this-machine",
            s3_endpoint=storage.endpoint if storage.embedded else None,
            s3_region=storage.region if storage.embedded else None,
            s3_secret=LOCAL_SECRET if storage.embedded else None,
            gpu_memory=str(prepare.device_memory(job, gpus)),
        ),
        permissions=Permissions(remote_code=True, privileged_pod_template=True, local_files=True),
        progress_patch_seconds=PROGRESS_PATCH_SECONDS,
    )


@contextlib.contextmanager
def _object_storage(job: FineTuneJob, options: RunOptions, directory: RunDirectory) -> Iterator[ObjectStorage]:
    """The job's own object store, or an embedded one where it names none."""
    s3 = job.spec.output.s3
    if s3.endpoint is not None or s3.secret_ref is not None:
        credentials = options.secrets[s3.secret_ref.name] if s3.secret_ref else {}
        yield ObjectStorage(s3.endpoint, s3.region, credentials, embedded=False)
        return
    server = SeaweedServer(directory.s3, access_key=secrets.token_hex(10), secret_key=secrets.token_urlsafe(30))
    try:
        server.start()
    except SeaweedError as error:
        raise ClusterError(str(error)) from error
    try:
        for bucket in named_buckets(job):
            server.create_bucket(bucket)
        yield ObjectStorage(server.endpoint, REGION, server.credentials_env(), embedded=True)
    finally:
        server.stop()


def _seed(job: FineTuneJob, options: RunOptions, storage: ObjectStorage, observer: Observer) -> None:
    """Copy the local folders of the job's buckets into the embedded store."""
    if options.buckets is None:
        return
    client = s3_client(storage.endpoint, storage.region, storage.credentials)
    try:
        seeded = seed(client, options.buckets, named_buckets(job))
    finally:
        client.close()
    if seeded.copied:
        observer.note(f"copied {seeded.copied} files ({seeded.size_bytes:,} bytes) from {options.buckets} into S3")


def _outcome(cluster: LocalCluster, job: FineTuneJob, directory: RunDirectory, storage: ObjectStorage) -> Outcome:
    """What the run came to; the result of a successful one is downloaded and verified."""
    found = cluster.job(_ref(job))
    assert found is not None
    end = _end(found)
    if end is not End.SUCCEEDED:
        return Outcome(end, found, directory.path)
    result = found["status"]["result"]
    client = s3_client(storage.endpoint, storage.region, storage.credentials)
    try:
        manifest = download_result(client, result["uri"], result.get("manifestSha256"), directory.result)
    finally:
        client.close()
    return Outcome(End.SUCCEEDED, found, directory.path, manifest=manifest, result=directory.result)


def _end(job: Mapping[str, Any]) -> End:
    """How a job ended; one that has not ended was stopped."""
    if _phase(job) == c.Phase.SUCCEEDED:
        return End.SUCCEEDED
    if _phase(job) != c.Phase.FAILED:
        return End.SUSPENDED
    conditions = {one["type"]: one["status"] for one in job["status"].get("conditions") or []}
    if conditions.get(c.Condition.ACCEPTED) == "False":
        return End.REFUSED
    return End.UNPLANNABLE if conditions.get(c.Condition.PLANNED) == "False" else End.FAILED


def _on_cpu(job: FineTuneJob) -> str:
    processes = max(1, job.spec.resources.gpus)
    return f"no GPU found: {processes} process{'es' if processes > 1 else ''} on the CPU"


def _ref(job: FineTuneJob) -> JobRef:
    return JobRef(job.metadata.namespace, job.name)


def _phase(job: Mapping[str, Any]) -> str:
    phase: str = (job.get("status") or {}).get("phase", "")
    return phase
