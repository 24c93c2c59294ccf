"""Running coroutines beside each other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any


async def first_to_end(*waiting: Awaitable[Any]) -> None:
    """Run all until the first one ends or fails; the others are cancelled, and waited for."""
    tasks = [asyncio.ensure_future(one) for one in waiting]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
