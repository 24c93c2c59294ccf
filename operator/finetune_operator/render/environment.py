"""The environment of the trainer's container. `PET_*` and their like are added by the training operator."""

from __future__ import annotations

from typing import Any

from finetune_operator import constants as c
from finetune_operator.render.attempt import Attempt
from finetune_operator.render.configmap import CA_KEY
from finetune_operator.render.volumes import PROGRESS_CA, PROGRESS_TOKEN, claim_path

_HOME = f"{c.WORK_DIRECTORY}/home"


def environment(attempt: Attempt) -> list[dict[str, Any]]:
    """The list of core/v1 EnvVar."""
    return [*_folders(attempt), *_progress(attempt), *_credentials(attempt)]


def _folders(attempt: Attempt) -> list[dict[str, Any]]:
    """Everything that libraries write goes to volumes: the root file system is read-only."""
    values = {
        "FINETUNE_WORKDIR": c.WORK_DIRECTORY,
        "HOME": _HOME,
        # The user that the pod runs as need not be in the image's /etc/passwd, where getpass would look it up.
        "USER": "finetune",
        "HF_HOME": f"{c.WORK_DIRECTORY}/huggingface",
        "TMPDIR": "/tmp",  # nosec B108  # a path in the pod
    }
    mirror = attempt.defaults.model_mirror_claim
    if mirror:
        values["FINETUNE_MODEL_MIRROR"] = claim_path(mirror)
    if attempt.defaults.s3_link_local:
        values["FINETUNE_S3_LINK_LOCAL"] = "true"
    return [{"name": name, "value": value} for name, value in values.items()]


def _progress(attempt: Attempt) -> list[dict[str, Any]]:
    """Kubeflow Trainer's protocol. Who reports is told by the token, so the URL is the same for every job."""
    defaults = attempt.defaults
    if defaults.progress_url is None:
        return []
    values = {c.PROGRESS_URL_VARIABLE: defaults.progress_url}
    if defaults.progress_ca_config_map:
        values["KUBEFLOW_TRAINER_SERVER_CA_CERT"] = PROGRESS_CA
    elif attempt.hands_out_ca:
        values["KUBEFLOW_TRAINER_SERVER_CA_CERT"] = f"{c.CONFIG_DIRECTORY}/{CA_KEY}"
    values["KUBEFLOW_TRAINER_SERVER_TOKEN"] = PROGRESS_TOKEN
    return [{"name": name, "value": value} for name, value in values.items()]


def _credentials(attempt: Attempt) -> list[dict[str, Any]]:
    found = []
    if attempt.s3_secret is not None:
        found = [
            _from_secret("AWS_ACCESS_KEY_ID", attempt.s3_secret, "AWS_ACCESS_KEY_ID"),
            _from_secret("AWS_SECRET_ACCESS_KEY", attempt.s3_secret, "AWS_SECRET_ACCESS_KEY"),
            _from_secret("AWS_SESSION_TOKEN", attempt.s3_secret, "AWS_SESSION_TOKEN", optional=True),
        ]
    token = attempt.spec.model.token_secret_ref
    if token is not None:
        found.append(_from_secret("HF_TOKEN", token.name, token.key))
    return found


def _from_secret(variable: str, secret: str, key: str, *, optional: bool = False) -> dict[str, Any]:
    reference: dict[str, Any] = {"name": secret, "key": key}
    if optional:
        reference["optional"] = True
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}
