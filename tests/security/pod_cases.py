"""Every field that the Pod Security Standards speak of (Kubernetes 1.36), as overlays of a job's pod.

Source: k8s.io/pod-security-admission, one check for each control of Baseline and Restricted.
"""

from __future__ import annotations

from typing import Any

SAFE = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
CLAIM = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
APPARMOR = "container.apparmor.security.beta.kubernetes.io"


def pod(**spec: Any) -> dict[str, Any]:
    """An overlay of the pod."""
    return {"spec": spec}


def context(**changes: Any) -> dict[str, Any]:
    """An overlay of the pod's security context."""
    return pod(securityContext=changes)


def own(**changes: Any) -> dict[str, Any]:
    """An overlay of the trainer's container."""
    return pod(containers=[{"name": "pytorch", **changes}])


def ours(**changes: Any) -> dict[str, Any]:
    """An overlay of the trainer's container's security context."""
    return own(securityContext=changes)


def side(kind: str = "containers", **changes: Any) -> dict[str, Any]:
    """One more container, which keeps the level but for the changes."""
    return pod(**{kind: [{"name": "side", "image": "i", "securityContext": {**SAFE, **changes}}]})


def probe(name: str, **handler: Any) -> dict[str, Any]:
    return own(**{name: handler})


def hook(name: str, **handler: Any) -> dict[str, Any]:
    return own(lifecycle={name: handler})


def volume(**source: Any) -> dict[str, Any]:
    return pod(volumes=[{"name": "v", **source}])


