"""What can go wrong with the control plane.

ControlPlaneError
├── BinariesMissing   no place has the binaries, and they cannot be built here
├── BuildFailed       `go build` failed or took too long
├── CertificatesFailed  openssl is missing or failed
├── StartFailed       a component exited early or was not ready in time
│   └── PortTaken     somebody took its port between the choice and its start
├── NotRunning        the control plane, or one component of it, does not run
└── ApiError          the API server refused a request
"""

from __future__ import annotations


class ControlPlaneError(Exception):
    """The base of every error of this package."""


class BinariesMissing(ControlPlaneError):
    """No place has the binaries, and they cannot be built here."""


class BuildFailed(ControlPlaneError):
    """`go build` failed or took too long."""


class CertificatesFailed(ControlPlaneError):
    """openssl is missing or failed."""


class StartFailed(ControlPlaneError):
    """A component exited early or was not ready in time; the message ends with its log's tail."""


class PortTaken(StartFailed):
    """Somebody took a component's port between the choice and its start; other ports will do."""


class NotRunning(ControlPlaneError):
    """The control plane, or one component of it, does not run."""


class ApiError(ControlPlaneError):
    """The API server refused a request."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status code."""
