"""From a pod, as Kubernetes has it, to the configuration of an OCI runtime, as a kubelet would have it made.

Pure but for the files that volumes are made of. What a kubelet refuses is refused here: a user that is not known to be
another than root, where the pod says `runAsNonRoot`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from images.engine import Image
from images.errors import ImageError

Manifest = Mapping[str, Any]
TERMINATION_MESSAGE = "termination-message"
_RESTRICTED = ("bounding", "effective", "inheritable", "permitted", "ambient")
_MASKED = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/sys/firmware"]
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


@dataclass(frozen=True)
class Surroundings:
    """What a pod refers to."""

    config_maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    claims: Mapping[str, Path] = field(default_factory=dict)
    """PersistentVolumeClaims: folders of this machine."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """By `fieldPath`."""
    token: Callable[[str], str] = lambda audience: ""
    """Of the pod's service account, for an audience; an empty one means the API server."""
    hosts: Mapping[str, str] = field(default_factory=dict)
    """/etc/hosts: name to address."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What the kubelet adds: the address of the API server."""


def configuration(image: Image, root: Path, pod: Manifest, around: Surroundings, folder: Path) -> dict[str, Any]:
    """`config.json` of an OCI bundle for a pod's only container.

    Args:
        image: its image.
        root: the image's root file system.
        pod: the PodSpec.
        around: what it refers to.
        folder: where its volumes are made.

    Raises ImageError where a kubelet would refuse the pod.
    """
    (container,) = pod["containers"]
    security = {**(pod.get("securityContext") or {}), **(container.get("securityContext") or {})}
    user, group = _user(image, security)
    return {
        "ociVersion": "1.0.2",
        "hostname": "pod",
        "root": {"path": str(root), "readonly": bool(security.get("readOnlyRootFilesystem"))},
        "process": {
            "terminal": False,
            "user": {"uid": user, "gid": group},
            "args": _arguments(image, container),
            "env": _environment(image, container, around),
            "cwd": container.get("workingDir") or image.config.get("WorkingDir") or "/",
            "capabilities": {kind: _capabilities(security) for kind in _RESTRICTED},
            "noNewPrivileges": security.get("allowPrivilegeEscalation") is False,
        },
        "mounts": [*_own_mounts(folder, around), *_volume_mounts(pod, container, around, folder)],
        "linux": {
            # The network stays the machine's: what the pod talks to listens on the loopback address.
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")],
            "maskedPaths": _MASKED,
            "readonlyPaths": _READ_ONLY,
        },
    }


def _user(image: Image, security: Manifest) -> tuple[int, int]:
    name, _, group = str(image.config.get("User", "")).partition(":")
    user = str(security.get("runAsUser", name))
    if security.get("runAsNonRoot") and (not user.isdigit() or int(user) == 0):
        raise ImageError(f"runAsNonRoot: the image's user is {user or 'root'!r}; a kubelet wants a number other than 0")
    return int(user or 0), int(security.get("runAsGroup", group or 0))


def _arguments(image: Image, container: Manifest) -> list[str]:
    if container.get("command"):
        return [*container["command"], *(container.get("args") or [])]
    return [*(image.config.get("Entrypoint") or []), *(container.get("args") or image.config.get("Cmd") or [])]


def _environment(image: Image, container: Manifest, around: Surroundings) -> list[str]:
    values = dict(one.split("=", 1) for one in image.config.get("Env") or [])
    values |= around.environment
    for one in container.get("env") or []:
        source = one.get("valueFrom") or {}
        if "fieldRef" in source:
            values[one["name"]] = around.fields[source["fieldRef"]["fieldPath"]]
        elif "secretKeyRef" in source:
            wanted = source["secretKeyRef"]
            found = around.secrets.get(wanted["name"], {})
            if wanted["key"] in found:
                values[one["name"]] = found[wanted["key"]]
            elif not wanted.get("optional"):
                raise ImageError(f"there is no key {wanted['key']} in the Secret {wanted['name']}")
        else:
            values[one["name"]] = one.get("value", "")
    return [f"{name}={value}" for name, value in values.items()]


def _capabilities(security: Manifest) -> list[str]:
    if (security.get("capabilities") or {}).get("drop") != ["ALL"]:
        raise ImageError("the container keeps capabilities; a pod of the restricted level drops ALL")
    return []


def _own_mounts(folder: Path, around: Surroundings) -> list[dict[str, Any]]:
    hosts = folder / "hosts"
    names = {"localhost": "127.0.0.1", **around.hosts}
    hosts.write_text("".join(f"{address}\t{name}\n" for name, address in names.items()), encoding="utf-8")
    message = folder / TERMINATION_MESSAGE
    message.touch()
    message.chmod(0o666)
    return [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        _tmpfs("/dev", "mode=755", "size=64m"),
        _bind("/dev/termination-log", message),
        _tmpfs("/dev/shm", "mode=1777", "size=64m"),
        _bind("/etc/hosts", hosts),
    ]


def _tmpfs(path: str, *options: str) -> dict[str, Any]:
    return {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", *options]}


def _bind(path: str, source: Path, *options: str) -> dict[str, Any]:
    return {"destination": path, "type": "bind", "source": str(source), "options": ["rbind", *(options or ("rw",))]}


def _volume_mounts(pod: Manifest, container: Manifest, around: Surroundings, folder: Path) -> list[dict[str, Any]]:
    volumes = {one["name"]: one for one in pod.get("volumes") or []}
    mounts = []
    for one in container.get("volumeMounts") or []:
        volume = volumes[one["name"]]
        if (volume.get("emptyDir") or {}).get("medium") == "Memory":
            mounts.append(_tmpfs(one["mountPath"], "mode=1777"))
            continue
        source = _source(volume, around, folder / "volumes" / one["name"])
        mounts.append(_bind(one["mountPath"], source, "ro" if one.get("readOnly") else "rw"))
    return mounts


def _source(volume: Manifest, around: Surroundings, folder: Path) -> Path:
    """The folder that a volume is, on this machine."""
    if "persistentVolumeClaim" in volume:
        return around.claims[volume["persistentVolumeClaim"]["claimName"]]
    folder.mkdir(parents=True, exist_ok=True)
    if "emptyDir" in volume:
        folder.chmod(0o777)
        return folder
    for part in (volume.get("projected") or {}).get("sources") or [volume]:
        for name, text in _files(part, around).items():
            (folder / name).write_text(text, encoding="utf-8")
            (folder / name).chmod(0o644)
    return folder


def _files(source: Manifest, around: Surroundings) -> Mapping[str, str]:
    if "serviceAccountToken" in source:
        return {source["serviceAccountToken"]["path"]: around.token(source["serviceAccountToken"].get("audience", ""))}
    if "configMap" in source:
        found = around.config_maps[source["configMap"]["name"]]
        items = source["configMap"].get("items") or [{"key": key, "path": key} for key in found]
        return {item["path"]: found[item["key"]] for item in items}
    if "secret" in source:
        return around.secrets[source["secret"]["secretName"]]
    raise ImageError(f"volumes of this kind are not made here: {sorted(source)}")
