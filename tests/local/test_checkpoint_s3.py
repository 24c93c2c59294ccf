"""Checkpoints in a real S3 server: what holds of a store in memory holds there, too, and a store that dies."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_operator.local.seaweed import SeaweedServer
from finetune_trainer.checkpoint import BackgroundUploader
from finetune_trainer.errors import Unavailable
from finetune_trainer.storage import ObjectStore, S3Uri
from tests.fault_proxy import Fault, FaultProxy, always
from tests.s3 import connect
from tests.unit.checkpoint.test_store import (
    checkpoints,
    checkpoints_of,
    test_a_broken_newer_one_is_passed_over,
    test_a_corrupt_object_of_the_right_size_makes_the_older_one_count,
    test_a_job_that_does_not_resume_sees_none,
    test_download_of_nothing_but_corrupt_ones,
    test_nodes_upload_their_shards_and_one_of_them_commits,
    test_prune_keeps_the_newest_complete_ones,
    test_splitting_batches_otherwise_does_not_lose_the_checkpoint,
    test_the_newest_comes_back_as_it_was,
    test_there_is_none_at_first,
    test_what_a_manifest_says,
)
from tests.unit.checkpoint.test_uploader import folders

__all__ = [
    "checkpoints",
    "folders",
    "test_a_broken_newer_one_is_passed_over",
    "test_a_corrupt_object_of_the_right_size_makes_the_older_one_count",
    "test_a_job_that_does_not_resume_sees_none",
    "test_download_of_nothing_but_corrupt_ones",
    "test_nodes_upload_their_shards_and_one_of_them_commits",
    "test_prune_keeps_the_newest_complete_ones",
    "test_splitting_batches_otherwise_does_not_lose_the_checkpoint",
    "test_the_newest_comes_back_as_it_was",
    "test_there_is_none_at_first",
    "test_what_a_manifest_says",
]


def test_the_uploader_against_a_store_that_dies(
    seaweed: SeaweedServer, store: ObjectStore, folder_uri: S3Uri, folders: list[Path]
) -> None:
    with FaultProxy(seaweed.endpoint) as proxy:
        checkpoints = checkpoints_of(connect(seaweed, proxy.endpoint), folder_uri)
        uploader = BackgroundUploader(checkpoints, keep=1)
        uploader.submit(1, folders[1], 1)
        assert uploader.wait(20)
        proxy.decide = always(Fault.RESET, method="PUT", path="rank-1")
        uploader.submit(2, folders[2], 1)
        with pytest.raises(Unavailable):
            uploader.wait(20)
        proxy.decide = lambda request: None
        newest = checkpoints.newest_complete()
        assert newest is not None
        assert newest.step == 1
        uploader.submit(3, folders[3], 1)
        assert uploader.close(20)
    steps = {
        S3Uri.parse(str(checkpoints.uri)).relative(uri).partition("/")[0] for uri, _ in store.list(checkpoints.uri)
    }
    assert steps == {"step-3"}, "older ones, complete or not, are gone once a newer one is complete"
