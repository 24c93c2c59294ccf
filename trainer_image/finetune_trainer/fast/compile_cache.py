"""What torch.compile has made, kept in the object store for runs of the same shape that come after this one.

torch finds the parts of such a file by keys of its own, which cover code, shapes and versions: what does not fit is
not used. The name here only says which file to look into. The file holds compiled code and pickles. So it begins with
a seal that only a holder of the same credentials can make (`ObjectStore.seal`), and nothing else is looked into: to be
allowed to write to the bucket is not enough to run code in a pod.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import platform
import time
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from botocore.exceptions import BotoCoreError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_trainer import quantized
from finetune_trainer.context import RunContext
from finetune_trainer.contract import TrainerConfig
from finetune_trainer.distributed import once_per_node
from finetune_trainer.errors import InputMissing, TrainerError
from finetune_trainer.storage import S3Uri

FOLDER = "compile-cache"
"""Below `output.uri`."""
AFTER_STEPS = 20
"""Steps of an attempt after which its code is kept: by then every shape has been seen, and an attempt that is lost
later has left it for the next."""
LIMIT_BYTES = 512 * 2**20
_SEAL_BYTES = 32
_SHAPING = (
    "precision",
    "micro_batch_size",
    "gradient_checkpointing",
    "recomputed_blocks",
    "offload_activations",
    "flash_attn",
    "fuse_adapters",
    "cache_frozen_prefix",
    "neftune_alpha",
)
"""Of the training's settings, those that change what is compiled."""

OPERATORS = (Path(__file__).parent, Path(quantized.__file__).parent)
"""Packages with operators."""

logger = logging.getLogger(__name__)


def uri_of(config: TrainerConfig, device: torch.device) -> S3Uri:
    """Where the code of runs like this one lies: the same model, method and shapes, on the same kind of device."""
    gpu = device.type == "cuda"
    said: dict[str, Any] = {
        "versions": [torch.__version__, torch.version.cuda, platform.python_version(), platform.machine(), own_code()],
        "device": [torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device)] if gpu else "cpu",
        "training": config.training.model_dump(mode="json", include=set(_SHAPING)),
        "dataset": config.dataset.model_dump(mode="json", include={"max_length", "packing"}),
        "strategy": config.parallelism.strategy,
    }
    said |= config.model_dump(mode="json", include={"model", "method", "layers", "lora", "quantization"})
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return S3Uri.parse(config.output.uri).child(f"{FOLDER}/{digest[:32]}.bin")


@cache
def own_code() -> str:
    """A digest of the code that has operators of ours. Compiled code calls them by their names and counts on the shapes
    that they gave, of which torch's keys know nothing."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in operator_files())).hexdigest()


def operator_files() -> list[Path]:
    """The code of the packages with operators."""
    return sorted(path for folder in OPERATORS for path in folder.rglob("*.py"))


class CompileCache(TrainerCallback):
    """Reads the file before the first step, and writes it once all has been compiled. Its failures are warnings."""

    _taken: ClassVar[bool] = False
    """Whether this process has taken its code out of torch, which reads of what is taken out again the last part only:
    several adapters trained one after the other keep what the first of them compiled."""

    def __init__(self, config: TrainerConfig, context: RunContext, device: torch.device) -> None:
        self._context = context
        self._name = f"{FOLDER}-{config.folder_name}"
        self._uri = uri_of(config, device)
        self._due = 0
        self._known = 0
        """Parts in the file that was read."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Read: once on each node, whose processes share a folder of compiled code."""
        self._due = state.global_step + AFTER_STEPS
        self._known = once_per_node(self._context, self._name, self._read)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write, where there is anything that was not read."""
        if state.global_step == min(self._due, state.max_steps) and self._context.is_main:
            self._write()

    def _read(self) -> int:
        began = time.monotonic()
        try:
            data = self._context.store.get_bytes(self._uri, limit=LIMIT_BYTES)
        except InputMissing:
            logger.info("compile cache: nothing at %s yet", self._uri)
            return 0
        except TrainerError as error:
            logger.warning("compile cache: %s cannot be read, so everything is compiled: %s", self._uri, error)
            return 0
        seal, content = data[:_SEAL_BYTES], data[_SEAL_BYTES:]
        expected = self._seal(content)
        if expected is None:
            return 0
        if not hmac.compare_digest(seal, expected):
            logger.warning("compile cache: %s was not written with these credentials: not used", self._uri)
            return 0
        try:
            found = torch.compiler.load_cache_artifacts(content)
        except OSError as error:  # it is unpacked onto the disk
            logger.warning("compile cache: %s cannot be unpacked, so everything is compiled: %s", self._uri, error)
            return 0
        if found is None:
            logger.warning("compile cache: %s is not what this torch wrote, so everything is compiled", self._uri)
            return 0
        seconds = time.monotonic() - began
        logger.info("compile cache: %.1f MiB from %s in %.1f s", len(content) / 2**20, self._uri, seconds)
        return _parts(found)

    def _write(self) -> None:
        began = time.monotonic()
        if CompileCache._taken:
            return
        CompileCache._taken = True
        made = torch.compiler.save_cache_artifacts()
        if made is None or _parts(made[1]) <= self._known:
            return
        content = made[0]
        if len(content) + _SEAL_BYTES > LIMIT_BYTES:
            logger.warning("compile cache: not kept: %.0f MiB are too many", len(content) / 2**20)
            return
        seal = self._seal(content)
        if seal is None:
            return
        try:
            self._context.store.put_bytes(self._uri, seal + content)
        except TrainerError as error:
            logger.warning("compile cache: %s cannot be written: %s", self._uri, error)
            return
        seconds = time.monotonic() - began
        logger.info("compile cache: %.1f MiB kept at %s in %.1f s", len(content) / 2**20, self._uri, seconds)

    def _seal(self, content: bytes) -> bytes | None:
        try:
            seal = self._context.store.seal(content)
        except BotoCoreError as error:
            logger.warning("compile cache: not used: the credentials cannot be had: %s", error)
            return None
        if seal is None:
            logger.warning("compile cache: not used: it is sealed with credentials, and these are temporary")
        return seal


def _parts(info: Any) -> int:
    return sum(len(keys) for keys in info.artifacts.values())
