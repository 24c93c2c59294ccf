"""Object storage against a real S3 server, in health and with faults."""

from __future__ import annotations

import hashlib
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_operator.local.seaweed import SeaweedServer
from finetune_trainer.contract import FileEntry
from finetune_trainer.contract.config import S3Config
from finetune_trainer.errors import (
    DiskFull,
    InputMissing,
    InternalError,
    PermissionDenied,
    TrainerError,
    Unavailable,
    UsageError,
)
from finetune_trainer.storage import MANIFEST, CorruptObject, ObjectStore, S3Uri, StoreLimits
from tests.fault_proxy import Fault, FaultProxy, always, first
from tests.s3 import QUICK, connect

LARGE = 40 * 2**20  # more than two parts of a multipart upload


@pytest.fixture(scope="module")
def module_proxy(seaweed: SeaweedServer) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def module_faulty(seaweed: SeaweedServer, module_proxy: FaultProxy) -> ObjectStore:
    return connect(seaweed, module_proxy.endpoint)


@pytest.fixture
def proxy(module_proxy: FaultProxy) -> FaultProxy:
    module_proxy.reset()
    return module_proxy


@pytest.fixture
def faulty(proxy: FaultProxy, module_faulty: ObjectStore) -> ObjectStore:
    """A client whose requests pass through `proxy`."""
    return module_faulty


def make_tree(folder: Path) -> Path:
    for name, content in {"a.bin": b"A" * 1000, "sub/b.bin": b"B" * 2000, "c.bin": b"C" * 3000}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def entry_of(content: bytes, path: str = "object") -> FileEntry:
    return FileEntry(path=path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def names(files: tuple[FileEntry, ...]) -> bytes:
    return b",".join(entry.path.encode() for entry in files)


# --- in health


@pytest.mark.parametrize("size", [0, 1, 5 * 2**20, LARGE])
def test_a_file_comes_back_as_it_was_sent(store: ObjectStore, folder_uri: S3Uri, tmp_path: Path, size: int) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(size))
    expected = entry_of(source.read_bytes(), "named.bin")

    sent = store.put_file(folder_uri.child("x"), source, name="named.bin")
    got = store.get_file(folder_uri.child("x"), tmp_path / "new" / "folder" / "copy.bin", sent)

    assert sent == expected
    assert got.sha256 == expected.sha256
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
        ("AWS_ACCESS_KEY_ID", "AKIAWRONGWRONGWRONG0", "access key is not known"),
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


# --- faults


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.RESET_ANSWER, Fault.ERROR_500, Fault.SLOW_DOWN_503, Fault.HANG])
def test_one_fault_is_survived(
    faulty: ObjectStore, proxy: FaultProxy, folder_uri: S3Uri, tmp_path: Path, fault: Fault
) -> None:
    proxy.decide = first(1, fault, method="PUT")
    done = faulty.put_tree(make_tree(tmp_path), folder_uri, names)
    proxy.decide = lambda request: None
    faulty.read_back(folder_uri, done.files)
    assert faulty.get_bytes(folder_uri.child(MANIFEST)) == names(done.files)


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.ERROR_500, Fault.SLOW_DOWN_503, Fault.HANG])
def test_a_store_that_stays_away_is_unavailable(
    faulty: ObjectStore, proxy: FaultProxy, folder_uri: S3Uri, fault: Fault
) -> None:
    proxy.decide = always(fault)
    started = time.monotonic()
    with pytest.raises(Unavailable, match=f"{proxy.endpoint}.*{folder_uri}"):
        faulty.put_bytes(folder_uri, b"x")
    assert len(proxy.seen) == QUICK.attempts
    assert time.monotonic() - started < QUICK.attempts * QUICK.read_seconds + 4


@pytest.mark.parametrize("failing", ["/a.bin", "/c.bin", f"/{MANIFEST}"])
def test_a_store_that_dies_in_the_middle_leaves_no_manifest(
    faulty: ObjectStore, proxy: FaultProxy, folder_uri: S3Uri, tmp_path: Path, failing: str
) -> None:
    tree = make_tree(tmp_path)
    faulty.put_tree(tree, folder_uri, names)
    (tree / "c.bin").write_bytes(b"changed")

    proxy.decide = always(Fault.RESET, method="PUT", path=failing)
    with pytest.raises(Unavailable):
        faulty.put_tree(tree, folder_uri, names)

    proxy.decide = lambda request: None
    assert not faulty.exists(folder_uri.child(MANIFEST)), "not even the older one, whose files are gone"


