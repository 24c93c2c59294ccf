"""The ConfigMap with an attempt's trainer configuration."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from finetune_operator.render.attempt import Attempt
from finetune_operator.render.labels import child_metadata
from finetune_operator.render.trainer_config import trainer_config
from finetune_trainer.contract import CONFIG_PATH

CONFIG_KEY = PurePosixPath(CONFIG_PATH).name
CA_KEY = "ca.crt"


def config_map(attempt: Attempt) -> dict[str, Any]:
    """The manifest. Immutable: every pod of the attempt reads the same, and kubelets need not watch it."""
    config = trainer_config(attempt)
    data = {CONFIG_KEY: config.to_json()}
    if attempt.hands_out_ca:
        assert attempt.progress_ca is not None
        data[CA_KEY] = attempt.progress_ca
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": child_metadata(attempt, config.digest()),
        "data": data,
        "immutable": True,
    }
