from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any, cast

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from finetune_operator.api.v1alpha1 import FineTuneJob
from finetune_operator.errors import FinetuneError
from finetune_operator.local.buckets import Location, StoreError, download_result, named_buckets, seed
from tests.unit.local.jobs import job

URI = "s3://models/toy/runs/u"


class FakeS3:
    """As much of boto3's client as is used, over a dictionary."""

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.objects = dict(objects or {})
        self.metadata: dict[str, dict[str, str]] = {}
        self.failure: Exception | None = None

    def _find(self, bucket: str, key: str) -> bytes:
        if self.failure is not None:
            raise self.failure
        try:
            return self.objects[f"{bucket}/{key}"]
        except KeyError:
            answer = {"Error": {"Code": "404", "Message": "gone"}, "ResponseMetadata": {"HTTPStatusCode": 404}}
            raise ClientError(cast(Any, answer), "HeadObject") from None

    def head_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        data = self._find(Bucket, Key)
        return {"ContentLength": len(data), "Metadata": self.metadata.get(f"{Bucket}/{Key}", {})}

    def upload_file(self, path: str, bucket: str, key: str, ExtraArgs: dict[str, Any]) -> None:
        self.objects[f"{bucket}/{key}"] = Path(path).read_bytes()
        self.metadata[f"{bucket}/{key}"] = ExtraArgs["Metadata"]

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        return {"Body": io.BytesIO(self._find(Bucket, Key))}

    def download_file(self, bucket: str, key: str, path: str) -> None:
        Path(path).write_bytes(self._find(bucket, key))


def entry(path: str, data: bytes) -> dict[str, Any]:
    return {"path": path, "sizeBytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def stored(*files: tuple[str, bytes]) -> FakeS3:
    """A store with a result of these files."""
    manifest = {
        "job": "default/toy", "uid": "u", "attempt": 1, "createdAt": "now", "method": "lora", "artifact": "adapter",
        "configSha256": "0", "trainableParameters": 1, "totalParameters": 2, "steps": 1, "epochs": 1, "trainLoss": 1,
        "baseModel": {"uri": "x", "configSha256": "0", "architecture": "Toy", "parameters": 2},
        "data": {"sha256": "0", "format": "text", "rows": 1, "samples": 1},
        "versions": {}, "files": [entry(path, data) for path, data in files],
    }  # fmt: skip
    objects = {f"models/toy/runs/u/{path}": data for path, data in files}
    return FakeS3({**objects, "models/toy/runs/u/manifest.json": json.dumps(manifest).encode()})


def download(s3: FakeS3, target: Path, digest: str | None = None) -> Any:
    return download_result(cast(Any, s3), URI, digest, target)


def test_every_bucket_that_a_job_names_once() -> None:
    found: FineTuneJob = job(
        model={"uri": "s3://bbb/m"},
        dataset={"sources": [{"uri": "s3://ccc/x"}, {"uri": "hf://datasets/d/e"}], "validation": {"uri": "s3://bbb/v"}},
        output={"uri": "s3://aaa/x"},
    )
    assert named_buckets(found) == ("bbb", "ccc", "aaa")


def test_the_buckets_of_each_adapters_data() -> None:
    own = {"uri": "s3://other/b.jsonl", "packing": False, "validation": {"uri": "s3://held/v.jsonl"}}
    mixed = {"sources": [{"uri": "s3://more/a"}, {"uri": "s3://data/c"}]}
    adapters = [{"name": "one"}, {"name": "two", "dataset": own}, {"name": "three", "dataset": mixed}]
    found = job(method="lora", adapters=adapters)
    assert named_buckets(found) == ("data", "other", "held", "more", "models")


def test_locations() -> None:
    assert Location.parse("s3://b/x/y/").file("f") == "x/y/f"
    assert Location.parse("s3://b").file("f") == "f"


def test_files_of_named_buckets_are_copied_once(tmp_path: Path) -> None:
    for path, text in {"data/a/b.txt": "one", "data/c.txt": "three", "other/d.txt": "x"}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    s3 = FakeS3()
    first = seed(cast(Any, s3), tmp_path, ("data", "missing"))
    assert s3.objects == {"data/a/b.txt": b"one", "data/c.txt": b"three"}
    assert (first.copied, first.kept, first.size_bytes) == (2, 0, 8)
    (tmp_path / "data" / "c.txt").write_text("seven")
    second = seed(cast(Any, s3), tmp_path, ("data",))
    assert (second.copied, second.kept) == (1, 1), "one of equal size and other content is copied again"
    assert s3.objects["data/c.txt"] == b"seven"


def test_linked_folders_of_a_bucket_are_copied_too(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "a.txt").write_text("one")
    (tmp_path / "data").mkdir()
    for name in ("first", "second"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    s3 = FakeS3()
    seed(cast(Any, s3), tmp_path, ("data",))
    assert s3.objects == {"data/first/deep/a.txt": b"one", "data/second/deep/a.txt": b"one"}
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FinetuneError, match=r"data/first/deep/back: .* leads back .*remove the link"):
        seed(cast(Any, s3), tmp_path, ("data",))


def test_an_object_without_our_digest_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_text("new")
    s3 = FakeS3({"data/a": b"old"})
    assert seed(cast(Any, s3), tmp_path, ("data",)).copied == 1
    assert s3.objects["data/a"] == b"new"


def test_a_result_is_downloaded_whole_and_replaces_an_earlier_one(tmp_path: Path) -> None:
    s3 = stored(("adapter/a.bin", b"aaa"), ("evaluation.json", b"{}"))
    target = tmp_path / "result"
    target.mkdir()
    (target / "stale").touch()
    manifest = download(s3, target, hashlib.sha256(s3.objects["models/toy/runs/u/manifest.json"]).hexdigest())
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert found == {"adapter/a.bin", "evaluation.json", "manifest.json"}
    assert [file.path for file in manifest.files] == ["adapter/a.bin", "evaluation.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("adapter/a.bin", b"aab", "adapter/a.bin has 3 bytes and SHA-256"),
        ("adapter/a.bin", b"aa", "has 2 bytes"),
        ("adapter/a.bin", None, r"adapter/a\.bin: .*404"),
        ("manifest.json", None, "manifest.json: .*404"),
        ("manifest.json", b"{}", "manifest.json is no result manifest"),
    ],
)
def test_what_is_not_what_the_manifest_says_is_no_result(
    tmp_path: Path, key: str, content: bytes | None, message: str
) -> None:
    s3 = stored(("adapter/a.bin", b"aaa"))
    if content is None:
        del s3.objects[f"models/toy/runs/u/{key}"]
    else:
        s3.objects[f"models/toy/runs/u/{key}"] = content
    with pytest.raises(StoreError, match=message):
        download(s3, tmp_path / "result")
    assert not (tmp_path / "result").exists()


def test_another_manifest_than_the_status_names_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the job's status says 00"):
        download(stored(), tmp_path / "result", "0" * 64)


def test_a_store_that_does_not_answer_is_named(tmp_path: Path) -> None:
    s3 = stored()
    s3.failure = EndpointConnectionError(endpoint_url="http://127.0.0.1:1")
    with pytest.raises(StoreError, match="Could not connect"):
        download(s3, tmp_path / "result")


@pytest.mark.parametrize("method", ["mkdir", "write_bytes", "replace"])
def test_a_full_disk_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    s3 = stored()

    def full(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, method, full)
    with pytest.raises(StoreError, match=r"cannot write .*result.*: No space left on device"):
        download(s3, tmp_path / "result")
