"""Bills of materials: valid, whole, and the same each time."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from images import bom, locks
from tests.images.dockerfiles import ROOT

REQUIREMENTS = ROOT / "requirements"
VALIDATOR = JsonStrictValidator(SchemaVersion.V1_6)
images = pytest.mark.parametrize("image", list(locks.IMAGES))


def components(image: str) -> dict[str, dict[str, Any]]:
    found = json.loads(bom.render(image, REQUIREMENTS))["components"]
    return {one["name"]: one for one in found}


@images
def test_it_is_valid(image: str) -> None:
    assert bom.SPECIFICATION == "1.6"
    assert VALIDATOR.validate_str(bom.render(image, REQUIREMENTS)) is None


def test_what_is_not_valid_would_be_noticed() -> None:
    content = json.loads(bom.render("operator", REQUIREMENTS))
    content["components"][1]["externalReferences"][0]["hashes"][0]["content"] = "abc"
    assert VALIDATOR.validate_str(json.dumps(content)) is not None


@images
def test_every_package_of_the_locks_is_in_it_with_its_hashes(image: str) -> None:
    found = components(image)
    text = "".join((REQUIREMENTS / name).read_text() for name in locks.IMAGES[image])
    pinned = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", text, re.MULTILINE))
    assert found.keys() - {"finetune-operator"} == pinned.keys()
    hashes = []
    for name, version in pinned.items():
        one = found[name]
        assert (one["version"], one["purl"], one["bom-ref"]) == (version, *2 * (f"pkg:pypi/{name}@{version}",))
        assert one["licenses"][0]["expression"]
        hashes += [each["content"] for each in one["externalReferences"][0]["hashes"]]
    assert sorted(hashes) == sorted(re.findall(r"sha256:([0-9a-f]{64})", text))


def test_torch_is_in_the_trainer_with_its_gpu_libraries() -> None:
    found = components("trainer")
    assert {"torch", "triton", "nvidia-nccl-cu13", "nvidia-cublas"} <= found.keys()
    assert "BSD-3-Clause" in found["torch"]["licenses"][0]["expression"]


@images
def test_every_reference_leads_somewhere(image: str) -> None:
    content = json.loads(bom.render(image, REQUIREMENTS))
    known = {one["bom-ref"] for one in (content["metadata"]["component"], *content["components"])}
    named = {ref for one in content["dependencies"] for ref in (one["ref"], *one["dependsOn"])}
    assert named == known


@images
def test_it_is_the_same_each_time_and_of_its_own_image(image: str) -> None:
    first, second = bom.render(image, REQUIREMENTS), bom.render(image, REQUIREMENTS)
    assert first == second
    numbers = {json.loads(bom.render(one, REQUIREMENTS))["serialNumber"] for one in locks.IMAGES}
    assert len(numbers) == len(locks.IMAGES)
