"""Where hidden states lie, and how processes share them."""

from __future__ import annotations

import itertools
import mmap
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.fast.prefix_store import Places, Room, StatesStore, free_memory, lay_out

LENGTHS = (3, 1, 5, 2)
WIDTH = 4


def states(row: int, dtype: torch.dtype) -> torch.Tensor:
    """Of one row, told apart from those of all others."""
    return (torch.arange(LENGTHS[row] * WIDTH).reshape(LENGTHS[row], WIDTH) + 20 * row).to(dtype)


@given(st.lists(st.integers(1, 5000), max_size=30), st.integers(0, 60_000), st.integers(1, 9000))
def test_every_row_has_a_place_of_its_own(sizes: Sequence[int], host: int, piece: int) -> None:
    places = lay_out(sizes, host, piece)
    assert places.piece % mmap.PAGESIZE == 0 and places.piece >= max(sizes, default=1)
    for inside, total in ((True, places.memory), (False, places.disk)):
        parts = sorted(
            (offset, offset + size)
            for offset, size, kind in zip(places.offsets, sizes, places.in_memory, strict=True)
            if kind is inside
        )
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(parts))
        assert not parts or parts[-1][1] == total
        if inside:
            assert total <= host
            assert all(start // places.piece == (end - 1) // places.piece for start, end in parts)
        else:
            assert total == sum(end - start for start, end in parts)


def test_memory_comes_first() -> None:
    assert lay_out([10, 20, 30], 35) == Places((True, True, False), (0, 10, 0), 30, 30, 256 * 2**20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("host", [0, 40, 10_000])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype, host: int) -> None:
    store = StatesStore.create(LENGTHS, WIDTH, dtype, Room(host, 10_000), tmp_path)
    assert len(store) == 0 and list(tmp_path.iterdir()) == []
    for row in (2, 0, 3):
        place = store.in_memory(row, pinned=False)
        if place is None:
            store.write(row, states(row, dtype))
        else:
            place.copy_(states(row, dtype))
        store.mark(row)
    assert len(store) == 3
    assert [store.has(row) for row in range(4)] == [True, False, True, True]
    for row in (0, 2, 3):
        found = store.in_memory(row, pinned=False)
        if found is None:
            found = torch.empty(store.shape(row), dtype=store.dtype)
            store.read(row, found)
        assert torch.equal(found, states(row, dtype))
    del found, place
    store.close()


def test_a_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    store = StatesStore.create(LENGTHS, WIDTH, torch.float32, Room(0, 10_000), tmp_path)
    with open(f"/proc/self/fd/{store.address.files[2]}", "r+b") as file:
        file.truncate(10)
    with pytest.raises(OSError, match="ends within row 2"):
        store.read(2, torch.empty(5, WIDTH))
    store.close()


OTHER = """
import sys, torch
from finetune_trainer.fast.prefix_store import Address, StatesStore
process, one, two, three, host = (int(word) for word in sys.argv[1:])
store = StatesStore.attach((3, 1, 5, 2), 4, torch.float32, Address(process, (one, two, three), host))
assert store.has(0) and not store.has(2)
assert torch.equal(store.in_memory(0, pinned=False), torch.full((3, 4), 7.0))
store.write(2, torch.full((5, 4), 9.0))
store.mark(2)
"""


def test_processes_share_it(tmp_path: Path) -> None:
    store = StatesStore.create(LENGTHS, WIDTH, torch.float32, Room(64, 10_000), tmp_path)
    place = store.in_memory(0, pinned=False)
    assert place is not None and store.in_memory(2, pinned=False) is None
    place.fill_(7.0)
    store.mark(0)
    address = store.address
    words = [str(number) for number in (address.process, *address.files, address.host)]
    subprocess.run([sys.executable, "-c", OTHER, *words], check=True, timeout=120)
    assert store.has(2)
    found = torch.empty(5, WIDTH)
    store.read(2, found)
    assert torch.equal(found, torch.full((5, WIDTH), 9.0))
    del place
    store.close()


@pytest.mark.parametrize(
    "names",
    [
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ],
    ids=["version 2", "version 1"],
)
@pytest.mark.parametrize(
    ("limit", "free"),
    [("max", None), ("1000", 700), ("250", 0), ("99999999999999999", None)],
)
def test_the_limit_of_a_container_counts(
    tmp_path: Path, names: tuple[str, str, str, str], limit: str, free: int | None
) -> None:
    """400 bytes are used, of which 100 are page cache."""
    most, used, stat, cached = names
    (tmp_path / "memory").mkdir()
    (tmp_path / most).write_text(f"{limit}\n")
    (tmp_path / used).write_text("400\n")
    (tmp_path / stat).write_text(f"anon 300\n{cached} 100\n")
    if free is None:
        assert free_memory(tmp_path) > 2**20
    else:
        assert free_memory(tmp_path) == free


def test_without_a_control_group(tmp_path: Path) -> None:
    assert free_memory(tmp_path / "none") > 2**20
    room = Room.found(tmp_path)
    assert room.host > 2**20 and room.disk > 2**20
