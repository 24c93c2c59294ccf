from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from finetune_operator.errors import AlreadyExists, ClusterError, Conflict, FinetuneError, NotFound
from finetune_operator.local.store import Key, ObjectStore
from tests.unit.local.objects import Manifest, config_map, container, pod

KEY = Key("ConfigMap", "default", "a")


def owned_by(owner: Manifest, manifest: Manifest) -> Manifest:
    meta = owner["metadata"]
    manifest["metadata"]["ownerReferences"] = [{"kind": owner["kind"], "name": meta["name"], "uid": meta["uid"]}]
    return manifest


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(tmp_path / "state.json", lambda: 0.0)


def test_creation_gives_identity_and_refuses_a_taken_name(store: ObjectStore) -> None:
    created = store.create(config_map("a"))
    meta = created["metadata"]
    assert meta["uid"] and meta["generation"] == 1 and meta["creationTimestamp"] == "1970-01-01T00:00:00Z"
    with pytest.raises(AlreadyExists, match="ConfigMap default/a"):
        store.create(config_map("a"))


def test_only_a_changed_spec_counts_up_the_generation(store: ObjectStore) -> None:
    store.create({**config_map("a"), "spec": {"x": 1}})
    with_status = store.change(KEY, lambda found: found.update(status={"phase": "Running"}))
    with_spec = store.change(KEY, lambda found: found.update(spec={"x": 2}))
    unchanged = store.change(KEY, lambda found: found.update(spec={"x": 2}))
    assert [one["metadata"]["generation"] for one in (with_status, with_spec, unchanged)] == [1, 2, 2]
    versions = [int(one["metadata"]["resourceVersion"]) for one in (with_status, with_spec, unchanged)]
    assert versions[0] < versions[1] == versions[2]


def test_a_stale_or_other_object_is_not_changed(store: ObjectStore) -> None:
    created = store.create(config_map("a", k="1"))
    store.change(KEY, lambda found: found.update(data={"k": "2"}))
    with pytest.raises(Conflict):
        store.change(KEY, lambda found: found.clear(), resource_version=created["metadata"]["resourceVersion"])
    with pytest.raises(Conflict):
        store.change(KEY, lambda found: found.clear(), uid="another")
    with pytest.raises(NotFound):
        store.change(Key("ConfigMap", "default", "b"), lambda found: None)
    found = store.get(KEY)
    assert found is not None and found["data"] == {"k": "2"}


def test_what_is_read_is_a_copy(store: ObjectStore) -> None:
    store.create(config_map("a", k="1"))
    for found in (store.get(KEY), *store.select("ConfigMap")):
        assert found is not None
        found["data"]["k"] = "changed"
    kept = store.get(KEY)
    assert kept is not None and kept["data"] == {"k": "1"}


def test_select_looks_at_kind_namespace_and_every_label(store: ObjectStore) -> None:
    for name, labels in (("a", {"x": "1", "y": "1"}), ("b", {"x": "1"}), ("c", {})):
        manifest = config_map(name)
        manifest["metadata"]["labels"] = labels
        store.create(manifest)
    assert [one["metadata"]["name"] for one in store.select("ConfigMap", x="1")] == ["a", "b"]
    assert [one["metadata"]["name"] for one in store.select("ConfigMap", x="1", y="1")] == ["a"]
    assert store.select("ConfigMap", "elsewhere") == store.select("Pod") == []


def test_children_go_with_their_owner_generation_after_generation(store: ObjectStore) -> None:
    owner = store.create(config_map("owner"))
    child = store.create(owned_by(owner, config_map("child")))
    store.create(owned_by(child, config_map("grandchild")))
    store.create(config_map("other"))
    store.delete(Key.of(owner))
    assert [one["metadata"]["name"] for one in store.select("ConfigMap")] == ["other"]


def test_a_child_whose_owner_is_another_object_of_the_same_name_goes(store: ObjectStore) -> None:
    gone = store.create(config_map("owner"))
    store.delete(Key.of(gone))
    store.create(config_map("owner"))
    store.create(owned_by(gone, config_map("child")))
    assert store.get(Key("ConfigMap", "default", "child")) is None


def test_a_deleted_pod_stays_until_its_node_has_stopped_it(store: ObjectStore) -> None:
    owner = store.create(config_map("owner"))
    key = Key.of(store.create(owned_by(owner, pod(container("x")))))
    store.delete(Key.of(owner))
    found = store.get(key)
    assert found is not None and found["metadata"]["deletionTimestamp"]
    store.remove(key)
    assert store.get(key) is None


def test_delete_with_a_uid_means_that_object_only(store: ObjectStore) -> None:
    created = store.create(config_map("a"))
    store.delete(KEY, uid="another")
    assert store.get(KEY) is not None
    store.delete(KEY, uid=created["metadata"]["uid"])
    store.delete(KEY)
    assert store.get(KEY) is None


def test_listeners_hear_of_every_write_and_of_nothing_else(store: ObjectStore) -> None:
    heard: list[str] = []
    store.subscribe(lambda key: heard.append(key.name))
    store.create(config_map("a"))
    store.change(KEY, lambda found: None)
    store.change(KEY, lambda found: found.update(data={"k": "v"}))
    store.delete(KEY)
    assert heard == ["a", "a", "a"]


def test_everything_is_there_again_after_a_restart(store: ObjectStore, tmp_path: Path) -> None:
    store.create(config_map("a", k="v"))
    again = ObjectStore(tmp_path / "state.json", lambda: 1.0)
    assert again.get(KEY) == store.get(KEY)
    newer = again.create(config_map("b"))
    first = store.get(KEY)
    assert first is not None
    assert int(newer["metadata"]["resourceVersion"]) > int(first["metadata"]["resourceVersion"])


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '"x"', "{}", '{"version": 1}', '{"version": 1, "resourceVersion": "x", "objects": []}',
     '{"version": 1, "resourceVersion": 1, "objects": [{}]}', '{"version": 2, "resourceVersion": 1, "objects": []}'],
)  # fmt: skip
def test_a_broken_state_file_is_an_error_with_a_remedy(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(FinetuneError, match=r"state\.json.*--fresh"):
        ObjectStore(path, lambda: 0.0)
    assert path.read_text() == text


def test_a_failed_write_leaves_the_old_file_whole(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create(config_map("a"))
    before = (tmp_path / "state.json").read_text()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ClusterError, match="No space left"):
        store.create(config_map("b"))
    assert (tmp_path / "state.json").read_text() == before
    assert json.loads(before)["objects"]
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
