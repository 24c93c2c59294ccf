"""The cached prefix: what the planner knows of it before the data are read. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.errors import NotSupported
from finetune_operator.planner.workload import Layout, Workload, readable
from finetune_trainer.contract.vocabulary import Method, Objective, Switch

FIELD = "spec.training.cacheFrozenPrefix"
FEWEST_PASSES = 2
"""Over the data: the first stores, those after it read."""
OWN_POSITIONS = frozenset({Method.PREFIX, Method.PROMPT, Method.ADAPTER})
"""Methods that add to the input of every block."""


def _unfit(spec: FineTuneJobSpec) -> Iterator[str]:
    """What keeps a job from it, and what to do."""
    training = spec.training
    if spec.method is Method.HEAD or training.objective is not Objective.SFT:
        what = "method head" if spec.method is Method.HEAD else f"objective {training.objective}"
        yield f"{what} runs all blocks in every epoch"
    if spec.method in OWN_POSITIONS:
        yield f"method {spec.method} adds positions of its own to every block"
    if spec.parallelism.strategy in ("deepspeed", "fsdp"):
        yield f"strategy {spec.parallelism.strategy} runs all blocks in every epoch; use strategy ddp"
    if training.neftune_alpha is not None:
        yield "NEFTune's noise is another one in every epoch; remove neftuneAlpha"
    if training.max_steps is None and training.epochs < FEWEST_PASSES:
        yield f"it pays from the second epoch on, and there are {training.epochs:g}; set epochs to 2 or more"


def prefix_problems(spec: FineTuneJobSpec) -> Iterator[str]:
    """Why a job cannot have it that insists on it, as far as the spec alone says."""
    if spec.training.cache_frozen_prefix is Switch.ALWAYS:
        yield from (f"{FIELD}: {reason}; or use auto or never" for reason in _unfit(spec))


def check_prefix(spec: FineTuneJobSpec, work: Workload) -> None:
    """Raises NotSupported where a job insists on it, and nothing of its model is frozen from below."""
    if spec.training.cache_frozen_prefix is Switch.ALWAYS and work.lowest == 0:
        raise NotSupported(
            f"{FIELD}: the first block, or something below it, is trained; choose upper blocks only (layers.last: 4,"
            " for instance), or use auto or never"
        )


def prefix_notes(spec: FineTuneJobSpec, work: Workload, layout: Layout) -> Iterator[str]:
    """How much memory or disk it takes. How many tokens there are is known once the data are read: the trainer then
    refuses what does not fit, or does without."""
    wanted = spec.training.cache_frozen_prefix
    if wanted is Switch.NEVER or (wanted is Switch.AUTO and not spec.resources.gpus):
        return
    if work.lowest == 0 or layout.shards or any(_unfit(spec)):
        return
    token = work.known.shape.hidden * work.narrow
    yield (
        f"what enters block {work.lowest} is kept from the first epoch for those after it: {readable(token * 1e6)} for"
        " a million tokens, on each node, of host memory and then of disk (training.cacheFrozenPrefix)"
    )
