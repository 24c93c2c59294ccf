"""From text to jobs: kubectl's reading of YAML, bounds on hostile text, lines and words of errors."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import IO

import pytest
import yaml

from finetune_operator.api.documents import MAX_BYTES, read_documents
from finetune_operator.api.parse import load_manifests, parse_manifest
from finetune_operator.api.problems import path_text, shown
from finetune_operator.errors import FinetuneError, InvalidManifest
from tests.unit.api.manifests import MINIMAL, manifest, merged

TEXT = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: medical-qa}
spec:
  model: {uri: hf://org/model}
  dataset: {uri: s3://data/train.jsonl}
  output: {uri: s3://models/x}
"""
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


def refusal(text: str | bytes) -> str:
    with pytest.raises(InvalidManifest) as caught:
        load_manifests(text, source="job.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        ("1.5", 1.5),
        (".5", 0.5),
        ("010", 8),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", 1000),
        ("-7", -7),
        ("12:30", "12:30"),
        ("2024-01-31", "2024-01-31"),
        ("on", True),
        ("No", False),
        ("y", True),
        ("Y", True),
        ("n", False),
        ("N", False),
        ("'y'", "y"),
        ("yn", "yn"),
        ("'on'", "on"),
        ("'1e-4'", "1e-4"),
        ("~", None),
        ("", None),
        ("0e9f3b9", "0e9f3b9"),
        ("08", 8.0),
        ("=", "="),
    ],
)
def test_scalars_are_read_as_kubectl_reads_them(scalar: str, value: object) -> None:
    (document,) = read_documents(f"x: {scalar}\n")
    assert document.data == {"x": value}
    assert type(document.data["x"]) is type(value)


def test_json_with_tabs_is_read() -> None:
    jobs = load_manifests(json.dumps(MINIMAL, indent="\t"))
    assert [job.name for job in jobs] == ["medical-qa"]


def test_documents_are_read_in_order_and_empty_ones_left_out() -> None:
    text = "---\n---\n" + TEXT + "---\n# nothing\n---\n" + TEXT.replace("medical-qa", "other") + "...\n"
    assert [job.name for job in load_manifests(text)] == ["medical-qa", "other"]


@pytest.mark.parametrize("kind", ["file", "bytes", "byte-stream", "text-stream"])
def test_text_files_and_streams_give_the_same(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    origins: dict[str, Path | bytes | IO[str] | IO[bytes]] = {
        "file": path,
        "bytes": TEXT.encode(),
        "byte-stream": io.BytesIO(TEXT.encode()),
        "text-stream": io.StringIO(TEXT),
    }
    assert load_manifests(origins[kind])[0].to_manifest() == load_manifests(TEXT)[0].to_manifest()


def test_anchors_and_merge_keys_work_as_in_yaml() -> None:
    text = "base: &b {a: 1, b: 2}\nother: &o {b: 3, c: 4}\nboth: {<<: [*b, *o], a: 9}\none: {<<: *o}\n"
    (document,) = read_documents(text)
    assert document.data["both"] == {"a": 9, "b": 2, "c": 4}
    assert document.data["one"] == {"b": 3, "c": 4}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [\n b", "line 3: did not find expected ',' or ']'"),
        ("a: 1\nb: 2\na: 3\n", "line 3: 'a' stands here a second time (first in line 1); keep one of them"),
        ('{"a": 1,\n "a": 2}', "line 2: 'a' stands here a second time (first in line 1)"),
        (BOMB, "line 5: more than 50000 fields and values, aliases written out"),
        ("- a\n" * 60_000, "more than 50000 fields and values"),
        ("x: &a [1, *a]", "line 1: alias *a has no anchor that is complete before it"),
        ("x: *nowhere", "line 1: alias *nowhere has no anchor"),
        ("[" * 100_000, "nested more than 64 levels deep"),
        ("{a: " * 100_000, "nested more than 64 levels deep"),
        ("- " * 100_000, "nested more than 64 levels deep"),
        ("a: !!python/object/apply:os.system [ls]", "is not allowed in a manifest; remove it"),
        ("a: !!binary aGk=", "is not allowed in a manifest"),
        ("a: .nan", "line 1: .nan is not a finite number"),
        ("a: 1e999", "line 1: 1e999 is not a finite number"),
        ("a: 9223372036854775808", "needs more than 64 bits"),
        ("a: 1" + "0" * 5000, "needs more than 64 bits"),
        ("1: a", "line 1: key '1' is not text; put it in quotes"),
        ("y: a", "line 1: key 'y' is not text; put it in quotes"),
        ("on: a", "key 'on' is not text"),
        ("? [a]\n: b", "key (a list or map) is not text"),
        ("<<: 1", "'<<' merges maps only"),
        ("\0", "this is neither YAML nor JSON"),
        ("a: b\xff".encode("latin-1"), "not UTF-8 text"),
        ("a: \ud800", "not UTF-8 text"),
        ("#" * (MAX_BYTES + 1), "larger than 1 MiB"),
        ("", "nothing in it; write at least one FineTuneJob"),
        ("---\n---\n", "nothing in it"),
        ("just text", "'just text' is not an object"),
        ("- 1", "[1] is not an object"),
        ("kind: ConfigMap", "kind: 'ConfigMap' is not for this command; use kind: FineTuneJob"),
        ("kind: FineTuneJob", "apiVersion: missing; use finetune.dev/v1alpha1"),
        ("kind: FineTuneJob\napiVersion: finetune.dev/v2", "apiVersion: 'finetune.dev/v2' is unknown"),
    ],
    ids=lambda value: None if isinstance(value, bytes) or len(value) > 70 else value,
)
def test_hostile_or_broken_text_is_refused_at_once(text: str | bytes, words: str) -> None:
    began = time.monotonic()
    message = refusal(text)
    assert message.startswith("job.yaml: ")
    assert words in message
    assert time.monotonic() - began < 5


