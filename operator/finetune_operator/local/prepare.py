"""From a user's job to the one that a run's folder holds: paths made absolute, changes refused, secrets checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_operator import constants as c
from finetune_operator.api.v1alpha1 import FineTuneJob, FineTuneJobSpec
from finetune_operator.api.v1alpha1.rules import IMMUTABLE
from finetune_operator.errors import FinetuneError, InvalidManifest, PlanningError
from finetune_operator.local.gpus import Gpu

_FILE = "file:"


def with_absolute_files(job: FineTuneJob, folder: Path) -> FineTuneJob:
    """The job with every relative `file:` URI resolved against `folder`, the manifest's."""
    wire = job.to_manifest()
    spec = wire["spec"]
    sets = [spec["dataset"], *(one["dataset"] for one in spec.get("adapters") or () if one.get("dataset"))]
    holders = [spec["model"], *sets]
    for data in sets:
        holders += [data.get("validation"), *(data.get("sources") or ())]
    for holder in holders:
        if holder and str(holder.get("uri", "")).startswith(_FILE):
            holder["uri"] = _absolute(holder["uri"], folder)
    return FineTuneJob.model_validate(wire)


def without_reuse(spec: FineTuneJobSpec) -> FineTuneJobSpec:
    """A spec that is always trained: what is finished is found in the run's folder, and `--fresh` begins anew."""
    return spec.model_copy(update={"output": spec.output.model_copy(update={"reuse": False})})


def local_path(uri: str) -> Path:
    """The path that a `file:` URI names, taken literally as the trainer does."""
    text = uri.removeprefix(_FILE)
    return Path(text.removeprefix("//") if text.startswith("///") else text)


def check_secrets(job: FineTuneJob, secrets: Mapping[str, Mapping[str, str]]) -> None:
    """Raise InvalidManifest for every Secret (and key) that the job names and that is not among `secrets`."""
    problems = []
    for field, name, keys in _secret_references(job):
        missing = [key for key in keys if key not in secrets.get(name, {})]
        if name not in secrets:
            problems.append(
                f"{field}: there is no cluster to take secret {name!r} from; pass --secret {name}=FILE, a file of "
                f"KEY=VALUE lines with {' and '.join(keys)}"
            )
        elif missing:
            problems.append(f"{field}: the file of secret {name!r} has no {' and no '.join(missing)}; add it")
    if problems:
        raise InvalidManifest(problems)


def check_gpus(job: FineTuneJob, gpus: Sequence[Gpu]) -> None:
    """Raise PlanningError when the job needs more GPUs than this machine has; one that has none uses its CPU."""
    wanted = job.spec.resources.gpus
    if gpus and wanted > len(gpus):
        raise PlanningError(
            f"spec.resources.gpus: {wanted} is more than the {len(gpus)} GPU(s) of this machine; use at most "
            f"{len(gpus)}, or run the job in a cluster"
        )


def device_memory(job: FineTuneJob, gpus: Sequence[Gpu]) -> int:
    """Bytes that one process may use: the smallest GPU's, or on the CPU an equal share of this machine's memory."""
    if gpus:
        return min(gpu.memory_bytes for gpu in gpus)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return physical // max(1, job.spec.resources.gpus)


def check_changes(folder: Path, old: Mapping[str, Any], new: FineTuneJob) -> None:
    """Raise FinetuneError when `new` differs from the folder's job in more than its runPolicy."""
    if old["metadata"]["name"] != new.name:
        raise FinetuneError(
            f"{folder} holds the run of another job, {old['metadata']['name']!r}; name another folder with -o, or "
            "start over with --fresh"
        )
    before = without_reuse(FineTuneJobSpec.model_validate(old["spec"])).to_wire()
    after = without_reuse(new.spec).to_wire()
    changes = [
        change for name in IMMUTABLE for change in _differences(before.get(name), after.get(name), f"spec.{name}")
    ]
    if changes:
        listed = "\n".join(f"  {change}" for change in changes)
        raise FinetuneError(
            f"{folder} holds a run of another {new.name!r}:\n{listed}\nContinue it with the manifest as it was, start "
            "over with --fresh, or name another folder with -o"
        )


def read_secret(argument: str) -> tuple[str, dict[str, str]]:
    """`NAME=FILE`, where FILE holds `KEY=VALUE` lines, as (name, values). Raises FinetuneError; it shows no value."""
    name, separator, file = argument.partition("=")
    if not (name and separator and file):
        raise FinetuneError(f"--secret {argument!r}: write NAME=FILE, where FILE holds KEY=VALUE lines")
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FinetuneError(f"--secret {name}: cannot read {file}: {error}") from error
    values = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, separator, value = line.strip().removeprefix("export ").partition("=")
        if not separator or not key.strip():
            raise FinetuneError(f"--secret {name}: {file}, line {number}: write KEY=VALUE")
        values[key.strip()] = value.strip().strip("\"'")
    return name, values


def _absolute(uri: str, folder: Path) -> str:
    # Links are not followed: the name of a linked file, not of what it leads to, says what kind of file it is.
    path = os.path.normpath(folder.absolute() / local_path(uri))
    if any(character.isspace() for character in path):
        raise FinetuneError(f"{uri}: the path {path} has a space in it, which a URI cannot have; move or rename it")
    return f"{_FILE}//{path}"


def _secret_references(job: FineTuneJob) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    token, s3 = job.spec.model.token_secret_ref, job.spec.output.s3.secret_ref
    if token is not None:
        yield "spec.model.tokenSecretRef", token.name, (token.key,)
    if s3 is not None:
        yield "spec.output.s3.secretRef", s3.name, ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}")
    elif old != new:
        yield f"{path}: {_shown(new)} now, {_shown(old)} there"


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def retry_annotation(manifest: dict[str, Any], now: str) -> None:
    """Edit: ask the operator for another try of a job that has failed."""
    manifest["metadata"].setdefault("annotations", {})[c.ANNOTATION_RETRY] = now
