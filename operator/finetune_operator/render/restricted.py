"""Whether a pod template keeps the restricted Pod Security level.

Source: Kubernetes documentation, "Pod Security Standards", the controls of Baseline and Restricted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_VOLUMES = frozenset(
    {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
)
_SECCOMP = ("RuntimeDefault", "Localhost")
_SELINUX = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
_SYSCTLS = frozenset(
    {
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.ping_group_range",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_rmem",
        "net.ipv4.tcp_syncookies",
        "net.ipv4.tcp_wmem",
    }
)
_APPARMOR = "container.apparmor.security.beta.kubernetes.io/"


def restricted_violations(template: Mapping[str, Any]) -> list[str]:
    """What a core/v1 PodTemplateSpec breaks, one line for each; empty when it keeps the level."""
    metadata, spec = _map(template, "metadata"), _map(template, "spec")
    return [*_of_annotations(_map(metadata, "annotations")), *_of_pod(spec), *_of_containers(spec)]


def _of_annotations(annotations: Mapping[str, Any]) -> Iterator[str]:
    for name, value in annotations.items():
        if name.startswith(_APPARMOR) and value != "runtime/default" and not str(value).startswith("localhost/"):
            yield f"metadata.annotations: {name}={value}"


def _of_pod(spec: Mapping[str, Any]) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield f"spec.{name}"
    for volume in _maps(spec, "volumes"):
        for kind in volume:
            if kind != "name" and kind not in _VOLUMES:
                yield f"spec.volumes {volume.get('name')!r} is of kind {kind}"
    context = _map(spec, "securityContext")
    for sysctl in _maps(context, "sysctls"):
        if sysctl.get("name") not in _SYSCTLS:
            yield f"spec.securityContext.sysctls: {sysctl.get('name')}"
    yield from _of_context(context, "spec.securityContext")


def _of_containers(spec: Mapping[str, Any]) -> Iterator[str]:
    pod = _map(spec, "securityContext")
    for field in ("initContainers", "containers", "ephemeralContainers"):
        for container in _maps(spec, field):
            where = f"spec.{field} {container.get('name')!r}"
            context = _map(container, "securityContext")
            yield from _of_context(context, f"{where} securityContext")
            yield from _of_container(container, context, where)
            if context.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
                yield f"{where} does not set runAsNonRoot: true"
            if not (_map(context, "seccompProfile") or _map(pod, "seccompProfile")):
                yield f"{where} has no seccompProfile"


def _of_container(container: Mapping[str, Any], context: Mapping[str, Any], where: str) -> Iterator[str]:
    if context.get("privileged"):
        yield f"{where} is privileged"
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{where} does not set allowPrivilegeEscalation: false"
    capabilities = _map(context, "capabilities")
    if "ALL" not in (capabilities.get("drop") or ()):
        yield f"{where} does not drop ALL capabilities"
    added = sorted(str(one) for one in capabilities.get("add") or () if one != "NET_BIND_SERVICE")
    if added:
        yield f"{where} adds capabilities {', '.join(added)}"
    if context.get("procMount", "Default") != "Default":
        yield f"{where} sets procMount"
    if any(port.get("hostPort") for port in _maps(container, "ports")):
        yield f"{where} uses a hostPort"
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        yield from _of_handler(_map(container, name), f"{where} {name}")
    for name in ("postStart", "preStop"):
        yield from _of_handler(_map(_map(container, "lifecycle"), name), f"{where} lifecycle.{name}")


def _of_handler(handler: Mapping[str, Any], where: str) -> Iterator[str]:
    """Since 1.34: with a host of its own, the kubelet would call any address from the node."""
    for kind in ("httpGet", "tcpSocket"):
        if _map(handler, kind).get("host"):
            yield f"{where}.{kind}.host"


def _of_context(context: Mapping[str, Any], where: str) -> Iterator[str]:
    """What pod and containers have in common."""
    if _map(context, "windowsOptions").get("hostProcess"):
        yield f"{where}.windowsOptions.hostProcess"
    if context.get("runAsUser") == 0:
        yield f"{where}.runAsUser is 0"
    if "runAsNonRoot" in context and context["runAsNonRoot"] is not True:
        yield f"{where}.runAsNonRoot is not true"
    for name, allowed in (("seccompProfile", _SECCOMP), ("appArmorProfile", _SECCOMP)):
        profile = _map(context, name)
        if profile and profile.get("type") not in allowed:
            yield f"{where}.{name} is {profile.get('type')}"
    selinux = _map(context, "seLinuxOptions")
    if selinux.get("type", "") not in _SELINUX or selinux.get("user") or selinux.get("role"):
        yield f"{where}.seLinuxOptions"


def _map(source: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = source.get(name)
    return value if isinstance(value, Mapping) else {}


def _maps(source: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    value = source.get(name)
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
