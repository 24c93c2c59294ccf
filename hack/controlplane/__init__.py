"""A real Kubernetes control plane on this machine, for development, tests and demos.

See README.md beside this file. Nothing of the operator or the trainer is imported here.
"""

from .binaries import Binaries, find_binaries, find_helm, needed
from .components import APISERVER, CONTROLLER_MANAGER, ETCD, TRAINING_OPERATOR
from .errors import (
    ApiError,
    BinariesMissing,
    BuildFailed,
    CertificatesFailed,
    ControlPlaneError,
    NotRunning,
    StartFailed,
)
from .plane import ControlPlane

__all__ = [
    "APISERVER",
    "CONTROLLER_MANAGER",
    "ETCD",
    "TRAINING_OPERATOR",
    "ApiError",
    "Binaries",
    "BinariesMissing",
    "BuildFailed",
    "CertificatesFailed",
    "ControlPlane",
    "ControlPlaneError",
    "NotRunning",
    "StartFailed",
    "find_binaries",
    "find_helm",
    "needed",
]
