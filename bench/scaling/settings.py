"""What is measured: each strategy on two GPUs, and what it is held against on one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bench.trainer.settings import FAST, PLAIN, Setting
from bench.trainer.shapes import SHAPES


@dataclass(frozen=True)
class Run:
    """One setting on some of the machine's GPUs, a process each."""

    setting: Setting
    """Rows are those of each GPU."""
    gpus: tuple[int, ...]
    parallelism: Mapping[str, Any] = field(default_factory=lambda: {"strategy": "single"})
    """The trainer's section."""
    packed: bool = False
    """Every sample fills a row either way. Packed rows are tried on the loaded model before anything is trained, which
    takes its time where the model is loaded into host memory; without, attention needs no mask."""
    traced: bool = False
    """One step of rank 0, after those that are timed, is recorded."""

    @property
    def name(self) -> str:
        """`<what is trained>/<strategy>`."""
        return self.setting.name

    @property
    def trained(self) -> str:
        """What two GPUs and one are compared under."""
        return self.name.split("/")[0]


STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "fsdp2": {"strategy": "fsdp"},
    "zero2": {"strategy": "deepspeed", "zero_stage": 2},
    "zero3": {"strategy": "deepspeed", "zero_stage": 3},
}
BOTH = (0, 1)


def _runs() -> list[Run]:
    """In the order in which they begin, as soon as their GPUs are free.

    A shape of which one GPU cannot hold weights, gradients and optimizer state is tried there all the same, after two
    with fewer blocks: the time of a step on one GPU is read off the line through these.
    """
    lora = Setting("lora/one", training=FAST, steps=12)
    full = Setting("full/", method="full", checkpointing=True, training=PLAIN, warmup=2, steps=6)
    one = [
        Run(replace(full, name=f"full/one-{SHAPES[shape].blocks}-blocks", shape=shape), (1,))
        for shape in ("8b-8", "8b-24", "8b")
    ]
    two = [Run(replace(lora, name="lora/ddp"), BOTH, {"strategy": "ddp"}, packed=True, traced=True)]
    two += [
        Run(replace(full, name=f"full/{name}"), BOTH, parallelism, traced=True)
        for name, parallelism in STRATEGIES.items()
    ]
    return [Run(lora, (0,), packed=True), *one, *two]


RUNS = tuple(_runs())
_TINY = {"8b": "tiny", "8b-24": "tiny-2", "8b-8": "tiny-1"}
TINY = tuple(
    replace(
        run,
        setting=replace(
            run.setting,
            shape=_TINY[run.setting.shape],
            length=128,
            rank=4,
            steps=2,
            warmup=1,
            training={**PLAIN, "precision": "fp32"},
        ),
    )
    for run in RUNS
)
"""The same on a CPU, to keep the bench alive."""
