"""What an image is made of, from its lock files: a CycloneDX bill of materials.

It is the same for the same lock files: its serial number is made from its content, and it holds no time.
"""

from __future__ import annotations

import json
import tomllib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from images import licences, locks
from images.locks import Pinned

SPECIFICATION = "1.6"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://finetune.dev/sbom")


def render(image: str, requirements: Path) -> str:
    """The bill of materials of an image, as JSON. Raises ImageError where a licence cannot be read."""
    packages = locks.of_image(image, requirements)
    version = _project_version(requirements.parent)
    root = f"finetune-{image}"
    own = _own_component(version)
    content: dict[str, Any] = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPECIFICATION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPECIFICATION,
        "version": 1,
        "metadata": {
            "component": {"type": "container", "bom-ref": root, "name": root, "version": version},
            "licenses": [{"license": {"id": "CC0-1.0"}}],
        },
        "components": [own, *(_component(one) for one in packages)],
        "dependencies": _dependencies(root, own["bom-ref"], packages),
    }
    content["serialNumber"] = f"urn:uuid:{uuid.uuid5(_NAMESPACE, json.dumps(content, sort_keys=True))}"
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def purl(package: Pinned) -> str:
    """The package URL (ECMA-427) of a package of PyPI."""
    return f"pkg:pypi/{package.name}@{package.version}"


def _component(package: Pinned) -> dict[str, Any]:
    found = licences.of(package)
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl(package),
        "name": package.name,
        "version": package.version,
        "purl": purl(package),
        # One for each platform, of which the image has one: so they are of its distribution, not of the component.
        "externalReferences": [
            {
                "type": "distribution",
                "url": purl(package),
                "comment": "the files that the lock allows",
                "hashes": [{"alg": "SHA-256", "content": digest} for digest in package.hashes],
            }
        ],
    }
    if found.expression != licences.UNKNOWN:
        component["licenses"] = [{"expression": found.expression}]
    return component


def _own_component(version: str) -> dict[str, Any]:
    return {
        "type": "library",
        "bom-ref": f"pkg:pypi/finetune-operator@{version}",
        "name": "finetune-operator",
        "version": version,
        "purl": f"pkg:pypi/finetune-operator@{version}",
        "licenses": [{"license": {"id": "Apache-2.0"}}],
    }


def _dependencies(root: str, own: str, packages: Sequence[Pinned]) -> list[dict[str, Any]]:
    """The lock is flat: it says what is there, not who asked for it."""
    return [{"ref": root, "dependsOn": [own]}, {"ref": own, "dependsOn": [purl(one) for one in packages]}]


def _project_version(root: Path) -> str:
    return str(tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])
