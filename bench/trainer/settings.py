"""What is measured: the rows of the table, and a small set for CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

OWN_PYTHON = ("llamafactory", "unsloth")
"""Peers with pins of their own, which need an environment of their own."""


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
    offload: bool = False
    """What is kept for recomputing is kept in host memory. Ours only."""
    length: int = 2048
    rank: int = 16
    last: int | None = None
    """For freeze: so many of the last blocks are trained."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """For qlora: fields of the section that differ from nf4 with double quantization."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the trainer's own `training` section, or options of the peer."""
    steps: int = 15
    """That are timed."""
    warmup: int = 5
    """Before them."""
    epoch_steps: int | None = None
    """Steps of one epoch, where the timed ones are to be in later epochs; None: no row comes twice."""

    @property
    def row(self) -> str:
        """What it is compared under."""
        return self.name.split("/")[0]


PLAIN: Mapping[str, Any] = {"flash_attn": "sdpa", "torch_compile": "never", "cache_frozen_prefix": "never"}
"""Without any of the fast paths."""
FAST: Mapping[str, Any] = {"flash_attn": "varlen", "torch_compile": "always"}
"""All of them. `auto` waits for no compiler in runs as short as these."""
LIGER: Mapping[str, Any] = {"enable_liger_kernel": True, "pure_bf16": True, "bf16": False}
"""LLaMA-Factory's options for speed and memory: Liger's kernels, adapters in bf16 and, `bf16` off, no autocast."""


def _rows() -> list[Setting]:
    lora = Setting("lora-fastest/ours", training=FAST)
    small = replace(lora, name="lora-small/ours", micro_batch=1, accumulation=4, checkpointing=True)
    qlora = replace(lora, name="qlora-fastest/ours", method="qlora")
    freeze = replace(lora, name="freeze-last-2/ours", method="freeze", last=2)
    real = replace(lora, name="real-lengths/ours", data="real")
    rows = [lora, small, qlora, replace(small, name="qlora-small/ours", method="qlora"), freeze, real]
    rows.append(replace(real, name="real-lengths-1b/ours", shape="1b"))
    later = replace(freeze, name="freeze-last-2-later-epochs/ours", warmup=7, epoch_steps=5)
    rows.append(replace(later, training={**FAST, "cache_frozen_prefix": "always"}))
    rows += _fp8(lora, small)
    settings = []
    for fast in rows:
        settings.append(fast)
        if fast.row in ("lora-small", "lora-fp8-small"):
            settings.append(replace(fast, name=f"{fast.row}/ours-2-rows", micro_batch=2, accumulation=2))
        if fast.checkpointing:
            offloaded = replace(fast, name=f"{fast.row}/ours-offload", micro_batch=4, accumulation=1, offload=True)
            settings.append(offloaded)
            settings.append(replace(offloaded, name=f"{fast.row}/ours-offload-2-rows", micro_batch=2, accumulation=2))
            if fast.row == "qlora-small":
                # The peers' optimizer.
                eight = {**FAST, "optimizer": "adamw_8bit"}
                settings.append(replace(offloaded, name=f"{fast.row}/ours-offload-8-bit", training=eight))
        settings.append(replace(fast, name=f"{fast.row}/plain", training=PLAIN))
        if fast.quantization:
            other = {**fast.quantization, "keep_transposed": not fast.quantization["keep_transposed"]}
            settings.append(replace(fast, name=f"{fast.row}/ours-other-transposed", quantization=other))
        else:
            settings.append(replace(fast, name=f"{fast.row}/peft", peer="peft", training={}))
            if not fast.epoch_steps:
                settings += _llamafactory(fast)
        if fast.method != "freeze":
            settings += _unsloth(fast)
    return settings


def _llamafactory(fast: Setting) -> list[Setting]:
    """`defaults`: recomputes everything. `best`: keeps everything, and Liger. Small runs: recomputes, and Liger."""
    peer = replace(fast, peer="llamafactory")
    best = replace(peer, name=f"{fast.row}/llamafactory-best", training=LIGER)
    if fast.checkpointing:
        return [best, replace(best, name=f"{best.name}-4-rows", micro_batch=4, accumulation=1)]
    settings = [replace(peer, name=f"{fast.row}/llamafactory-defaults", checkpointing=True, training={}), best]
    settings.append(replace(best, name=f"{best.name}-2-rows", micro_batch=2, accumulation=2))
    if fast.row == "lora-fastest":
        compiled = {**LIGER, "torch_compile": True}
        settings.append(replace(best, name=f"{fast.row}/llamafactory-compiled", training=compiled))
    return settings


def _unsloth(fast: Setting) -> list[Setting]:
    """`best`: keeps everything. `small`: recomputes, with what enters a block in host memory. It has no freeze."""
    peer = replace(fast, peer="unsloth", training={})
    if not fast.checkpointing:
        return [replace(peer, name=f"{fast.row}/unsloth-best")]
    small = replace(peer, name=f"{fast.row}/unsloth-small")
    return [small, replace(small, name=f"{small.name}-4-rows", micro_batch=4, accumulation=1)]


def _fp8(lora: Setting, small: Setting) -> list[Setting]:
    """Of the peers, Unsloth alone has it."""
    kept, recomputed = ({"type": "fp8", "keep_transposed": kept} for kept in (True, False))
    return [
        replace(lora, name="lora-fp8-fastest/ours", method="qlora", quantization=kept),
        replace(small, name="lora-fp8-small/ours", method="qlora", quantization=recomputed),
    ]


TABLE = tuple(_rows())
_TINY_ROWS = ("lora-fastest", "lora-small", "freeze-last-2", "real-lengths")
_TINY_ALONE = ("lora-fp8-fastest/plain", "freeze-last-2-later-epochs/ours")


def _runs_on_cpu(setting: Setting) -> bool:
    """Liger's kernels do not, nor does Unsloth."""
    return setting.peer != "unsloth" and (setting.peer != "llamafactory" or not setting.training)


TINY = tuple(
    replace(
        setting,
        shape="tiny",
        length=128,
        steps=2,
        warmup=1,
        rank=4,
        last=setting.last and 1,
        epoch_steps=setting.epoch_steps and 1,
    )
    for setting in TABLE
    if (setting.row in _TINY_ROWS and _runs_on_cpu(setting)) or setting.name in _TINY_ALONE
)
"""The same on a CPU within seconds, to keep the bench alive."""
