"""Fuzzing of everything that reads what strangers wrote: hypothesis makes the inputs, and only documented errors pass.

`targets_operator`, `targets_trainer` and `targets_http` say what is called; `inputs` what with; `runner` how long.
"""

from fuzz.runner import Outcome, Target, run
from fuzz.targets_http import HTTP_TARGETS
from fuzz.targets_operator import OPERATOR_TARGETS
from fuzz.targets_trainer import TRAINER_TARGETS

TARGETS: tuple[Target, ...] = (*OPERATOR_TARGETS, *TRAINER_TARGETS, *HTTP_TARGETS)

__all__ = ["TARGETS", "Outcome", "Target", "run"]
