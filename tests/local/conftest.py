"""Fixtures of the tests that run servers and processes on this machine."""

from tests.s3 import bucket, folder_uri, s3_environment, seaweed, shared_bucket, store

__all__ = ["bucket", "folder_uri", "s3_environment", "seaweed", "shared_bucket", "store"]
