"""The lock files that images are made of."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from images import locks
from images.errors import ImageError
from tests.images.dockerfiles import ROOT

REQUIREMENTS = ROOT / "requirements"
DIGEST = "0" * 64


@pytest.mark.parametrize(
    "name", ["build.lock", "dev.lock", "flash4.lock", "operator.lock", "torch.lock", "trainer.lock"]
)
def test_every_line_is_a_package_with_hashes(name: str) -> None:
    found = locks.read(REQUIREMENTS / name)
    text = (REQUIREMENTS / name).read_text()
    assert len(found) == text.count("==") == len({one.name for one in found})
    assert sum(len(one.hashes) for one in found) == text.count("--hash=sha256:")


@pytest.mark.parametrize(
    "line",
    [
        "numpy==2.0",
        f"numpy>=2.0 --hash=sha256:{DIGEST}",
        f"numpy==2.0 --hash=md5:{DIGEST}",
        "numpy==2.0 --hash=sha256:12",
        f"git+ssh://somewhere/numpy --hash=sha256:{DIGEST}",
        "--index-url somewhere",
    ],
)
def test_anything_else_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.lock").write_text(f"six==1.0 \\\n    --hash=sha256:{DIGEST}\n{line}\n")
    with pytest.raises(ImageError, match=r"a\.lock: "):
        locks.read(tmp_path / "a.lock")


def test_torch_and_the_rest_of_the_trainer_do_not_overlap() -> None:
    both = [{one.name for one in locks.read(REQUIREMENTS / name)} for name in locks.IMAGES["trainer"]]
    assert both[0] & both[1] == set()
    assert {"torch", "triton"} <= both[1]


def test_what_flash_attention_4_adds_is_not_in_the_image_already() -> None:
    added = {one.name for one in locks.read(REQUIREMENTS / "flash4.lock")}
    assert {"flash-attn-4", "nvidia-cutlass-dsl-libs-cu13"} <= added
    assert not added & {one.name for one in locks.of_image("trainer", REQUIREMENTS)}


def test_what_builds_this_project_is_pinned() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    pinned = {one.name for one in locks.read(REQUIREMENTS / "build.lock")}
    assert {one.partition(">")[0] for one in wanted} | {"pip", "setuptools"} <= pinned


def test_the_operator_has_no_torch() -> None:
    names = {one.name for one in locks.of_image("operator", REQUIREMENTS)}
    assert not names & {"torch", "numpy", "transformers", "boto3"}
    assert {"kopf", "lightkube", "pydantic"} <= names


def test_what_both_images_have_is_of_one_version() -> None:
    versions = [{one.name: one.version for one in locks.of_image(image, REQUIREMENTS)} for image in locks.IMAGES]
    shared = versions[0].keys() & versions[1].keys()
    assert "pydantic" in shared
    assert {name: versions[0][name] for name in shared} == {name: versions[1][name] for name in shared}
