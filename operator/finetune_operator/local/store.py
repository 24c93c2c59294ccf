"""Kubernetes objects in memory, kept in one file: what of an API server's behaviour one machine needs.

Creation is by name, every write counts up `resourceVersion`, a changed spec counts up `generation`, an object goes
when its owner goes, and a pod that is deleted stays, marked, until the node has stopped it.
"""

from __future__ import annotations

import copy
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from finetune_operator.errors import AlreadyExists, ClusterError, Conflict, FinetuneError, NotFound
from finetune_operator.times import rfc3339

Manifest = dict[str, Any]
Change = Callable[[Manifest], None]

STATE_VERSION = 1
_GRACEFUL_KINDS = frozenset({"Pod"})


class Key(NamedTuple):
    """Names one object."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Key:
        """The key of an object."""
        meta = manifest["metadata"]
        return cls(manifest["kind"], meta.get("namespace", "default"), meta["name"])


class ObjectStore:
    """The objects of one run. Reads give copies. Not for use from several threads."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        """Start with what `path` holds, if it is there.

        Raises FinetuneError when the file cannot be read as a state file.
        """
        self._path = path
        self._clock = clock
        self._objects: dict[Key, Manifest] = {}
        self._version = 0
        self._listeners: list[Callable[[Key], None]] = []
        if path.exists():
            self._load()

    def subscribe(self, listener: Callable[[Key], None]) -> None:
        """Call `listener` with the key of every object that is written or removed."""
        self._listeners.append(listener)

    def get(self, key: Key) -> Manifest | None:
        """An object, or None."""
        found = self._objects.get(key)
        return None if found is None else copy.deepcopy(found)

    def select(self, kind: str, namespace: str | None = None, **labels: str) -> list[Manifest]:
        """Objects of a kind that carry all `labels` (pass names with dots and slashes by `**`), by name."""
        return [copy.deepcopy(one) for one in self._matching(kind, namespace, labels)]

    def events(self) -> list[Manifest]:
        """Copies of all events, the newest last."""
        return sorted(self.select("Event"), key=lambda event: int(event["metadata"]["resourceVersion"]))

    def create(self, manifest: Manifest) -> Manifest:
        """Add an object under its name; it gets its uid and times here.

        Raises:
            AlreadyExists: the name is taken.
        """
        key = Key.of(manifest)
        if key in self._objects:
            raise AlreadyExists(f"{key} is already there", status=409)
        created = copy.deepcopy(manifest)
        meta = created["metadata"]
        meta.update(
            namespace=key.namespace,
            uid=str(uuid.uuid4()),
            generation=1,
            creationTimestamp=rfc3339(self._clock()),
            resourceVersion=self._next_version(),
        )
        self._objects[key] = created
        self._commit(key)
        return copy.deepcopy(created)

    def change(self, key: Key, change: Change, *, uid: str = "", resource_version: str = "") -> Manifest:
        """Let `change` edit an object.

        Args:
            key: which object.
            change: edits the manifest it is given; nothing is written when it leaves it as it was.
            uid: when set, only the object of this uid is meant.
            resource_version: when set, the version that the caller has read.

        Raises:
            NotFound: there is no such object.
            Conflict: it is another one, or newer than what the caller has read.
        """
        current = self._objects.get(key)
        if current is None:
            raise NotFound(f"{key} is not there", status=404)
        meta = current["metadata"]
        if (uid and uid != meta["uid"]) or (resource_version and resource_version != meta["resourceVersion"]):
            raise Conflict(f"{key} changed since it was read", status=409)
        changed = copy.deepcopy(current)
        change(changed)
        if changed != current:
            if changed.get("spec") != current.get("spec"):
                changed["metadata"]["generation"] += 1
            changed["metadata"]["resourceVersion"] = self._next_version()
            self._objects[key] = changed
            self._commit(key)
        return copy.deepcopy(changed)

    def delete(self, key: Key, *, uid: str | None = None) -> None:
        """Delete an object and what it owns. A pod is only marked: the node stops it, then calls `remove`."""
        found = self._objects.get(key)
        if found is None or (uid is not None and uid != found["metadata"]["uid"]):
            return
        if key.kind in _GRACEFUL_KINDS:
            self.change(key, self._mark_deleted)
        else:
            self.remove(key)

    def remove(self, key: Key) -> None:
        """Take an object away at once, then what only it owned."""
        if self._objects.pop(key, None) is not None:
            self._commit(key)

    def _mark_deleted(self, manifest: Manifest) -> None:
        manifest["metadata"].setdefault("deletionTimestamp", rfc3339(self._clock()))

    def _matching(self, kind: str, namespace: str | None, labels: Mapping[str, str]) -> Iterator[Manifest]:
        for key in sorted(self._objects):
            if key.kind != kind or (namespace is not None and key.namespace != namespace):
                continue
            found = self._objects[key]
            carried = found["metadata"].get("labels") or {}
            if all(carried.get(name) == value for name, value in labels.items()):
                yield found

    def _next_version(self) -> str:
        self._version += 1
        return str(self._version)

    def _commit(self, key: Key) -> None:
        """Persist, tell, and let go what lost its last owner."""
        self._save()
        for listener in self._listeners:
            listener(key)
        uids = {found["metadata"]["uid"] for found in self._objects.values()}
        for other, found in list(self._objects.items()):
            owners = found["metadata"].get("ownerReferences") or []
            if owners and not any(owner["uid"] in uids for owner in owners) and other in self._objects:
                self.delete(other)

    def _save(self) -> None:
        document = {
            "version": STATE_VERSION,
            "resourceVersion": self._version,
            "objects": [self._objects[key] for key in sorted(self._objects)],
        }
        temporary = self._path.with_suffix(".tmp")
        try:
            with temporary.open("w", encoding="utf-8") as stream:
                json.dump(document, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self._path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ClusterError(f"cannot write {self._path}: {error.strerror}; free the disk and run again") from error

    def _load(self) -> None:
        try:
            document = json.loads(self._path.read_text(encoding="utf-8"))
            version, objects = document["version"], {Key.of(one): one for one in document["objects"]}
            self._version = int(document["resourceVersion"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FinetuneError(
                f"{self._path} cannot be read ({type(error).__name__}: {error}); start over with --fresh, "
                "or name another folder with -o"
            ) from error
        if version != STATE_VERSION:
            raise FinetuneError(
                f"{self._path} was written by another version of finetune (state version {version}, this one reads "
                f"{STATE_VERSION}); start over with --fresh, or name another folder with -o"
            )
        self._objects = objects
