"""Masks of packed rows without a look at them.

transformers makes a mask of a row's positions, unless every row is one sample: to know that, the host waits for the GPU
in each micro-batch. Where rows are packed it is hardly ever so, and a mask gives the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import masking_utils

_FUNCTION = "find_packed_sequence_indices"


def sample_indices(position_ids: torch.Tensor) -> torch.Tensor:
    """(rows, length): in which sample each token is, of positions (rows, length) that start again with each."""
    begins = torch.zeros_like(position_ids)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return begins.cumsum(-1)


@contextmanager
def without_a_look() -> Iterator[None]:
    """transformers' masks are made so meanwhile."""
    looking = getattr(masking_utils, _FUNCTION, None)
    if looking is None:  # of another version
        yield
        return
    setattr(masking_utils, _FUNCTION, sample_indices)
    try:
        yield
    finally:
        setattr(masking_utils, _FUNCTION, looking)
