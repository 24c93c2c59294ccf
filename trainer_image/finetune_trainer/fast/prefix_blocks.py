"""Leaving out the blocks below a boundary: their last hidden states are taken, or given in their stead.

The model's own forward pass stays as it is, with its masks, positions and whatever else the blocks above are told;
only the blocks below do other things when they are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


class Unusable(Exception):
    """A model whose blocks cannot be left out."""


class _Reached(Exception):
    """A forward pass has come to the boundary."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__("the boundary was reached")
        self.states = states


class Boundary:
    """Between the lowest blocks of a model, given in their order, and the rest of it."""

    def __init__(self, decoder: nn.Module, below: Sequence[nn.Module]) -> None:
        """decoder: what is called with a batch's inputs and runs the blocks."""
        self._decoder = decoder
        self._below = below
        self._extra: list[int | None] = [None] * len(below)
        """Of what a block returns: how many values, all of them None, come after the states; None: no tuple at all."""
        self._learning = self._stopping = self._uncompiled = False
        self._given: torch.Tensor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Before and after, the blocks are as they were; what else was put on them meanwhile has to be gone by then."""
        before = [block.__dict__.get("forward") for block in self._below]
        for number, block in enumerate(self._below):
            # Module.__setattr__ keeps what is no tensor or module among the instance's own attributes.
            block.forward = partial(self._forward, number, block, before[number])
        try:
            yield
        finally:
            for block, own in zip(self._below, before, strict=True):
                del block.__dict__["forward"]
                if own is not None:
                    block.forward = own

    @torch.no_grad()
    def learn(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Run the whole decoder, see what its blocks return, and give the last hidden state (rows, length, width).

        Raises Unusable where a block below passes on more than hidden states.
        """
        self._learning = True
        try:
            found = self._decoder(**{**inputs, "use_cache": False}).last_hidden_state
        finally:
            self._learning = False
        assert isinstance(found, torch.Tensor)
        return found

    @torch.no_grad()
    def states(self, inputs: dict[str, Any], *, uncompiled: bool = False) -> torch.Tensor:
        """The hidden states (rows, length, width) that come to the boundary; nothing above it is run."""
        self._stopping, self._uncompiled = True, uncompiled
        try:
            self._decoder(**{**inputs, "use_cache": False})
        except _Reached as reached:
            return reached.states
        finally:
            self._stopping = self._uncompiled = False
        raise Unusable("a forward pass does not come to all of its blocks")

    @contextmanager
    def given(self, states: torch.Tensor) -> Iterator[None]:
        """Meanwhile forward passes find these states at the boundary, and nothing below it is run."""
        self._given = states
        try:
            yield
        finally:
            self._given = None

    def _forward(self, number: int, block: nn.Module, own: Any, *args: Any, **kwargs: Any) -> Any:
        if self._given is not None:
            extra = self._extra[number]
            return self._given if extra is None else (self._given, *[None] * extra)
        plain = own is None or self._uncompiled
        output = type(block).forward(block, *args, **kwargs) if plain else own(*args, **kwargs)
        if self._learning:
            self._extra[number] = _extra_of(output, block)
        if self._stopping and number == len(self._below) - 1:
            raise _Reached(output[0] if isinstance(output, tuple) else output)
        return output


def _extra_of(output: Any, block: nn.Module) -> int | None:
    if isinstance(output, torch.Tensor):
        return None
    if isinstance(output, tuple) and output and all(value is None for value in output[1:]):
        return len(output) - 1
    raise Unusable(f"{type(block).__name__} passes on more than hidden states")
