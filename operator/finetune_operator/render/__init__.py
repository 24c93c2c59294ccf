"""Spec and plan in, manifests out: one module for each kind. Pure: no I/O, no client, inputs are never changed, and the
same input gives the same bytes.
"""

from finetune_operator.render.attempt import Attempt
from finetune_operator.render.configmap import config_map
from finetune_operator.render.overlay import OverlayError
from finetune_operator.render.pod import pod_template
from finetune_operator.render.pytorchjob import pytorch_job
from finetune_operator.render.restricted import restricted_violations
from finetune_operator.render.rights import SYSTEM_PRIORITY, rights_taken
from finetune_operator.render.trainer_config import trainer_config

__all__ = [
    "SYSTEM_PRIORITY",
    "Attempt",
    "OverlayError",
    "config_map",
    "pod_template",
    "pytorch_job",
    "restricted_violations",
    "rights_taken",
    "trainer_config",
]
