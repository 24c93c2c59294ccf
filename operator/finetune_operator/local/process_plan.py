"""A container as a process: what to run, with which environment and which files. Pure: it decides, nothing is written.

Outside a container the paths that a pod's author wrote do not exist. Each volume becomes a folder of the pod's own, and
every path below a `mountPath` in command, arguments and environment is replaced by its place in that folder. Paths that
each machine has (`/tmp`, `/dev/shm`) stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_operator.local.environment import container_environment, expand
from finetune_operator.local.sources import CannotRun, Sources
from finetune_operator.local.volumes import PlannedFile, Volume, plan_volume

SHARED_PATHS = ("/tmp", "/dev/shm")  # nosec B108  # a path in the pod
"""Mounts whose path a process finds on its own machine."""
TERMINATION_LOG_VARIABLE = "FINETUNE_TERMINATION_LOG"
PVC_ROOT_VARIABLE = "FINETUNE_PVC_ROOT"


@dataclass(frozen=True, slots=True)
class Machine:
    """What of this machine a plan depends on."""

    programs: Mapping[str, Sequence[str]]
    """Program name in a command to what is run in its place: `python` to this interpreter."""
    inherited: Mapping[str, str]
    """Environment that each process starts with."""
    claims: Path
    """Folder with one folder for each PersistentVolumeClaim."""
    cores: int
    """CPU cores that the processes share."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Environment that is set last."""


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process, ready to be carried out."""

    container: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    working_directory: Path
    directories: tuple[Path, ...]
    files: tuple[PlannedFile, ...]
    termination_log: Path
    """Where the process leaves its termination message."""
    log_is_message: bool
    """Whether a failed process without a message has the end of its log taken for one."""


def plan_process(
    pod: Mapping[str, Any], container: Mapping[str, Any], folder: Path, sources: Sources, machine: Machine
) -> ProcessPlan:
    """The process that stands for `container` of `pod`.

    Args:
        pod: the pod's manifest.
        container: one of its containers or init containers.
        folder: the pod's own folder.
        sources: where Secrets, ConfigMaps and tokens come from.
        machine: what this machine puts in the place of an image.

    Raises:
        CannotRun: something that it needs is missing, or has no meaning outside a container; the message names it.
    """
    name = container["name"]
    volumes = {
        volume["name"]: plan_volume(volume, folder / "volumes" / volume["name"], machine.claims, sources)
        for volume in pod["spec"].get("volumes") or []
    }
    mounts = _mounts(container, volumes)
    termination_log = folder / "containers" / name / "termination-log"
    declared = container_environment(pod, container, sources)
    environment = {
        "OMP_NUM_THREADS": str(threads(declared, machine.cores)),
        # Pods share the machine with each other and with the S3 server: threads that spin while they wait take away
        # from both what they wait for.
        "OMP_WAIT_POLICY": "PASSIVE",
        **_inherited(machine.inherited, declared),
        **{key: map_paths(value, mounts) for key, value in declared.items()},
        **dict(_shared_mounts(container, volumes)),
        TERMINATION_LOG_VARIABLE: str(termination_log),
        PVC_ROOT_VARIABLE: str(machine.claims),
        **machine.overrides,
    }
    work = container.get("workingDir")
    working_directory = Path(map_paths(work, mounts)) if work else folder / "containers" / name / "work"
    used = {mount["name"] for mount in container.get("volumeMounts") or []}
    return ProcessPlan(
        container=name,
        argv=_argv(container, declared, mounts, machine.programs),
        environment=environment,
        working_directory=working_directory,
        directories=(
            termination_log.parent,
            working_directory,
            *(volumes[one].path for one in sorted(used)),
        ),
        files=tuple(file for one in sorted(used) for file in volumes[one].files),
        termination_log=termination_log,
        log_is_message=container.get("terminationMessagePolicy") == "FallbackToLogsOnError",
    )


def map_paths(text: str, mounts: Sequence[tuple[str, Path]]) -> str:
    """Replace every path below one of `mounts` (mount path, folder; the longest first) in a command or a value.

    A path counts where it starts a word: in `--config=/etc/x/a.json`, `file:///etc/x/a.json` and `/a:/etc/x`, but not
    in `/srv/etc/x`.
    """
    if not mounts:
        return text
    folders = dict(mounts)
    choices = "|".join(re.escape(path) for path, _ in mounts)
    # "//" stands before a path only as the end of a URI's scheme.
    pattern = rf"(?<![\w.\-/~])({choices})(?![\w.\-])|(?<=://)({choices})(?![\w.\-])"
    return re.sub(pattern, lambda found: str(folders[found[1] or found[2]]), text)


def threads(environment: Mapping[str, str], cores: int) -> int:
    """Threads for each process of a job that has the whole machine: its cores divided by WORLD_SIZE."""
    world = environment.get("WORLD_SIZE", "1")
    return max(1, cores // max(1, int(world))) if world.isdecimal() else 1


def _mounts(container: Mapping[str, Any], volumes: Mapping[str, Volume]) -> list[tuple[str, Path]]:
    found = []
    for mount in container.get("volumeMounts") or []:
        path = mount["mountPath"].rstrip("/")
        if mount["name"] not in volumes:
            raise CannotRun(
                f"container {container['name']} mounts volume {mount['name']!r}, which the pod does not have"
            )
        if path not in SHARED_PATHS:
            found.append((path, volumes[mount["name"]].path / mount.get("subPath", "")))
    return sorted(found, key=lambda pair: -len(pair[0]))


def _shared_mounts(container: Mapping[str, Any], volumes: Mapping[str, Volume]) -> Iterator[tuple[str, str]]:
    """A volume for temporary files serves through TMPDIR."""
    for mount in container.get("volumeMounts") or []:
        if mount["mountPath"].rstrip("/") == "/tmp":  # nosec B108  # a path in the pod
            yield "TMPDIR", str(volumes[mount["name"]].path)


def _inherited(environment: Mapping[str, str], declared: Mapping[str, str]) -> Mapping[str, str]:
    """This machine's environment, without what would mix with credentials that the pod brings."""
    if "AWS_ACCESS_KEY_ID" not in declared:
        return environment
    return {key: value for key, value in environment.items() if not key.startswith("AWS_")}


def _argv(
    container: Mapping[str, Any],
    environment: Mapping[str, str],
    mounts: Sequence[tuple[str, Path]],
    programs: Mapping[str, Sequence[str]],
) -> tuple[str, ...]:
    command = container.get("command")
    if not command:
        raise CannotRun(
            f"container {container['name']} has no command: the entrypoint of image {container.get('image', '')!r} is "
            "not known outside a container; set command"
        )
    words = [map_paths(expand(word, environment), mounts) for word in [*command, *(container.get("args") or [])]]
    return (*programs.get(words[0], (words[0],)), *words[1:])
