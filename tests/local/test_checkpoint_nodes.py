"""Checkpoints of several nodes in a real S3 server: what holds of a store in memory holds there, too."""

from __future__ import annotations

from tests.unit.checkpoint.test_nodes import (
    checkpoints,
    config,
    make_node,
    test_a_step_that_another_node_left_out_is_no_checkpoint,
    test_a_step_that_the_first_node_left_out_is_not_uploaded,
    test_the_files_of_all_nodes_become_one_checkpoint,
    test_what_an_earlier_run_uploaded_does_not_count,
)

__all__ = [
    "checkpoints",
    "config",
    "make_node",
    "test_a_step_that_another_node_left_out_is_no_checkpoint",
    "test_a_step_that_the_first_node_left_out_is_not_uploaded",
    "test_the_files_of_all_nodes_become_one_checkpoint",
    "test_what_an_earlier_run_uploaded_does_not_count",
]