REFUSED: dict[str, dict[str, Any]] = {
    # ---- Baseline ----
    "hostProcess of the pod": context(windowsOptions={"hostProcess": True}),
    "hostProcess of the container": ours(windowsOptions={"hostProcess": True}),
    "hostNetwork": pod(hostNetwork=True),
    "hostPID": pod(hostPID=True),
    "hostIPC": pod(hostIPC=True),
    "privileged": ours(privileged=True, allowPrivilegeEscalation=None),
    "privileged init container": side("initContainers", privileged=True, allowPrivilegeEscalation=True),
    "capability SYS_ADMIN": ours(capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]}),
    "capability CAP_NET_RAW": ours(capabilities={"drop": ["ALL"], "add": ["NET_BIND_SERVICE", "NET_RAW"]}),
    "capability ALL": side(capabilities={"drop": ["ALL"], "add": ["ALL"]}),
    "hostPath": volume(hostPath={"path": "/"}),
    "hostPort": own(ports=[{"containerPort": 80, "hostPort": 80}]),
    "probe of another host": probe("livenessProbe", httpGet={"port": 80, "host": "169.254.169.254"}),
    "startup probe of another host": probe("startupProbe", tcpSocket={"port": 80, "host": "10.0.0.1"}),
    "readiness probe of another host": probe("readinessProbe", httpGet={"port": 80, "host": "localhost"}),
    "postStart at another host": hook("postStart", httpGet={"port": 80, "host": "169.254.169.254"}),
    "preStop at another host": hook("preStop", httpGet={"port": 80, "host": "x"}),
    "AppArmor unconfined, pod": context(appArmorProfile={"type": "Unconfined"}),
    "AppArmor unconfined, container": ours(appArmorProfile={"type": "Unconfined"}),
    "AppArmor unconfined, annotation": {"metadata": {"annotations": {f"{APPARMOR}/pytorch": "unconfined"}}},
    "SELinux type": context(seLinuxOptions={"type": "spc_t"}),
    "SELinux user": ours(seLinuxOptions={"user": "system_u"}),
    "SELinux role": ours(seLinuxOptions={"role": "system_r"}),
    "procMount": pod(hostUsers=False, **ours(procMount="Unmasked")["spec"]),
    "seccomp Unconfined, pod": context(seccompProfile={"type": "Unconfined"}),
    "seccomp Unconfined, container": ours(seccompProfile={"type": "Unconfined"}),
    "sysctl kernel.msgmax": context(sysctls=[{"name": "kernel.msgmax", "value": "1"}]),
    "sysctl net.core.somaxconn": context(sysctls=[{"name": "net.core.somaxconn", "value": "1"}]),
    # ---- Restricted ----
    **{
        f"volume {kind}": volume(**{kind: source})
        for kind, source in {
            "nfs": {"server": "s", "path": "/"},
            "iscsi": {"targetPortal": "10.0.0.1", "iqn": "iqn.2001-04.com.example:a", "lun": 0},
            "glusterfs": {"endpoints": "e", "path": "p"},
            "rbd": {"monitors": ["m"], "image": "i"},
            "cephfs": {"monitors": ["m"]},
            "fc": {"targetWWNs": ["w"], "lun": 0},
            "azureFile": {"secretName": "s", "shareName": "n"},
            "azureDisk": {"diskName": "d", "diskURI": "https://a.blob.core.windows.net/c/d.vhd"},
            "awsElasticBlockStore": {"volumeID": "v"},
            "gcePersistentDisk": {"pdName": "d"},
            "gitRepo": {"repository": "r"},
            "flexVolume": {"driver": "a/b"},
            "portworxVolume": {"volumeID": "v"},
            "vsphereVolume": {"volumePath": "v"},
            "photonPersistentDisk": {"pdID": "p"},
            "quobyte": {"registry": "r:1", "volume": "v"},
            "cinder": {"volumeID": "v"},
            "flocker": {"datasetName": "d"},
            "scaleIO": {"gateway": "g", "system": "s", "secretRef": {"name": "x"}, "volumeName": "v"},
            "storageos": {"volumeName": "v"},
        }.items()
    },
    "allowPrivilegeEscalation": ours(allowPrivilegeEscalation=True),
    "allowPrivilegeEscalation not said": ours(allowPrivilegeEscalation=None),
    "runAsNonRoot false, pod": context(runAsNonRoot=False),
    "runAsNonRoot false, container": ours(runAsNonRoot=False),
    "runAsNonRoot not said": context(runAsNonRoot=None),
    "runAsUser 0, pod": context(runAsUser=0),
    "runAsUser 0, container": ours(runAsUser=0),
    "runAsUser 0, side car": side(runAsUser=0),
    "runAsUser 0, init container": side("initContainers", runAsUser=0),
    "seccomp not said": context(seccompProfile=None),
    "no security context": pod(securityContext=None),
    "no security context of the container": own(securityContext=None),
    "capabilities kept": ours(capabilities=None),
    "capabilities dropped in part": ours(capabilities={"drop": ["NET_RAW"]}),
    "bare side car": pod(containers=[{"name": "side", "image": "i"}]),
    "bare init container": pod(initContainers=[{"name": "init", "image": "i"}]),
    "bare side car that stays": pod(initContainers=[{"name": "init", "image": "i", "restartPolicy": "Always"}]),
}
KEPT: dict[str, dict[str, Any]] = {
    "nothing": {},
    "side car": side(),
    "init container": side("initContainers"),
    "NET_BIND_SERVICE": ours(capabilities={"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}),
    "another user": context(runAsUser=1000, runAsGroup=0, fsGroup=1000, supplementalGroups=[5]),
    "seccomp of the node": ours(seccompProfile={"type": "Localhost", "localhostProfile": "p.json"}),
    "AppArmor of the runtime": ours(appArmorProfile={"type": "RuntimeDefault"}),
    "AppArmor of the node, annotation": {"metadata": {"annotations": {f"{APPARMOR}/pytorch": "localhost/p"}}},
    "SELinux level": context(seLinuxOptions={"type": "container_t", "level": "s0:c1"}),
    "sysctl net.ipv4.tcp_rmem": context(sysctls=[{"name": "net.ipv4.tcp_rmem", "value": "4096 87380 6291456"}]),
    "port": own(ports=[{"containerPort": 80}]),
    "probe": probe("livenessProbe", httpGet={"port": 80, "path": "/"}),
    "hook": hook("preStop", exec={"command": ["true"]}),
    "secret": volume(secret={"secretName": "s"}),
    "claim": volume(persistentVolumeClaim={"claimName": "c"}),
    "ephemeral": volume(
        ephemeral={
            "volumeClaimTemplate": {
                "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
            }
        }
    ),
    "csi": volume(csi={"driver": "d"}),
    "downward": volume(downwardAPI={"items": [{"path": "n", "fieldRef": {"fieldPath": "metadata.name"}}]}),
    "procMount Default": ours(procMount="Default"),
}
