"""Settings that make runs on tiny models quick. Import the fixture into the `conftest.py` of a folder that has them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def quick_torch() -> Iterator[None]:
    """One thread, since tiny tensors only wait for more; and no search for garbage among the libraries' own objects,
    which transformers' Trainer asks for at every start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)
