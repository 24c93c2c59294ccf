from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_operator.errors import FinetuneError, InvalidManifest, PlanningError
from finetune_operator.local.gpus import Gpu
from finetune_operator.local.prepare import (
    check_changes,
    check_gpus,
    check_secrets,
    device_memory,
    read_secret,
    with_absolute_files,
    without_reuse,
)
from tests.unit.local.jobs import job

FOLDER = Path("/some/folder")


@pytest.mark.parametrize(
    ("uri", "absolute"),
    [
        ("file:model", "file:///some/folder/model"),
        ("file:./a/../model", "file:///some/folder/model"),
        ("file:../model", "file:///some/model"),
        ("file:///srv/model", "file:///srv/model"),
        ("file:/srv/model", "file:///srv/model"),
        ("hf://org/model", "hf://org/model"),
    ],
)
def test_file_uris_start_from_the_manifests_folder(uri: str, absolute: str) -> None:
    found = with_absolute_files(job(model={"uri": uri}), FOLDER)
    assert found.spec.model.uri == absolute


def test_every_field_with_a_uri_is_resolved() -> None:
    dataset = {"sources": [{"uri": "file:a", "weight": 2.0}, {"uri": "s3://b/c"}], "validation": {"uri": "file:v"}}
    found = with_absolute_files(job(dataset=dataset), FOLDER).spec.dataset
    assert [(one.uri, one.weight) for one in found.sources or ()] == [
        ("file:///some/folder/a", 2.0),
        ("s3://b/c", 1.0),
    ]
    assert found.validation is not None and found.validation.uri == "file:///some/folder/v"


def test_a_linked_file_keeps_the_name_that_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "9f3c2a").touch()
    (tmp_path / "train.jsonl").symlink_to("blobs/9f3c2a")
    found = with_absolute_files(job(dataset={"uri": "file:./train.jsonl"}), tmp_path)
    assert found.spec.dataset.uri == f"file://{tmp_path}/train.jsonl"


def test_a_folder_with_a_space_cannot_be_a_uri() -> None:
    with pytest.raises(FinetuneError, match="has a space in it"):
        with_absolute_files(job(model={"uri": "file:model"}), Path("/some folder"))


S3: dict[str, Any] = {"output": {"uri": "s3://mmm/x", "s3": {"secretRef": {"name": "s3"}}}}
TOKEN: dict[str, Any] = {"model": {"uri": "hf://a/b", "tokenSecretRef": {"name": "hf", "key": "t"}}}


@pytest.mark.parametrize(
    ("spec", "secrets", "message"),
    [
        (S3, {}, r"spec\.output\.s3\.secretRef: .*pass --secret s3=FILE.*AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (S3, {"s3": {"AWS_ACCESS_KEY_ID": "x"}}, "has no AWS_SECRET_ACCESS_KEY; add it"),
        (TOKEN, {"s3": {}}, r"spec\.model\.tokenSecretRef: .*--secret hf=FILE.* with t$"),
    ],
)
def test_a_missing_secret_is_named_with_its_remedy(spec: dict[str, Any], secrets: Any, message: str) -> None:
    with pytest.raises(InvalidManifest, match=message):
        check_secrets(job(**spec), secrets)


def test_secrets_that_are_there_are_enough() -> None:
    check_secrets(job(), {})
    check_secrets(job(**S3, **TOKEN), {"s3": {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "hf": {"t": ""}})


def test_a_job_may_use_the_gpus_that_are_there_and_no_more() -> None:
    two = (Gpu(0, 4), Gpu(1, 3))
    wants_four = job(resources={"gpus": 4})
    check_gpus(job(resources={"gpus": 2}), two)
    check_gpus(wants_four, ())
    with pytest.raises(PlanningError, match=r"spec\.resources\.gpus: 4 is more than the 2 GPU"):
        check_gpus(wants_four, two)
    assert device_memory(wants_four, two) == 3
    assert device_memory(wants_four, ()) * 4 <= device_memory(job(resources={"gpus": 0}), ())


def test_only_the_run_policy_may_change() -> None:
    old = job(lora={"rank": 8}).to_manifest()
    check_changes(FOLDER, old, job(lora={"rank": 8}, runPolicy={"retries": 9, "suspend": True}))
    with pytest.raises(FinetuneError) as refused:
        check_changes(FOLDER, old, job(lora={"rank": 16, "alpha": 4}, resources={"gpus": 2}))
    message = str(refused.value)
    assert "  spec.lora.rank: 16 now, 8 there\n" in message
    assert "  spec.lora.alpha: 4 now, nothing there\n" in message
    assert "  spec.resources.gpus: 2 now, 1 there\n" in message
    assert "--fresh" in message and "-o" in message
    assert message.count(" there\n") == 3


def test_it_is_always_trained_and_an_earlier_versions_folder_goes_on() -> None:
    spec = without_reuse(job().spec)
    assert spec.output.reuse is False and spec.output.uri == job().spec.output.uri
    check_changes(FOLDER, job().to_manifest(), job(output={"uri": "s3://models/toy", "reuse": False}))


def test_a_folder_of_another_job_is_refused() -> None:
    with pytest.raises(FinetuneError, match="run of another job, 'toy'"):
        check_changes(FOLDER, job().to_manifest(), job(name="other"))


def test_a_secret_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "s3.env"
    file.write_text("# mine\n\nexport A=1\nB = 'x=y' \nC=\n")
    assert read_secret(f"s3={file}") == ("s3", {"A": "1", "B": "x=y", "C": ""})


@pytest.mark.parametrize(
    ("argument", "content", "message"),
    [
        ("s3", None, "write NAME=FILE"),
        ("=x", None, "write NAME=FILE"),
        ("s3=FILE", None, "cannot read"),
        ("s3=FILE", b"A=1\nhidden-value\n", r"line 2: write KEY=VALUE$"),
        ("s3=FILE", b"\xff\xfe", "cannot read"),
    ],
)
def test_a_broken_secret_is_explained_without_its_values(
    tmp_path: Path, argument: str, content: bytes | None, message: str
) -> None:
    file = tmp_path / "s3.env"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FinetuneError, match=message) as refused:
        read_secret(argument.replace("FILE", str(file)))
    assert "hidden-value" not in str(refused.value)
