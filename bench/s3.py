"""An S3 server of this machine for what a benchmark writes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_operator.local.seaweed import SeaweedServer
from finetune_trainer.contract.config import S3Config
from finetune_trainer.storage import ObjectStore


@contextmanager
def store_with(bucket: str, folder: Path) -> Iterator[ObjectStore]:
    """A store with an empty bucket; its server ends with the block, and its credentials stand in the environment."""
    with SeaweedServer(folder / "s3", access_key=secrets.token_hex(8), secret_key=secrets.token_hex(16)) as server:
        os.environ |= server.credentials_env()
        server.create_bucket(bucket)
        yield ObjectStore(S3Config(endpoint=server.endpoint))
