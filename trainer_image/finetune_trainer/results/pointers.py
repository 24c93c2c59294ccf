"""What names a finished run: `latest.json`, and a file for each spec, by which the same job finds its result again."""

from __future__ import annotations

import hashlib
import json
import logging

from pydantic import ValidationError

from finetune_trainer.contract import ResultManifest, RunResult, TrainerConfig
from finetune_trainer.contract.outcome import AdapterResult
from finetune_trainer.errors import InputMissing, UsageError
from finetune_trainer.storage import MANIFEST, ObjectStore, S3Uri

LATEST = "latest.json"
MERGED = "merged"
"""Folder of a run's stand-alone model."""
SPECS = "specs"
"""Folder of the files that are named for the SHA-256 of a spec."""

logger = logging.getLogger(__name__)


def name_run(config: TrainerConfig, store: ObjectStore, manifest_sha256: str, created_at: str) -> None:
    """Let `latest.json`, and the file of its spec, name this run's result."""
    named = {
        "job": f"{config.job.namespace}/{config.job.name}",
        "uid": config.job.uid,
        "uri": config.run_uri,
        "manifestSha256": manifest_sha256,
        "createdAt": created_at,
    }
    output, content = S3Uri.parse(config.output.uri), json.dumps(named, indent=2).encode()
    store.put_bytes(output.child(LATEST), content)
    if config.job.spec_sha256 is not None:
        store.put_bytes(output.child(_of_spec(config.job.spec_sha256)), content)


def named_manifest(store: ObjectStore, output: S3Uri, name: str) -> tuple[S3Uri, bytes]:
    """The run that such a file names, and its manifest.

    Raises UsageError where it names none, or one that is not below the output, or whose manifest has changed since;
    InputMissing where the manifest is gone.
    """
    pointer = output.child(name)
    content = store.get_bytes(pointer)
    try:
        said = json.loads(content)
        named, sha256 = S3Uri.parse(str(said["uri"])), said.get("manifestSha256")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{pointer} does not say where the run is: {error!r}") from error
    if named.bucket != output.bucket or not named.key.startswith(output.prefix):
        raise UsageError(f"{pointer} names {named}, which is elsewhere; name the run itself to use it")
    manifest = store.get_bytes(named.child(MANIFEST))
    if hashlib.sha256(manifest).hexdigest() != sha256:
        # Another attempt wrote it, and was not named: it may have missed its gates.
        raise UsageError(
            f"{named.child(MANIFEST)} was written anew since {pointer} named it; name the run itself to use it as it is"
        )
    return named, manifest


def earlier_result(config: TrainerConfig, store: ObjectStore) -> RunResult | None:
    """The result of a run of the same spec, if the job takes one and all of it is there.

    What is found may change from one moment to the next: one rank looks, for all.
    """
    if not config.output.reuse or config.job.spec_sha256 is None:
        return None
    output, name = S3Uri.parse(config.output.uri), _of_spec(config.job.spec_sha256)
    if not store.exists(output.child(name)):
        return None
    try:
        uri, content = named_manifest(store, output, name)
        manifest = ResultManifest.model_validate_json(content)
    except (InputMissing, UsageError, ValidationError) as error:
        logger.warning("%s names no result that can be used, so the job trains: %s", output.child(name), error)
        return None
    if not is_complete(store, uri, manifest):
        logger.warning("files of %s are missing, so the job trains", uri)
        return None
    logger.info("%s is the result of the same spec: nothing is trained", uri)
    return _result(uri, manifest, hashlib.sha256(content).hexdigest(), reused=manifest.uid != config.job.uid)


def is_complete(store: ObjectStore, uri: S3Uri, manifest: ResultManifest) -> bool:
    """Whether a manifest lists files, and every one of them is there, of its size."""
    sizes = {uri.relative(child): size for child, size in store.list(uri)}
    return bool(manifest.files) and all(sizes.get(entry.path) == entry.size_bytes for entry in manifest.files)


def _result(uri: S3Uri, manifest: ResultManifest, sha256: str, *, reused: bool) -> RunResult:
    return RunResult(
        uri=str(uri),
        manifest_sha256=sha256,
        size_bytes=sum(entry.size_bytes for entry in manifest.files),
        trainable_parameters=manifest.trainable_parameters,
        total_parameters=manifest.total_parameters,
        evaluation=manifest.evaluation,
        merged_uri=f"{uri}/{MERGED}" if manifest.merged is not None else None,
        adapters=tuple(
            AdapterResult(
                name=one.name,
                trainable_parameters=one.trainable_parameters,
                metrics=one.evaluation.tuned if one.evaluation is not None else {},
            )
            for one in manifest.adapters
        ),
        reused=reused,
    )


def _of_spec(sha256: str) -> str:
    return f"{SPECS}/{sha256}.json"
