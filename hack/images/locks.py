"""The lock files of `requirements/`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from images.errors import ImageError

IMAGES: Mapping[str, tuple[str, ...]] = {
    "operator": ("operator.lock",),
    "trainer": ("trainer.lock", "torch.lock"),
}
"""What each image is made of."""
_PIN = re.compile(r"^(?P<name>[a-z0-9]([a-z0-9.-]*[a-z0-9])?)==(?P<version>\S+)$")
_HASH = re.compile(r"^--hash=sha256:(?P<digest>[0-9a-f]{64})$")


@dataclass(frozen=True, slots=True)
class Pinned:
    """One package."""

    name: str
    version: str
    hashes: tuple[str, ...]
    """SHA-256 of its files, any of which may be installed."""


def read(path: Path) -> tuple[Pinned, ...]:
    """The packages of a lock file. Raises ImageError for a line that is anything else, or a package without hashes."""
    found = []
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        first, *rest = line.split() or [""]
        if not first or first.startswith("#"):
            continue
        pin, hashes = _PIN.match(first), [_HASH.match(part) for part in rest]
        if pin is None or not hashes or not all(hashes):
            raise ImageError(f"{path.name}: {line[:100]!r} is not a package with its version and its hashes")
        digests = tuple(found_hash["digest"] for found_hash in hashes if found_hash)
        found.append(Pinned(pin["name"], pin["version"], digests))
    return tuple(found)


def of_image(image: str, requirements: Path = Path("requirements")) -> tuple[Pinned, ...]:
    """Every package of an image, sorted by name."""
    packages = [one for lock in IMAGES[image] for one in read(requirements / lock)]
    return tuple(sorted(packages, key=lambda one: one.name))
