"""Hidden states of rows in host memory, and what has no room there in a file: one store for all processes of a node.

Every row has its place from the start, so that the size is known before the first byte is written, and processes need
to tell each other no more than which rows are there. Memory and disk are used up only as rows come.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from finetune_trainer.fast.pinned import pin, unpin
from finetune_trainer.workspace import free_bytes

HOST_SHARE = 0.5
"""Of the memory that is free at the start of the training: the rest is for data, checkpoints and the page cache."""
DISK_SHARE = 0.5
"""Of the free disk: the rest is for checkpoints and the result."""
PIECE = 256 * 2**20
"""Bytes of memory that are pinned at once. No row lies in two pieces."""
CONTROL_GROUP = Path("/sys/fs/cgroup")
_MEMORY_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Of control groups of version 2, and of 1: limit, use, counts, and which of these is the page cache that gives way."""


@dataclass(frozen=True)
class Room:
    """Bytes that the store may use up on a node."""

    host: int
    disk: int

    @classmethod
    def found(cls, folder: Path) -> Room:
        """What this machine leaves to it now."""
        return cls(int(HOST_SHARE * free_memory()), int(DISK_SHARE * free_bytes(folder)))

    def without(self, promised: int) -> Room:
        """Where so many bytes of the host's memory are going to be used otherwise."""
        return Room(max(0, self.host - int(HOST_SHARE * promised)), self.disk)


def free_memory(control_group: Path = CONTROL_GROUP) -> int:
    """Bytes that this container can still use without swapping; its own limit counts where there is one."""
    free = int(psutil.virtual_memory().available)
    for limit, used, stat, cached in _MEMORY_FILES:
        try:
            most, now = (int((control_group / name).read_text()) for name in (limit, used))
            counts = dict(line.split() for line in (control_group / stat).read_text().splitlines())
        except (OSError, ValueError):  # no such control group, or "max": no limit
            continue
        # The page cache of files that nobody reads gives way.
        free = max(0, min(free, most - now + int(counts.get(cached, 0))))
    return free


@dataclass(frozen=True)
class Places:
    """Where each row's bytes are."""

    in_memory: tuple[bool, ...]
    offsets: tuple[int, ...]
    memory: int
    """Bytes of it in all."""
    disk: int
    piece: int


