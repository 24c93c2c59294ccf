"""Which jobs the fast paths are for, as far as a job's own words say: one table for the planner, which refuses before a
pod starts what is insisted on, and for the trainer. Pure: no torch.

What model and machine add to it is for the trainer to find (`finetune_trainer.fast.choice`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune_trainer.contract.vocabulary import FlashAttn, Method, QuantizationType, Strategy, Switch

SHARDED = frozenset({Strategy.DEEPSPEED, Strategy.FSDP})
"""Strategies that train without these paths: the paths are tried, and find what they can do, on a model that its
process holds whole and in the place and type that it is trained in, before the first step."""
OWN_FORWARD = frozenset({Method.PREFIX, Method.PROMPT, Method.ADAPTER})
"""Methods for which PEFT puts positions of its own into rows or attention."""


@dataclass(frozen=True)
class FastUse:
    """What a job asks of the fast paths, and what it is made of. A reason is None where there is none."""

    strategy: Strategy
    method: Method
    flash_attn: FlashAttn
    torch_compile: Switch
    fuse_adapters: Switch
    quantization: QuantizationType | None = None
    dropout: bool = False
    """In front of adapters."""
    noise: bool = False
    """On embeddings (NEFTune)."""

    @property
    def insists(self) -> bool:
        """Whether a path was asked for by name: the job is then not to be sharded."""
        return self._asks_for_samples or Switch.ALWAYS in (self.torch_compile, self.fuse_adapters)

    @property
    def _asks_for_samples(self) -> bool:
        return self.flash_attn in (FlashAttn.VARLEN, FlashAttn.FLEX)

    @property
    def unfit(self) -> str | None:
        """Why none of the paths is taken."""
        if self.strategy in SHARDED:
            return f"strategy {self.strategy} has none of the fast paths"
        if self.method in OWN_FORWARD:
            return f"method {self.method} adds positions of its own"
        return None

    @property
    def masked(self) -> str | None:
        """Why attention has a mask."""
        return self.unfit or ("NEFTune's noise depends on the length of a row" if self.noise else None)

    @property
    def uncompiled(self) -> str | None:
        """Why nothing is compiled."""
        int8 = self.quantization is QuantizationType.INT8
        return self.unfit or ("products with an int8 base are not compiled" if int8 else None)

    @property
    def unfused(self) -> str | None:
        """Why each adapted layer is computed by itself."""
        if not self.method.uses_lora:
            return f"method {self.method} has no adapters of that kind"
        return self.unfit or ("with lora.dropout each adapter has an input of its own" if self.dropout else None)

    def refused(self, path: str, reason: str) -> str:
        """What to say where a path was asked for by name and cannot be taken."""
        verb, others = ("used", "auto or sdpa") if path == "flashAttn" else ("kept", "auto or never")
        wanted = self.flash_attn if path == "flashAttn" else Switch.ALWAYS
        whole = ", or strategy ddp" if self.strategy in SHARDED and reason == self.unfit else ""
        return f"spec.training.{path}: {wanted} cannot be {verb}: {reason}; use {others}{whole}"

    def problems(self) -> Iterator[str]:
        """Of paths that were asked for by name, each with its field and what to use instead."""
        asked = {
            "flashAttn": (self._asks_for_samples, self.masked),
            "torchCompile": (self.torch_compile is Switch.ALWAYS, self.uncompiled),
            "fuseAdapters": (self.fuse_adapters is Switch.ALWAYS, self.unfused),
        }
        yield from (self.refused(path, why) for path, (wanted, why) in asked.items() if wanted and why is not None)
