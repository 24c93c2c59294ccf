"""Object storage against a real S3 server behind a proxy that breaks requests, answers and bodies."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_trainer.contract.config import S3Config
from finetune_trainer.errors import DiskFull, TrainerError, Unavailable
from finetune_trainer.storage import MANIFEST, CorruptObject, ObjectStore, S3Uri, StoreLimits, parts
from tests.fault_proxy import Decision, Fault, FaultProxy, Request, always, first
from tests.s3 import QUICK
from tests.small_files import small_files
from tests.storage_trees import LARGE, entry_of, make_tree, names

OF_ALL = pytest.mark.parametrize("known", [True, False], ids=["of a manifest", "of somebody"])


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

    faulty.get_file(folder_uri, tmp_path / "copy")

    assert (tmp_path / "copy").read_bytes() == content


def read_number(which: int, fault: Fault) -> Decision:
    """The first read is of the whole object, others are of parts."""
    numbers = itertools.count(1)
    return lambda request: fault if request.method == "GET" and next(numbers) == which else None


@pytest.fixture
def small_parts(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a part: many fit in an object that is quickly made."""
    monkeypatch.setattr(parts, "PART", 2**18)
    monkeypatch.setattr(parts, "CHUNK", 2**16)
    return parts.PART


def in_parts(proxy: FaultProxy) -> ObjectStore:
    """A client that reads two parts at a time."""
    return ObjectStore(S3Config(endpoint=proxy.endpoint), limits=replace(QUICK, parts=2))


def part_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("object-parts")]


@OF_ALL
@pytest.mark.parametrize("rest", [-1, 0, 1, 77])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_a_large_object_is_read_in_parts(
    proxy: FaultProxy, folder_uri: S3Uri, tmp_path: Path, small_parts: int, count: int, rest: int, known: bool
) -> None:
    store = in_parts(proxy)
    content = os.urandom(count * small_parts + rest)
    store.put_bytes(folder_uri, content)
    proxy.seen.clear()

    store.get_file(folder_uri, tmp_path / "copy", entry_of(content) if known else None)

    assert (tmp_path / "copy").read_bytes() == content
    count = math.ceil(len(content) / small_parts)
    assert len(proxy.methods("GET")) == (1 + count if count > 1 else 1)
    assert part_threads() == []


@pytest.mark.usefixtures("small_parts")
def test_several_large_objects_share_the_connections(proxy: FaultProxy, folder_uri: S3Uri, tmp_path: Path) -> None:
    store = in_parts(proxy)
    contents = {f"{number}.bin": os.urandom(2**21 + number) for number in range(5)}
    for name, content in contents.items():
        store.put_bytes(folder_uri.child(name), content)
    store.get_tree(folder_uri, tuple(entry_of(content, name) for name, content in contents.items()), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("fault", [Fault.TRUNCATE, Fault.RESET, Fault.SLOW_DOWN_503, Fault.SHORT_RANGE])
def test_parts_go_on_where_they_broke_off(proxy: FaultProxy, folder_uri: S3Uri, tmp_path: Path, fault: Fault) -> None:
    store = in_parts(proxy)
    content = os.urandom(2**21 + 12_345)
    store.put_bytes(folder_uri, content)
    proxy.decide = read_number(3, fault)
    store.get_file(folder_uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


@pytest.mark.usefixtures("small_parts")
@OF_ALL
def test_a_part_that_changes_on_the_wire_is_noticed(
    proxy: FaultProxy, folder_uri: S3Uri, tmp_path: Path, known: bool
) -> None:
    """Of what has no manifest by the sum that the store keeps of the whole object."""
    store = in_parts(proxy)
    content = os.urandom(2**21)
    store.put_bytes(folder_uri, content)
    proxy.decide = read_number(3, Fault.CORRUPT)
    with pytest.raises(CorruptObject, match="SHA-256" if known else "its CRC-32 is another"):
        store.get_file(folder_uri, tmp_path / "copy", entry_of(content) if known else None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_parts")
def test_a_large_object_that_is_replaced_while_it_is_read(
    proxy: FaultProxy, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    """The first failure is told, and nothing goes on after it."""
    store.put_bytes(folder_uri, os.urandom(2**22))
    numbers = itertools.count(1)

    def replace_before_the_third(request: Request) -> None:
        if request.method == "GET" and next(numbers) == 3:
            store.put_bytes(folder_uri, os.urandom(2**22))

    proxy.decide = replace_before_the_third
    with pytest.raises(Unavailable, match=r"at http.* was replaced while it was read"):
        in_parts(proxy).get_file(folder_uri, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []
    assert part_threads() == []
    # Of seventeen: the whole object, and four parts that had begun, of which three may have been asked for again.
    assert len(proxy.methods("GET")) <= 8


@pytest.mark.usefixtures("small_parts")
@OF_ALL
def test_a_store_that_ignores_ranges_gives_objects_whole(
    proxy: FaultProxy, folder_uri: S3Uri, tmp_path: Path, known: bool
) -> None:
    store = in_parts(proxy)
    content = os.urandom(2**21 + 5)
    store.put_bytes(folder_uri, content)
    proxy.decide = lambda request: Fault.NO_RANGE if request.method == "GET" else None
    store.get_file(folder_uri, tmp_path / "copy", entry_of(content) if known else None)
    assert (tmp_path / "copy").read_bytes() == content


@pytest.mark.usefixtures("s3_environment")
def test_a_broken_download_from_a_store_that_ignores_ranges_says_so(
    proxy: FaultProxy, folder_uri: S3Uri, tmp_path: Path
) -> None:
    store = in_parts(proxy)
    store.put_bytes(folder_uri, os.urandom(2**20))
    proxy.decide = lambda request: {1: Fault.TRUNCATE}.get(len(proxy.methods("GET")), Fault.NO_RANGE)
    proxy.seen.clear()
    with pytest.raises(Unavailable, match=r"with something else \(the whole object\); use an object store that reads"):
        store.get_file(folder_uri, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


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


@OF_ALL
def test_a_bit_that_changes_on_the_wire_is_noticed(
    faulty: ObjectStore, proxy: FaultProxy, folder_uri: S3Uri, tmp_path: Path, known: bool
) -> None:
    faulty.put_bytes(folder_uri.child("object"), b"right")
    proxy.decide = always(Fault.CORRUPT, method="GET")
    with pytest.raises(Unavailable):
        faulty.get_file(folder_uri.child("object"), tmp_path / "copy", entry_of(b"right") if known else None)
    assert list(tmp_path.iterdir()) == []


def test_a_bit_that_changes_in_a_stream_is_noticed(faulty: ObjectStore, proxy: FaultProxy, folder_uri: S3Uri) -> None:
    faulty.put_bytes(folder_uri, b"one line\n" * 1000)
    proxy.decide = always(Fault.CORRUPT, method="GET")
    with pytest.raises(Unavailable), faulty.open_stream(folder_uri) as stream:
        list(stream)


@pytest.mark.parametrize("size", [6 * 2**20, LARGE])
def test_a_full_disk_is_named_and_leaves_no_part(
    store: ObjectStore, folder_uri: S3Uri, tmp_path: Path, size: int
) -> None:
    store.put_bytes(folder_uri, os.urandom(size))
    with small_files(2**20), pytest.raises(DiskFull, match=rf"cannot write {tmp_path}/copy.*MiB free"):
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
    assert time.monotonic() - started < 10
