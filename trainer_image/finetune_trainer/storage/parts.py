"""A large object into a file, in parts that are read side by side: one connection of an object store is slow."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from finetune_trainer.storage.reader import ObjectReader

if TYPE_CHECKING:
    from threading import Semaphore

PART = 16 * 2**20
"""Bytes. One takes longer than the request for it, and little is read in vain where one breaks off."""
CHUNK = 2**18
"""Bytes that are read, hashed and written at a time: they stay in the processor's cache."""


def read_into(
    reader: ObjectReader, file: BinaryIO, *, connections: int, slots: Semaphore, seen: Callable[[bytes], object] | None
) -> None:
    """Write an object's content to an empty file.

    Args:
        reader: of the whole object; it is closed.
        connections: parts that are read at the same time.
        slots: of these and of all others that are read meanwhile.
        seen: is given all bytes, in order.
    """
    descriptor = file.fileno()
    reader.close()

    def read(start: int) -> None:
        with slots, reader.part(start, min(start + PART, reader.size)) as part:
            position = start
            while chunk := part.next(CHUNK):
                _write(descriptor, chunk, position)
                position += len(chunk)

    with _side_by_side(connections) as pool:
        begun: deque[tuple[int, Future[None]]] = deque()
        for start in range(0, reader.size, PART):
            begun.append((start, pool(read, start)))
            if len(begun) > connections:
                _finish(*begun.popleft(), descriptor, seen)
        while begun:
            _finish(*begun.popleft(), descriptor, seen)


@contextmanager
def _side_by_side(threads: int) -> Iterator[Callable[..., Future[None]]]:
    """What submits work; at the end nothing of it runs any more, whatever happened: it writes to a file that is closed
    then."""
    begun: list[Future[None]] = []
    with ThreadPoolExecutor(threads, thread_name_prefix="object-parts") as pool:

        def submit(work: Callable[[int], None], start: int) -> Future[None]:
            begun.append(pool.submit(work, start))
            return begun[-1]

        try:
            yield submit
        finally:
            for future in begun:
                future.cancel()
            wait(begun)


def _finish(start: int, part: Future[None], descriptor: int, seen: Callable[[bytes], object] | None) -> None:
    """Wait for a part, and show what it wrote. That comes out of the page cache."""
    part.result()
    if seen is None:
        return
    for position in range(start, start + PART, CHUNK):
        seen(os.pread(descriptor, CHUNK, position))


def _write(descriptor: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written
