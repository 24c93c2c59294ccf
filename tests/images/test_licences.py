"""Licences: every one is known and allowed, and the report says so."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from images import licences, locks
from images.errors import ImageError
from images.licences import UNKNOWN, Licence
from images.locks import Pinned
from tests.images.dockerfiles import ROOT

REQUIREMENTS = ROOT / "requirements"
CLASSIFIER = "Classifier: License :: OSI Approved ::"
ALL = sorted({one for image in locks.IMAGES for one in locks.of_image(image, REQUIREMENTS)}, key=lambda one: one.name)


def test_the_report_is_fresh_and_nothing_is_objected_to() -> None:
    assert licences.report(REQUIREMENTS) == (ROOT / "docs/licences.md").read_text(), "run 'make licences'"


@pytest.mark.parametrize(
    ("expression", "refused"),
    [
        ("MIT", []),
        ("MIT OR Apache-2.0", []),
        ("Apache-2.0 WITH LLVM-exception", []),
        ("GPL-3.0-or-later WITH GCC-exception-3.1", []),
        ("GPL-3.0-only", ["GPL-3.0-only"]),
        ("MIT AND AGPL-3.0-or-later", ["AGPL-3.0-or-later"]),
        ("GPL-3.0-or-later", ["GPL-3.0-or-later"]),
        ("LGPL-2.1-or-later", ["LGPL-2.1-or-later"]),
        ("MPL-2.0", ["MPL-2.0"]),
        ("LicenseRef-NVIDIA-Proprietary", ["LicenseRef-NVIDIA-Proprietary"]),
    ],
)
def test_what_is_allowed(expression: str, refused: list[str]) -> None:
    package = Pinned("acme", "1.0", ())
    said = licences.objections(package, Licence(expression, "LICENSE"))
    assert [line.split(": ")[1].split(" is ")[0] for line in said] == refused


def test_an_unknown_licence_is_refused() -> None:
    (said,) = licences.objections(Pinned("acme", "1.0", ()), Licence(UNKNOWN, "nothing"))
    assert "acme 1.0" in said and "licences.toml" in said


def test_what_is_stated_for_one_package_is_not_allowed_for_another() -> None:
    for one in licences.table()["attention"]:
        for name in one["packages"]:
            assert licences.objections(Pinned(name, "1", ()), Licence(one["licence"], "")) == []
        assert licences.objections(Pinned("acme", "1", ()), Licence(one["licence"], "")) != []


@pytest.mark.parametrize(
    ("expression", "parts"),
    [
        ("MIT", ["MIT"]),
        ("MIT AND (BSD-3-Clause OR MIT)", ["BSD-3-Clause", "MIT"]),
        (
            "Apache-2.0 AND Apache-2.0 WITH LLVM-exception",
            ["Apache-2.0", "Apache-2.0 WITH LLVM-exception"],
        ),
    ],
)
def test_the_parts_of_an_expression(expression: str, parts: list[str]) -> None:
    assert licences.parts(expression) == parts


def metadata(folder: Path, version: str, *lines: str) -> None:
    info = folder / f"acme-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.4", "Name: acme", f"Version: {version}", *lines, ""])
    )


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["License-Expression: mit", "License: GPL"], Licence("MIT", "License-Expression")),
        (["License: Apache License, Version 2.0"], Licence("Apache-2.0", "License")),
        (["License: BSD"], Licence(UNKNOWN, "nothing")),
        (["License: Permission is hereby granted", f"{CLASSIFIER} MIT License"], Licence("MIT", "classifier")),
        ([f"{CLASSIFIER} MIT License", f"{CLASSIFIER} Apache Software License"], Licence(UNKNOWN, "nothing")),
        (["License: " + "word " * 400], Licence(UNKNOWN, "nothing")),
        ([], Licence(UNKNOWN, "nothing")),
    ],
)
def test_what_metadata_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], expected: Licence
) -> None:
    metadata(tmp_path, "1.0", *lines)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert licences.of(Pinned("acme", "1.0", ())) == expected


def test_metadata_of_another_version_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata(tmp_path, "2.0+cpu", "License-Expression: MIT")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert licences.of(Pinned("acme", "2.0", ())).expression == "MIT"
    with pytest.raises(ImageError, match=r"2\.0 is installed here, the lock says 1\.0"):
        licences.of(Pinned("acme", "1.0", ()))
    with pytest.raises(ImageError, match="not installed here"):
        licences.of(Pinned("no-such-package", "1.0", ()))


def test_nothing_is_stated_that_is_not_needed() -> None:
    """Of packages that images have, and that do not say it themselves as clearly."""
    names = {one.name for one in ALL}
    stated = licences.table()["packages"]
    assert stated.keys() <= names
    assert {name for one in licences.table()["attention"] for name in one["packages"]} <= names
    for name, one in stated.items():
        # GPU libraries are not installed where torch is a build for CPUs.
        if not name.startswith(("cuda-", "nvidia-", "triton")):
            said = importlib.metadata.metadata(name).get("License-Expression")
            assert said is None or said != one["licence"], name
