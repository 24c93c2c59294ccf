"""What Flux, kpt and Helm's `--wait` see in an object of a kind that they do not know.

After `Compute` of sigs.k8s.io/cli-utils, `pkg/kstatus/status` (`status.go` and `generic.go`): deletion, generation, the
conditions Reconciling and Stalled in the order in which they stand, then Ready, and Current for want of better.
"""

from __future__ import annotations

from typing import Any

CURRENT, IN_PROGRESS, FAILED, TERMINATING = "Current", "InProgress", "Failed", "Terminating"


def compute(obj: dict[str, Any]) -> str:
    """One of the constants above."""
    meta, status = obj["metadata"], obj.get("status", {})
    if meta.get("deletionTimestamp"):
        return TERMINATING
    # An object without a status passes: kstatus cannot tell that somebody will write one.
    if "generation" in meta and status.get("observedGeneration", meta["generation"]) != meta["generation"]:
        return IN_PROGRESS
    conditions = status.get("conditions", [])
    for condition in conditions:
        if condition["type"] == "Reconciling" and condition["status"] == "True":
            return IN_PROGRESS
        if condition["type"] == "Stalled" and condition["status"] == "True":
            return FAILED
    for condition in conditions:
        if condition["type"] == "Ready":
            return CURRENT if condition["status"] == "True" else IN_PROGRESS
    return CURRENT
