"""Object storage against a real S3 server in health, and wrong input."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_operator.local.seaweed import SeaweedServer
from finetune_trainer.contract.config import S3Config
from finetune_trainer.errors import InputMissing, InternalError, PermissionDenied, Unavailable, UsageError
from finetune_trainer.storage import MANIFEST, ObjectStore, S3Uri
from tests.fault_proxy import FaultProxy
from tests.s3 import QUICK
from tests.storage_trees import LARGE, entry_of, make_tree, names


@pytest.mark.parametrize("size", [0, 1, 5 * 2**20, LARGE])
def test_a_file_comes_back_as_it_was_sent(store: ObjectStore, folder_uri: S3Uri, tmp_path: Path, size: int) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(size))
    expected = entry_of(source.read_bytes(), "named.bin")

    sent = store.put_file(folder_uri.child("x"), source, name="named.bin")
    store.get_file(folder_uri.child("x"), tmp_path / "new" / "folder" / "copy.bin", sent)

    assert sent == expected
    assert (tmp_path / "new/folder/copy.bin").read_bytes() == source.read_bytes()
    assert [p.name for p in (tmp_path / "new/folder").iterdir()] == ["copy.bin"]


def test_listing_a_folder_does_not_list_its_namesakes(store: ObjectStore, folder_uri: S3Uri) -> None:
    for name in ("step-1/a", "step-10/a", "step-1/deep/b", "step-1x"):
        store.put_bytes(folder_uri.child(name), b"12345")

    assert store.list(folder_uri.child("step-1")) == [
        (folder_uri.child("step-1/a"), 5),
        (folder_uri.child("step-1/deep/b"), 5),
    ]
    assert store.list(folder_uri.child("none")) == []
    assert store.delete_prefix(folder_uri.child("step-1")) == 2
    assert [str(uri).rpartition("run/")[2] for uri, _ in store.list(folder_uri)] == ["step-10/a", "step-1x"]


def test_listings_and_deletions_of_more_than_a_page(
    proxy: FaultProxy, s3_environment: dict[str, str], folder_uri: S3Uri
) -> None:
    store = ObjectStore(S3Config(endpoint=proxy.endpoint), limits=replace(QUICK, page=3))
    for number in range(8):
        store.put_bytes(folder_uri.child(f"{number}"), b"")
    proxy.seen.clear()

    assert [uri.key[-1] for uri, _ in store.list(folder_uri)] == list("01234567")
    assert len(proxy.methods("GET")) == 3
    assert store.delete_prefix(folder_uri) == 8
    assert len(proxy.methods("POST")) == 3
    assert store.list(folder_uri) == []


def test_exists_is_about_exactly_this_object(store: ObjectStore, folder_uri: S3Uri) -> None:
    store.put_bytes(folder_uri.child("model.json"), b"{}")
    store.put_bytes(folder_uri.child("data/x"), b"")
    found = [store.exists(folder_uri.child(name)) for name in ("model.json", "model", "data", "data/x", "zzz")]
    assert found == [True, False, False, True, False]


def test_a_whole_bucket_is_never_deleted(store: ObjectStore, bucket: str) -> None:
    with pytest.raises(InternalError, match="whole bucket"):
        store.delete_prefix(S3Uri(bucket, ""))


def test_get_bytes_keeps_to_its_limit(store: ObjectStore, folder_uri: S3Uri) -> None:
    store.put_bytes(folder_uri, b"x" * 11)
    assert store.get_bytes(folder_uri, limit=11) == b"x" * 11
    with pytest.raises(UsageError, match="larger than 10 bytes"):
        store.get_bytes(folder_uri, limit=10)


def test_a_stream_gives_lines(store: ObjectStore, folder_uri: S3Uri) -> None:
    lines = [f"line {number}\n".encode() * 50 for number in range(2000)]
    store.put_bytes(folder_uri, b"".join(lines))
    with store.open_stream(folder_uri) as stream:
        assert list(stream) == b"".join(lines).splitlines(keepends=True)


def test_probe_write_leaves_nothing(store: ObjectStore, folder_uri: S3Uri) -> None:
    store.probe_write(folder_uri)
    assert store.list(folder_uri) == []


def test_a_tree_has_its_manifest_last(
    faulty: ObjectStore, proxy: FaultProxy, folder_uri: S3Uri, tmp_path: Path
) -> None:
    done = faulty.put_tree(make_tree(tmp_path / "tree"), folder_uri, names, read_back=True)

    assert [entry.path for entry in done.files] == ["a.bin", "c.bin", "sub/b.bin"]
    assert done.size_bytes == 6000
    manifest = faulty.get_bytes(folder_uri.child(MANIFEST))
    assert manifest == b"a.bin,c.bin,sub/b.bin"
    assert done.manifest_sha256 == hashlib.sha256(manifest).hexdigest()
    assert proxy.methods("PUT")[-1].endswith(f"/{MANIFEST}")
    faulty.get_tree(folder_uri, done.files, tmp_path / "copy")
    assert (tmp_path / "copy/sub/b.bin").read_bytes() == b"B" * 2000


# --- wrong input: each is told apart from the others


def credentials(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_missing_bucket_is_named(store: ObjectStore, tmp_path: Path) -> None:
    missing = S3Uri("no-such-bucket", "run")
    for kind, act in (
        (UsageError, lambda: store.probe_write(missing)),
        (InputMissing, lambda: store.list(missing)),
        (InputMissing, lambda: store.exists(missing)),
        (InputMissing, lambda: store.get_file(missing, tmp_path / "x")),
    ):
        with pytest.raises(kind, match=r"bucket 'no-such-bucket' does not exist at http.*create it") as caught:
            act()
        assert caught.value.reason == "BucketMissing"


def test_a_missing_object_is_named(store: ObjectStore, folder_uri: S3Uri, tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=f"{folder_uri}/nothing does not exist"):
        store.get_file(folder_uri.child("nothing"), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("AWS_ACCESS_KEY_ID", "AKIAWRONGWRONGWRONG0", "access key is not known"),  # allow-secret: made up
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret-wrong-secret-wrong-secret", "secret key does not belong"),
    ],
)
def test_wrong_credentials_are_refused_without_being_shown(
    seaweed: SeaweedServer,
    s3_environment: dict[str, str],
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    says: str,
) -> None:
    monkeypatch.setenv(variable, value)
    store = ObjectStore(S3Config(endpoint=seaweed.endpoint), limits=QUICK)
    with pytest.raises(PermissionDenied, match=says) as caught:
        store.probe_write(S3Uri(bucket, "run"))
    for secret in (value, *s3_environment.values()):
        assert secret == s3_environment["AWS_DEFAULT_REGION"] or secret not in caught.value.message


def test_no_credentials(
    seaweed: SeaweedServer, s3_environment: dict[str, str], bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in s3_environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    store = ObjectStore(S3Config(endpoint=seaweed.endpoint), limits=QUICK)
    with pytest.raises(PermissionDenied, match=r"no usable credentials.*AWS_ACCESS_KEY_ID"):
        store.probe_write(S3Uri(bucket, "run"))


def test_an_endpoint_that_is_none(s3_environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"output\.s3\.endpoint"):
        ObjectStore(S3Config(endpoint="not an address"))


def test_an_endpoint_where_nothing_listens(s3_environment: dict[str, str], bucket: str) -> None:
    store = ObjectStore(S3Config(endpoint="http://127.0.0.1:9"), limits=QUICK)
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:9 .*reachable"):
        store.probe_write(S3Uri(bucket, "run"))
    assert time.monotonic() - started < 10
