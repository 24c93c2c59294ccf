"""What the trainer reads: data files in every format, and the manifests of checkpoints and results."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tempfile
from contextlib import suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from hypothesis import strategies as st

from finetune_trainer.checkpoint import CheckpointStore
from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.config.inputs import DatasetConfig, DataSource
from finetune_trainer.contract.config.methods import HeadConfig
from finetune_trainer.contract.vocabulary import HeadTask, Objective
from finetune_trainer.data.purpose import Purpose
from finetune_trainer.data.readers import read_rows
from finetune_trainer.data.rows import Row, RowError
from finetune_trainer.data.screening import Screen
from finetune_trainer.data.textfile import open_bytes
from finetune_trainer.errors import InputMissing, TrainerError
from finetune_trainer.merging.result_files import from_store
from finetune_trainer.storage import CorruptObject, ObjectStore, S3Uri
from fuzz.inputs import as_json, changed_bytes, changed_document
from fuzz.runner import Target

ROWS: tuple[Any, ...] = (
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "[]"},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "b"},
        ]
    },
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"instruction": "a", "input": "x", "output": "b", "history": [["q", "r"]]},
    {"prompt": "a", "completion": "b"},
    {"text": "words"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {
        "messages": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": "c",
    },
    {"prompt": "a", "completion": "b", "kto_tag": True},
    {"text": "words", "label": "good"},
)
PURPOSES = (
    Purpose(),
    Purpose(Objective.DPO),
    Purpose(Objective.KTO),
    Purpose(head=HeadConfig(task=HeadTask.CLASSIFICATION)),
    Purpose(head=HeadConfig(task=HeadTask.REGRESSION)),
)
_MOST_ROWS = 500
_MOST_BYTES = 2**18


def _config() -> DatasetConfig:
    return DatasetConfig(sources=(DataSource(uri="file:///data"),), max_length=64, packing=False)


@cache
def _folder() -> Path:
    """One for all inputs: making one takes longer than reading."""
    return Path(tempfile.mkdtemp(prefix="finetune-fuzz-"))


def _screen(rows: list[Row], purpose: Purpose) -> None:
    screen = Screen(_config(), purpose, _folder())
    for row in rows:
        found = purpose.recognise(row.value) if row.value is not None else None
        for format_ in purpose.formats if found is None else (found[0],):
            if format_ in purpose.formats:
                try:
                    screen.remember(screen.check(row, format_, is_validation=False), is_validation=False)
                except RowError:
                    continue


def _rows(given: tuple[Any, Purpose]) -> None:
    value, purpose = given
    if isinstance(value, dict):
        _screen([Row("a.jsonl", 1, value)], purpose)


def _file(name: str, data: bytes) -> None:
    path = _folder() / name
    path.write_bytes(data)
    if path.suffix in (".gz", ".zst") and _unpacks_to_much(path):
        # Reading takes time in proportion to what is unpacked; bombs have a test of their own.
        return
    _screen(list(islice(read_rows(path), _MOST_ROWS)), PURPOSES[0])


def _unpacks_to_much(path: Path) -> bool:
    try:
        with open_bytes(path) as stream:
            return len(stream.read(_MOST_BYTES + 1)) > _MOST_BYTES
    except TrainerError:
        return False


_LINES = b"".join(as_json(row) + b"\n" for row in ROWS)
_ARRAY = json.dumps(ROWS, indent=1).encode()
_WRAPPED = json.dumps({"version": 1, "data": ROWS}).encode()
_CSV = b'instruction,input,output\r\na,b,"c ""d"", e"\nq,,"two\nlines"\n'
_PROSE = "one line\nanother \u00e9\n\nlast".encode()


def _parquet(compression: str, latest: int = 0) -> bytes:
    table = pa.table(
        {
            "text": ["a", "b", None] * 10,
            "n": pa.array([1, 2, None] * 10, pa.int64()),
            "when": pa.array([0, latest, None] * 10, pa.timestamp("us")),
            "turns": [[{"role": "user", "content": "x"}], None, []] * 10,
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=compression, row_group_size=8)
    return sink.getvalue()


def _zstd(data: bytes) -> bytes:
    sink = io.BytesIO()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
        packed.flush()
        return sink.getvalue()


FILES: dict[str, tuple[bytes, ...]] = {
    "a.jsonl": (_LINES, _ARRAY),
    "a.json": (_ARRAY, _WRAPPED, _LINES),
    "a.csv": (_CSV,),
    "a.txt": (_PROSE,),
    "a.parquet": (_parquet("none"), _parquet("zstd"), _parquet("snappy"), _parquet("none", 2**62)),
    "a.jsonl.gz": (gzip.compress(_LINES, mtime=0), gzip.compress(b"[" * 100_000, mtime=0)),
    "a.jsonl.zst": (_zstd(_LINES), _zstd(b"{" * 100_000)),
}

# ---- manifests in the object store ----

_TRAINER_CONFIG = TrainerConfig.model_validate(
    {
        "job": {"name": "qa", "namespace": "team-a", "uid": "u", "attempt": 1},
        "model": {"uri": "s3://models/base"},
        "dataset": {"sources": [{"uri": "s3://data/x"}], "maxLength": 64, "packing": False},
        "method": "full",
        "training": {
            "epochs": 1,
            "learningRate": 1e-3,
            "scheduler": "constant",
            "warmupRatio": 0,
            "weightDecay": 0,
            "batchSize": 1,
            "microBatchSize": 1,
            "gradientAccumulation": 1,
            "optimizer": "adamw",
            "precision": "fp32",
            "gradientCheckpointing": False,
            "maxGradNorm": 1,
            "loggingSteps": 1,
            "seed": 1,
        },
        "parallelism": {"strategy": "single"},
        "output": {"uri": "s3://models/qa"},
        "evaluation": {"metrics": [], "compareWithBase": False},
        "checkpoints": {"every": 1, "unit": "step", "keep": 1},
    }
)
_RUN = S3Uri("models", "qa/runs/u")
_SHA = "0" * 64
_CHECKPOINT = {
    "kind": "FineTuneCheckpoint",
    "version": 1,
    "uid": "u",
    "attempt": 1,
    "step": 7,
    "worldSize": 1,
    "configSha256": _TRAINER_CONFIG.resume_digest(),
    "createdAt": "2027-01-15T07:00:00Z",
    "files": [{"path": "trained.safetensors", "sizeBytes": 3, "sha256": _SHA}],
}
RESULT: dict[str, object] = {
    "kind": "FineTuneResult",
    "version": 1,
    "job": "team-a/qa",
    "uid": "u",
    "attempt": 1,
    "createdAt": "2027-01-15T07:00:00Z",
    "method": "lora",
    "artifact": "adapter",
    "baseModel": {"uri": "hf://a/b", "configSha256": _SHA, "architecture": "X", "parameters": 1},
    "data": {"sha256": _SHA, "format": "text", "rows": 1, "samples": 1},
    "configSha256": _SHA,
    "trainableParameters": 1,
    "totalParameters": 1,
    "steps": 1,
    "epochs": 1,
    "trainLoss": 1.0,
    "versions": {},
    "files": [{"path": "adapter/adapter_model.safetensors", "sizeBytes": 3, "sha256": _SHA}],
}
_LATEST = {"uri": str(_RUN), "manifestSha256": _SHA}


class _Store:
    """Of an object store what reading manifests asks of it. What is downloaded lands where its name says, and nothing
    outside of the folder that was given."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self._objects = objects

    def list(self, uri: S3Uri) -> list[tuple[S3Uri, int]]:
        keys = (key for key in self._objects if key.startswith(uri.prefix))
        return [(S3Uri(uri.bucket, key), len(self._objects[key])) for key in sorted(keys)]

    def exists(self, uri: S3Uri) -> bool:
        return uri.key in self._objects

    def get_bytes(self, uri: S3Uri) -> bytes:
        if uri.key not in self._objects:
            raise InputMissing(f"{uri} does not exist")
        return self._objects[uri.key]

    def get_tree(self, uri: S3Uri, files: tuple[Any, ...], folder: Path) -> None:
        for entry in files:
            target = (folder / entry.path).resolve()
            assert target.is_relative_to(folder.resolve()) and target != folder.resolve(), entry.path
        raise CorruptObject("nothing is as the manifest says")