def test_a_large_upload_that_dies_in_the_middle(
    faulty: ObjectStore, proxy: FaultProxy, folder_uri: S3Uri, tmp_path: Path
) -> None:
    tree = make_tree(tmp_path)
    (tree / "large.bin").write_bytes(os.urandom(LARGE))
    proxy.decide = always(Fault.RESET, method="PUT", path="partNumber=2")

    with pytest.raises(Unavailable, match=r"large\.bin"):
        faulty.put_tree(tree, folder_uri, names)

    stored = [uri.key for uri, _ in faulty.list(folder_uri)]
    assert not any(key.endswith((MANIFEST, "large.bin")) for key in stored)
    assert any("uploadId" in request.path for request in proxy.seen if request.method == "DELETE"), "parts are given up"


def test_a_file_that_the_store_lost_prevents_the_manifest(
    store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    files = store.put_files(make_tree(tmp_path), folder_uri)
    store.delete(folder_uri.child("sub/b.bin"))
    with pytest.raises(CorruptObject, match=r"sub/b\.bin.*no such object"):
        store.put_manifest(folder_uri, files, b"manifest")
    assert not store.exists(folder_uri.child(MANIFEST))


@pytest.mark.parametrize("fault", [Fault.TRUNCATE, Fault.RESET, Fault.HANG])
def test_a_download_goes_on_where_it_broke_off(
    faulty: ObjectStore, proxy: FaultProxy, folder_uri: S3Uri, tmp_path: Path, fault: Fault
) -> None:
    content = os.urandom(9 * 2**20)
    faulty.put_bytes(folder_uri, content)
    proxy.decide = first(1, fault, method="GET")

    got = faulty.get_file(folder_uri, tmp_path / "copy")

    assert (tmp_path / "copy").read_bytes() == content
    assert got.sha256 == hashlib.sha256(content).hexdigest()


def test_a_download_that_always_breaks_off_leaves_no_file(
    faulty: ObjectStore, proxy: FaultProxy, folder_uri: S3Uri, tmp_path: Path
) -> None:
    faulty.put_bytes(folder_uri, b"x" * 100_000)
    proxy.decide = always(Fault.RESET, method="GET")
    with pytest.raises(Unavailable):
        faulty.get_file(folder_uri, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_is_replaced_while_it_is_read(
    faulty: ObjectStore, proxy: FaultProxy, store: ObjectStore, folder_uri: S3Uri
) -> None:
    store.put_bytes(folder_uri, os.urandom(9 * 2**20))
    proxy.decide = first(1, Fault.TRUNCATE, method="GET")
    with (
        pytest.raises(Unavailable, match=r"at http.* was replaced while it was read"),
        faulty.open_stream(folder_uri) as stream,
    ):
        stream.read(100)
        store.put_bytes(folder_uri, os.urandom(9 * 2**20))
        stream.read()


@pytest.mark.parametrize(
    ("stored", "says"), [(b"other", "SHA-256"), (b"longer than it was", "18 bytes, not the 5"), (b"", "0 bytes")]
)
def test_an_object_that_is_not_what_the_manifest_says(
    store: ObjectStore, folder_uri: S3Uri, tmp_path: Path, stored: bytes, says: str
) -> None:
    expected = entry_of(b"right")
    store.put_bytes(folder_uri.child("object"), stored)
    for act in (
        lambda: store.get_file(folder_uri.child("object"), tmp_path / "copy", expected),
        lambda: store.read_back(folder_uri, (expected,)),
        lambda: store.get_tree(folder_uri, (expected,), tmp_path),
    ):
        with pytest.raises(CorruptObject, match=says):
            act()
    assert list(tmp_path.iterdir()) == []


def test_a_bit_that_changes_on_the_wire_is_noticed(
    faulty: ObjectStore, proxy: FaultProxy, folder_uri: S3Uri, tmp_path: Path
) -> None:
    faulty.put_bytes(folder_uri.child("object"), b"right")
    proxy.decide = always(Fault.CORRUPT, method="GET")
    with pytest.raises(Unavailable):
        faulty.get_file(folder_uri.child("object"), tmp_path / "copy", entry_of(b"right"))
    assert list(tmp_path.iterdir()) == []


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Stands in for a small disk: writing beyond it fails in the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_leaves_no_part(store: ObjectStore, folder_uri: S3Uri, tmp_path: Path) -> None:
    store.put_bytes(folder_uri, os.urandom(6 * 2**20))
    with file_size_limit(2**20), pytest.raises(DiskFull, match=rf"cannot write {tmp_path}/copy.*MiB free"):
        store.get_file(folder_uri, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_limits_hold_for_a_store_that_answers_slowly(
    proxy: FaultProxy, s3_environment: dict[str, str], folder_uri: S3Uri
) -> None:
    limits = StoreLimits(attempts=1, connect_seconds=1, read_seconds=0.5)
    store = ObjectStore(S3Config(endpoint=proxy.endpoint), limits=limits)
    proxy.decide = always(Fault.HANG)
    started = time.monotonic()
    with pytest.raises(TrainerError):
        store.list(folder_uri)
    assert time.monotonic() - started < 3
