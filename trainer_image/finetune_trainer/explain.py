"""The one place where an exception becomes an explained failure with an exit code."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Iterator

from finetune_trainer.errors import (
    DiskFull,
    GpuMemoryError,
    InternalError,
    Preempted,
    TrainerError,
    Unavailable,
    UsageError,
)
from finetune_trainer.workspace import full_disk_error

PEER_LOST = "PeerLost"

_GPU_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|HIP out of memory"
    r"|Cuda failure.{0,20}out of memory"
)
_PEER_LOST = re.compile(
    r"NCCL error|ncclRemoteError|ncclSystemError|ncclInternalError|ProcessGroupNCCL|Watchdog caught collective"
    r"|Connection closed by peer|Connection reset by peer|Broken pipe|gloo.*(?:[Tt]imed out|[Tt]imeout|closed)"
    r"|(?:TCPStore|c10d).*(?:[Tt]imed out|[Tt]imeout|failed|refused|reset)|Socket Timeout|wait timeout after"
)
_UNWRITTEN = re.compile(r"PytorchStreamWriter failed writing|inline_container\.cc.*unexpected pos")
_MESSAGE_CHARACTERS = 1500


def explain(error: BaseException) -> TrainerError:
    """What a failure means to the owner of the job. What is not known to mean anything else is an InternalError."""
    for cause in _causes(error):
        if isinstance(cause, TrainerError):
            return cause
        known = _known(cause)
        if known is not None:
            return known
    return InternalError(f"{type(error).__name__}: {_brief(error)} ({_place(error)}); the log has the whole traceback")


def _known(error: BaseException) -> TrainerError | None:
    if isinstance(error, KeyboardInterrupt):
        return Preempted(
            "interrupted a second time, so nothing more was saved; another attempt continues from the last complete"
            " checkpoint",
            reason="Interrupted",
        )
    if _is_gpu_memory(error):
        return GpuMemoryError(
            f"the GPU has too little memory: {_brief(error)}; use a smaller training.microBatchSize, a smaller"
            " dataset.maxLength, gradient checkpointing, qlora, or more GPUs with DeepSpeed or FSDP"
        )
    if _is_peer_lost(error):
        return Unavailable(
            f"the connection to another process of this run was lost: {_brief(error)}; look for the failure of the"
            " other process, or at the network between the nodes",
            reason=PEER_LOST,
        )
    if _is_instance(error, "_pickle", "UnpicklingError"):
        return UsageError(
            f"the checkpoint holds more than numbers, and might run code when it is read: {_brief(error)}; this trainer"
            " did not write it like that: see who may write to output.uri, delete the checkpoint, or set"
            " checkpoints.resume: never",
            reason="UnsafeCheckpoint",
        )
    full = full_disk_error(error)
    if full is not None:
        return DiskFull(f"cannot write {full.filename or 'a file'}: {full.strerror}; give the job a larger work volume")
    if isinstance(error, RuntimeError) and _UNWRITTEN.search(str(error)):
        known = error.__context__
        if isinstance(known, OSError):
            return InternalError(f"torch could not write a file: {_brief(known)}; look at the job's work volume")
        return DiskFull(
            f"torch could not write a file ({_brief(error)}): the disk is full, or fails; give the job a larger work"
            " volume"
        )
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return InternalError(
            f"too little main memory: {_brief(error)}; give the job more resources.memory", reason="OutOfMemory"
        )
    return None


def _is_gpu_memory(error: BaseException) -> bool:
    if _is_instance(error, "torch", "OutOfMemoryError"):
        return True
    return isinstance(error, RuntimeError) and _GPU_MEMORY.search(str(error)) is not None


def _is_peer_lost(error: BaseException) -> bool:
    if _is_instance(error, "torch.distributed", "DistError") or isinstance(error, ConnectionError):
        return True
    return isinstance(error, RuntimeError) and _PEER_LOST.search(str(error)) is not None


def _is_instance(error: BaseException, module: str, name: str) -> bool:
    # A library is only asked where it is loaded: a failure before that must be explained quickly, too.
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(error, kind)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it was explicitly raised from, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        if _is_instance(current, "torch.distributed.checkpoint.api", "CheckpointException"):
            # What went wrong on each rank.
            yield from (failure for failure, _ in current.failures.values())  # type: ignore[attr-defined]
        current = current.__cause__


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if len(text) <= _MESSAGE_CHARACTERS else text[:_MESSAGE_CHARACTERS] + " [...]"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "no traceback"
    last = frames[-1]
    return f"{last.filename.rpartition('/')[2]}:{last.lineno} in {last.name}"