def _store(objects: dict[str, bytes]) -> ObjectStore:
    return cast("ObjectStore", _Store(objects))


def _checkpoint(manifest: bytes) -> None:
    folder = _RUN.child("checkpoints", "step-7")
    objects = {folder.child("manifest.json").key: manifest, folder.child("trained.safetensors").key: b"abc"}
    checkpoints = CheckpointStore(_store(objects), _RUN, _TRAINER_CONFIG, attempt=2)
    newest = checkpoints.newest_complete()
    if newest is not None:
        assert newest.step == 7 and checkpoints.download(newest, _folder() / "checkpoint") is None


def _result(given: tuple[bytes, bytes]) -> None:
    manifest, latest = given
    output = S3Uri("models", "qa")
    # Where the pointer is as it was made, it is one to this manifest.
    latest = latest.replace(_SHA.encode(), hashlib.sha256(manifest).hexdigest().encode())
    objects = {output.child("latest.json").key: latest, _RUN.child("manifest.json").key: manifest}
    # The store has none of the files: a manifest that gets so far was read.
    with suppress(CorruptObject):
        from_store(output, _folder() / "result", _store(objects))


def _changed(document: Any) -> st.SearchStrategy[bytes]:
    return changed_document([document]).map(as_json) | changed_bytes([as_json(document)])


TRAINER_TARGETS = (
    *(
        Target(f"file {name.partition('.')[2]}", changed_bytes(seeds), partial(_file, name), (TrainerError,))
        for name, seeds in FILES.items()
    ),
    Target("row", st.tuples(changed_document(ROWS), st.sampled_from(PURPOSES)), _rows),
    Target("checkpoint manifest", _changed(_CHECKPOINT), _checkpoint),
    Target(
        "result and latest",
        st.tuples(_changed(RESULT), st.just(as_json(_LATEST)) | _changed(_LATEST)),
        _result,
        (TrainerError,),
    ),
)
