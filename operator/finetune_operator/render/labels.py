"""Metadata of children.

Labels are ours alone: one that is copied from the job (Argo CD's `app.kubernetes.io/instance`) would make somebody
else's tool believe that it owns the child, and delete it.
"""

from __future__ import annotations

from typing import Any

from finetune_operator import constants as c
from finetune_operator.render.attempt import Attempt

NAME = "finetune-trainer"


def labels(attempt: Attempt) -> dict[str, str]:
    """Of a child, and of its pods."""
    return {
        c.LABEL_NAME: NAME,
        c.LABEL_MANAGED_BY: c.MANAGED_BY,
        c.LABEL_JOB: attempt.job.name,
        c.LABEL_JOB_UID: attempt.uid,
        c.LABEL_ATTEMPT: str(attempt.number),
    }


def child_metadata(attempt: Attempt, digest: str) -> dict[str, Any]:
    """Of a child of the job.

    digest: SHA-256 of the trainer's configuration.
    """
    return {
        "name": attempt.name,
        "namespace": attempt.job.namespace,
        "labels": labels(attempt),
        "annotations": {
            c.ANNOTATION_ARGOCD_IGNORE_UPDATES: "true",
            c.ANNOTATION_CONFIG_DIGEST: digest,
        },
        "ownerReferences": [
            {
                "apiVersion": c.API_VERSION,
                "kind": c.KIND,
                "name": attempt.job.name,
                "uid": attempt.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }
