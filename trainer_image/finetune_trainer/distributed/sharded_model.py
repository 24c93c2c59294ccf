"""The module that has to be entered wherever a model that FSDP2 divided is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn

T = TypeVar("T")


class ShardedModel(nn.Module):
    """The root of what is sharded. Whatever needs the model's own parameters whole (embeddings, final norm, head) has
    to happen within its forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model(*args, **kwargs)

    def within(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function(model, *args)` as a forward pass of this module."""
        return function(self.model, *args)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, as one forward pass: the embeddings and the head are gathered once."""
        return cast(Any, self.model).generate(*args, **kwargs)
