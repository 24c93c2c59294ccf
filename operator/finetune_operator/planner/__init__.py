"""From a model's shape, a job's spec and the memory of a GPU to a plan. Pure: no I/O.

`shapes` what a model consists of, `workload` what a job does to it, `activations` and `memory` how many bytes a GPU
needs for that, `search` and `plan` the choice, `advice` what to change where nothing fits, `support` what this version
cannot do.
"""

from finetune_operator.planner.plan import PlanResult, plan, plan_job
from finetune_operator.planner.shapes import KnownModel, read_model

__all__ = ["KnownModel", "PlanResult", "plan", "plan_job", "read_model"]
