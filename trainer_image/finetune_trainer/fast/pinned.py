"""Host memory that a GPU copies from and to while it computes."""

from __future__ import annotations

from contextlib import suppress

import torch


def pin(address: int, size: int) -> bool:
    """Pin memory that is there already, from a page's first byte on; False where the system does not let us.

    Copies then wait for each other, and are right all the same. torch's own pinned memory comes in powers of two.
    """
    failed = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
    if failed:
        # The next use of the GPU would be told of the failure.
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda")
    return not failed


def unpin(address: int) -> None:
    """The memory may be freed afterwards. No copy may be under way."""
    torch.cuda.cudart().cudaHostUnregister(address)
