"""Several processes: how they find each other (`processes`), and how they divide a model among them.

`strategies` knows which strategy a job may use and what it needs; `sharding`, `deepspeed` and `fsdp` are the ways to
divide; `gather` makes a whole model of what was divided.
"""

from finetune_trainer.distributed.processes import (
    device_of,
    first_then_rest,
    node_of,
    once_per_node,
    patient_group,
    process_group,
    shared_by_all,
    told_by_all,
)
from finetune_trainer.distributed.sharding import Sharding
from finetune_trainer.distributed.strategies import check_strategy, sharding_of, strategy_arguments

__all__ = [
    "Sharding",
    "check_strategy",
    "device_of",
    "first_then_rest",
    "node_of",
    "once_per_node",
    "patient_group",
    "process_group",
    "sharding_of",
    "shared_by_all",
    "strategy_arguments",
    "told_by_all",
]
