"""What is measured: the rows of the table, and a small set for CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

PEERS = ("ours", "peft")


@dataclass(frozen=True)
class Setting:
    """One run on one GPU."""

    name: str
    """`<row of the table>/<variant>`."""
    peer: str = "ours"
    shape: str = "8b"
    method: str = "lora"
    data: str = "filled"
    """`filled`: every sample is longer than a row. `real`: lengths as in instruction data, 330 tokens on average."""
    micro_batch: int = 4
    accumulation: int = 1
    checkpointing: bool = False
    length: int = 2048
    rank: int = 16
    last: int | None = None
    """For freeze: so many of the last blocks are trained."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the trainer's own `training` section, or options of the peer."""
    steps: int = 15
    """That are timed."""
    warmup: int = 5
    """Before them."""

    @property
    def row(self) -> str:
        """What it is compared under."""
        return self.name.split("/")[0]


PLAIN: Mapping[str, Any] = {"flash_attn": "sdpa", "torch_compile": "never"}
"""Without any of the fast paths."""
FAST: Mapping[str, Any] = {"flash_attn": "auto", "torch_compile": "always"}
"""All of them. `auto` does not compile."""


def _rows() -> list[Setting]:
    lora = Setting("lora-fastest/ours", training=FAST)
    small = replace(lora, name="lora-small/ours", micro_batch=1, accumulation=4, checkpointing=True)
    qlora = replace(lora, name="qlora-fastest/ours", method="qlora")
    freeze = replace(lora, name="freeze-last-2/ours", method="freeze", last=2)
    real = replace(lora, name="real-lengths/ours", data="real")
    rows = [lora, small, qlora, replace(small, name="qlora-small/ours", method="qlora"), freeze, real]
    rows.append(replace(real, name="real-lengths-1b/ours", shape="1b"))
    settings = []
    for fast in rows:
        settings.append(fast)
        if fast.row == "lora-small":
            settings.append(replace(fast, name="lora-small/ours-2-rows", micro_batch=2, accumulation=2))
        settings.append(replace(fast, name=f"{fast.row}/plain", training=PLAIN))
        settings.append(replace(fast, name=f"{fast.row}/peft", peer="peft", training={}))
    return settings


TABLE = tuple(_rows())
TINY = tuple(
    replace(setting, shape="tiny", length=128, steps=2, warmup=1, rank=4, last=setting.last and 1)
    for setting in TABLE
    if setting.row in ("lora-fastest", "lora-small", "freeze-last-2", "real-lengths")
)
"""The same on a CPU within seconds, to keep the bench alive."""
