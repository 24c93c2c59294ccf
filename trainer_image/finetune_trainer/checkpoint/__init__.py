"""Checkpoints in object storage. `CheckpointStore` says which exist, `BackgroundUploader` adds to them."""

from finetune_trainer.checkpoint.nodes import NodeCheckpoints
from finetune_trainer.checkpoint.store import CheckpointRef, CheckpointStore, PassedOver
from finetune_trainer.checkpoint.uploader import BackgroundUploader

__all__ = ["BackgroundUploader", "CheckpointRef", "CheckpointStore", "NodeCheckpoints", "PassedOver"]