def test_size_is_counted_in_bytes_and_a_file_is_not_read_further(tmp_path: Path) -> None:
    assert "larger than 1 MiB" in refusal("#" + "é" * (MAX_BYTES // 2))
    endless = Path("/dev/zero")
    with pytest.raises(InvalidManifest, match="larger than 1 MiB"):
        load_manifests(endless)


def test_aliases_count_with_what_they_stand_for_in_each_document_alone() -> None:
    document = "a: &a [" + "x, " * 20_000 + "x]\nb: *a\n"
    assert len(read_documents(document + "---\n" + document)) == 2
    assert "aliases written out" in refusal(document + "c: *a\n")


def test_problems_name_field_value_remedy_and_line() -> None:
    text = TEXT + "  training:\n    seed: 1\n    batchSize: 0\n  layrs: {}\n"
    with pytest.raises(InvalidManifest) as caught:
        load_manifests(text, source="job.yaml")
    assert caught.value.problems == [
        "spec.training.batchSize: 0 is too small; use at least 1 (line 10)",
        "spec.layrs: unknown field; did you mean layers? (line 11)",
    ]
    assert str(caught.value).startswith("job.yaml: spec.training.batchSize")


def test_a_rule_between_fields_has_the_line_of_the_field_to_blame() -> None:
    problem = refusal(TEXT + "  method: full\n  lora: {rank: 4}\n")
    assert problem == (
        "job.yaml: spec.lora: lora is for method lora and qlora; remove it, or change method full (line 9)"
    )


def test_problems_of_all_documents_are_told_with_their_document() -> None:
    message = refusal(TEXT + "  lora: {rank: 0}\n---\nkind: Pod\n")
    assert "document 1 (line 1): spec.lora.rank: 0 is too small" in message
    assert "document 2 (line 10): kind: 'Pod'" in message


def test_the_same_name_twice_is_refused_but_not_in_two_namespaces() -> None:
    assert "'medical-qa' stands here a second time (line 9, first in line 1)" in refusal(TEXT + "---\n" + TEXT)
    other = TEXT.replace("{name: medical-qa}", "{name: medical-qa, namespace: b}")
    assert len(load_manifests(TEXT + "---\n" + other)) == 2


def test_an_unreadable_file_says_why(tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match=r"none\.yaml: cannot be read: No such file"):
        load_manifests(tmp_path / "none.yaml")
    with pytest.raises(FinetuneError, match="Is a directory"):
        load_manifests(tmp_path)


def test_what_a_cluster_adds_to_metadata_is_kept() -> None:
    data = merged(MINIMAL, {"metadata": {"uid": "u", "generation": 3, "managedFields": [{"a": 1}], "finalizers": []}})
    job = parse_manifest(data)
    assert job.metadata.generation == 3
    assert job.to_manifest()["metadata"]["managedFields"] == [{"a": 1}]


def test_a_job_read_and_written_and_read_is_the_same() -> None:
    job = parse_manifest(manifest(method="qlora", lora={"rank": 4}, trainer={"podTemplate": {"spec": {"x": None}}}))
    again = load_manifests(yaml.safe_dump(job.to_manifest()))[0]
    assert again == job
    assert job.spec.trainer.pod_template == {"spec": {"x": None}}, "a null in somebody else's object has a meaning"


def test_data_that_is_not_json_is_refused() -> None:
    with pytest.raises(InvalidManifest, match="this is not plain JSON data"):
        parse_manifest(merged(MINIMAL, {"spec": {"training": {"seed": {1, 2}}}}))
    with pytest.raises(InvalidManifest, match="this is not plain JSON data"):
        parse_manifest(merged(MINIMAL, {"spec": {"training": {"epochs": float("nan")}}}))


def test_values_are_shortened_and_paths_are_written_as_in_kubernetes() -> None:
    assert shown("x" * 500) == "'" + "x" * 55 + " ..."
    assert shown({"a": [1, None]}) == '{"a": [1, null]}'
    assert path_text(("spec", "dataset", "sources", 0, "uri")) == "spec.dataset.sources[0].uri"
    assert max(map(len, refusal(TEXT + f"  method: {'x' * 5000}\n").splitlines())) < 300
