"""Object storage. `ObjectStore` is the only part of the trainer that speaks S3."""

from finetune_trainer.storage.failures import BUCKET_MISSING, CorruptObject
from finetune_trainer.storage.store import ObjectStore, StoreLimits
from finetune_trainer.storage.tree import MANIFEST, UploadedTree, in_parallel
from finetune_trainer.storage.uri import S3Uri

__all__ = [
    "BUCKET_MISSING",
    "MANIFEST",
    "CorruptObject",
    "ObjectStore",
    "S3Uri",
    "StoreLimits",
    "UploadedTree",
    "in_parallel",
]
