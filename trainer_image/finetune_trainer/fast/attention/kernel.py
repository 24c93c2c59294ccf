"""What a kernel is asked for, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Unsupported(Exception):
    """The model asks something of attention that a kernel does not do."""


class Samples(NamedTuple):
    """Where the samples of a row lie."""

    bounds: torch.Tensor
    """(samples + 1,) int32: where each begins, and the end. Samples of no tokens may come last."""
    longest: int
    """Tokens that none exceeds."""
    blocks: Mapping[int, Any] | None = None
    """By window, which blocks of tokens see which (`flex.sample_blocks`), where a kernel wants them."""


class Scores(NamedTuple):
    """How a layer makes weights of its queries and keys."""

    scaling: float | None = None
    """None: 1 / sqrt(width)."""
    window: int = 0
    """Tokens that one sees, itself counted; 0: all before it."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap) (Gemma 2, arXiv:2408.00118)."""
    sinks: torch.Tensor | None = None
    """(heads,): a score more in each head's softmax, to which no value belongs (gpt-oss, arXiv:2508.10925)."""

    @property
    def special(self) -> str:
        """What not every kernel does, in words; empty where there is nothing."""
        asked = {"soft-capped scores": self.softcap, "learnt sinks": self.sinks}
        return " and ".join(words for words, given in asked.items() if given is not None)


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Samples, Scores], torch.Tensor]
"""query (tokens, heads, width), key and value (tokens, kv heads, width) -> (tokens, heads, width)."""


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention over samples."""

    name: str
    attend: Attend
    why_not: Callable[[torch.device, torch.dtype], str | None]
    """Why it cannot be used on a device; None where it can."""
    blocks: bool = False
    """It wants `Samples.blocks`."""
    rows: bool = False
    """Samples of one length, without anything special, go to torch's kernels for the rows of a batch instead."""
    special_only: bool = False
    """It is for `Scores.special`."""
    few: Attend | None = None
    """Computes the same of a few tokens, for which code of its own would have to be made."""
    active: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    """What has to be so while it is used."""