def lay_out(sizes: Sequence[int], host: int, piece: int = PIECE) -> Places:
    """Places for rows of so many bytes each, in memory as long as `host` bytes hold them.

    A piece is as large as the largest row at least; memory that is left at the end of one is lost.
    """
    largest = max(sizes, default=0)
    piece = -(-max(piece, largest) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = disk = 0
    inside, offsets = [], []
    for size in sizes:
        start = memory if memory % piece + size <= piece else -(-memory // piece) * piece
        fits = start + size <= host
        inside.append(fits)
        offsets.append(start if fits else disk)
        if fits:
            memory = start + size
        else:
            disk += size
    return Places(tuple(inside), tuple(offsets), memory, disk, piece)


@dataclass(frozen=True)
class Address:
    """Where other processes of the node find a store."""

    process: int
    files: tuple[int, ...]
    """Descriptors in that process: which rows are there, memory, disk."""
    host: int
    """Bytes of memory that rows were laid out in."""


class StatesStore:
    """Rows of hidden states (tokens, width) of one type.

    Reading and writing wait for memory and disk, not for a GPU. A row that is written twice is the same both times.
    """

    def __init__(self, lengths: Sequence[int], width: int, dtype: torch.dtype, host: int, files: Sequence[int]) -> None:
        """files: descriptors of the store's own, which it closes."""
        self._lengths = lengths
        self._width = width
        self._dtype = dtype
        self._host = host
        self.places = lay_out([length * width * dtype.itemsize for length in lengths], host)
        self._files = tuple(files)
        self._there = mmap.mmap(self._files[0], max(1, len(lengths)))
        size = self.places.memory
        self._memory = torch.frombuffer(mmap.mmap(self._files[1], size), dtype=torch.uint8) if size else None
        self._pinned: dict[int, int] = {}
        """Number of a piece to its address; 0 where it could not be pinned."""

    @classmethod
    def create(cls, lengths: Sequence[int], width: int, dtype: torch.dtype, room: Room, folder: Path) -> StatesStore:
        """A store of this process; its files vanish with the last process that has them open.

        Raises OSError where the system gives none.
        """
        places = lay_out([length * width * dtype.itemsize for length in lengths], room.host)
        with ExitStack() as stack:
            files = []
            for size, of_memory in ((max(1, len(lengths)), True), (places.memory, True), (places.disk, False)):
                files.append(_memory_file() if of_memory else _disk_file(folder))
                stack.callback(os.close, files[-1])
                os.truncate(files[-1], size)
            store = cls(lengths, width, dtype, room.host, files)
            stack.pop_all()
        return store

    @classmethod
    def attach(cls, lengths: Sequence[int], width: int, dtype: torch.dtype, address: Address) -> StatesStore:
        """The store of another process of this node and user. Raises OSError where it cannot be reached."""
        with ExitStack() as stack:
            files = []
            for number in address.files:
                files.append(os.open(f"/proc/{address.process}/fd/{number}", os.O_RDWR))
                stack.callback(os.close, files[-1])
            store = cls(lengths, width, dtype, address.host, files)
            stack.pop_all()
        return store

    @property
    def address(self) -> Address:
        """For `attach`."""
        return Address(os.getpid(), self._files, self._host)

    def has(self, row: int) -> bool:
        """Whether a row can be read."""
        return self._there[row] == 1

    def __len__(self) -> int:
        """Rows that can be read."""
        return self._there[:].count(1)

    def mark(self, row: int) -> None:
        """From now on a row can be read."""
        self._there[row] = 1

    def in_memory(self, row: int, *, pinned: bool) -> torch.Tensor | None:
        """The place of a row (tokens, width) in memory; None where it is on disk. `pinned`: for a GPU's copies."""
        if not self.places.in_memory[row]:
            return None
        assert self._memory is not None, "rows are in it"
        start = self.places.offsets[row]
        if pinned:
            self._pin(start // self.places.piece)
        part = self._memory[start : start + self._bytes(row)]
        return part.view(self._dtype).view(self._lengths[row], self._width)

    def write(self, row: int, states: torch.Tensor) -> None:
        """To the disk, from host memory (tokens, width). Raises OSError, for a full disk among others."""
        content, offset = _bytes_of(states), self.places.offsets[row]
        while content:
            written = os.pwrite(self._files[2], content, offset)
            content, offset = content[written:], offset + written

    def read(self, row: int, states: torch.Tensor) -> None:
        """From the disk, into host memory (tokens, width). Raises OSError."""
        content, offset = _bytes_of(states), self.places.offsets[row]
        while content:
            read = os.preadv(self._files[2], [content], offset)
            if not read:
                raise OSError(f"the file of hidden states ends within row {row}")
            content, offset = content[read:], offset + read

    def shape(self, row: int) -> tuple[int, int]:
        """Tokens and width."""
        return self._lengths[row], self._width

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        return self._dtype

    def close(self) -> None:
        """Give memory and disk back."""
        for address in self._pinned.values():
            if address:
                unpin(address)
        self._pinned.clear()
        self._memory = None
        self._there.close()
        for file in self._files:
            os.close(file)

    def _bytes(self, row: int) -> int:
        return self._lengths[row] * self._width * self._dtype.itemsize

    def _pin(self, piece: int) -> None:
        if piece in self._pinned:
            return
        assert self._memory is not None
        start = piece * self.places.piece
        address = self._memory.data_ptr() + start
        size = min(self.places.piece, self.places.memory - start)
        self._pinned[piece] = address if pin(address, size) else 0


def _bytes_of(states: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, to read and to write."""
    return states.view(-1).view(torch.uint8).numpy().data


def _memory_file() -> int:
    """Memory with a descriptor, which other processes can open; not limited by the size of /dev/shm."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("hidden-states")
    return _disk_file(Path(tempfile.gettempdir()))


def _disk_file(folder: Path) -> int:
    """A file without a name."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())
