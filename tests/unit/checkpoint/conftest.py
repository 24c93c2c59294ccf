"""A store in memory, and a folder in it. `tests/local` has fixtures of the same names with a real server."""

from __future__ import annotations

import secrets

import pytest

from finetune_trainer.storage import ObjectStore, S3Uri
from tests.memory_store import BUCKET, MemoryClient, memory_store


@pytest.fixture
def stored() -> tuple[ObjectStore, MemoryClient]:
    return memory_store()


@pytest.fixture
def store(stored: tuple[ObjectStore, MemoryClient]) -> ObjectStore:
    return stored[0]


@pytest.fixture
def client(stored: tuple[ObjectStore, MemoryClient]) -> MemoryClient:
    """What holds the store's objects."""
    return stored[1]


@pytest.fixture
def folder_uri() -> S3Uri:
    """A new, empty folder."""
    return S3Uri(BUCKET, f"{secrets.token_hex(6)}/run")
