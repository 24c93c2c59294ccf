"""What is cached, and when it is made anew."""

from __future__ import annotations

import importlib.metadata
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from finetune_trainer.contract.config import ColumnsConfig, DatasetConfig, TagsConfig
from finetune_trainer.contract.vocabulary import Objective
from finetune_trainer.data import Purpose, cache, pipeline
from finetune_trainer.data.sources import Source
from finetune_trainer.data.tokenization import Encoder
from finetune_trainer.errors import DiskFull, InternalError
from tests.small_files import small_files
from tests.tiny_tokenizer import tiny_tokenizer
from tests.unit.data import templates
from tests.unit.data.builders import chats, config, prepared, texts, write_jsonl


def test_the_second_time_the_cache_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*chats(30), "{"])
    dataset = config(validation={"fraction": 0.2})
    first = prepared(tmp_path, dataset)
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("tokenized again"))
    with caplog.at_level(logging.INFO):
        second = prepared(tmp_path, dataset)
    assert "from the cache" in caplog.text
    assert second.report == first.report
    assert second.generation_prompts == first.generation_prompts
    assert texts(second) == texts(first)
    assert second.validation is not None
    # Packing is no part of what is cached.
    assert prepared(tmp_path, dataset.model_copy(update={"packing": False})).report.samples == first.report.samples


OTHER: dict[str, Any] = {
    "sources.weight": {"sources": [{"uri": "train.jsonl", "weight": 2.0}]},
    "sources.max_samples": {"sources": [{"uri": "train.jsonl", "max_samples": 2}]},
    "format": {"format": "messages"},
    **{f"columns.{name}": {"columns": {name: "x"}} for name in ColumnsConfig.model_fields},
    **{f"tags.{name}": {"tags": {name: "x"}} for name in TagsConfig.model_fields},
    "template": {"template": "chatml"},
    "max_length": {"max_length": 100},
    "overlong": {"overlong": "drop"},
    "train_on_prompt": {"train_on_prompt": True},
    "mask_history": {"mask_history": True},
    "validation.fraction": {"validation": {"fraction": 0.5}},
    "validation.count": {"validation": {"count": 1}},
    "validation.uri": {"validation": {"uri": "train.jsonl"}},
    "cleaning.deduplicate": {"cleaning": {"deduplicate": False}},
    "cleaning.near_duplicates": {"cleaning": {"near_duplicates": 0.8}},
    "cleaning.min_characters": {"cleaning": {"min_characters": 2}},
    "cleaning.drop_empty_turns": {"cleaning": {"drop_empty_turns": False}},
    "cleaning.drop_mojibake": {"cleaning": {"drop_mojibake": False}},
    "cleaning.drop_invalid": {"cleaning": {"drop_invalid": False}},
    "cleaning.max_invalid_share": {"cleaning": {"max_invalid_share": 0.5}},
}
"""Another value of every setting that samples or their report depend on."""
INDEPENDENT = {"sources.uri", "packing"}
"""Where the data come from says nothing of what they are; rows are packed anew each time."""


def fields_of(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Paths of all fields, those of nested models and of models in tuples included."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        inner = [one for one in (field.annotation, *get_args(field.annotation)) if isinstance(one, type)]
        nested = next((one for one in inner if issubclass(one, BaseModel)), None)
        found |= {f"{prefix}{name}"} if nested is None else fields_of(nested, f"{prefix}{name}.")
    return found


def key(dataset: DatasetConfig, **changes: Any) -> str:
    sources = [Source(one.uri, (), weight=one.weight, max_samples=one.max_samples) for one in dataset.sources]
    arguments = {"sha256": "0", "tokenizer": tiny_tokenizer(), "seed": 0, "purpose": Purpose(), **changes}
    return cache.cache_key(dataset, sources, **arguments)


def test_every_field_is_known_to_matter_or_not() -> None:
    assert fields_of(DatasetConfig) == OTHER.keys() | INDEPENDENT


@pytest.mark.parametrize("field", sorted(OTHER))
def test_another_value_of_a_setting_makes_another_key(field: str) -> None:
    assert key(config(**OTHER[field])) != key(config())


def test_what_does_not_matter_makes_the_same_key() -> None:
    assert key(config(packing=False)) == key(config())


KEYS: dict[str, dict[str, Any]] = {
    "data": {"sha256": "1"},
    "seed": {"seed": 1},
    "template": {"tokenizer": tiny_tokenizer(templates.CHATML_WITH_DEFAULT_SYSTEM)},
    "vocabulary": {"tokenizer": tiny_tokenizer(special=("<extra>",))},
    "end of sequence": {"tokenizer": tiny_tokenizer(eos="<eos>")},
    "what the tokenizer adds": {"tokenizer": tiny_tokenizer(adds_bos=True)},
    "objective": {"purpose": Purpose(Objective.DPO)},
}


@pytest.mark.parametrize("case", KEYS)
def test_whatever_else_the_samples_depend_on_makes_another_key(case: str) -> None:
    assert key(config(), **KEYS[case]) != key(config())


@pytest.mark.parametrize("package", ["tokenizers", "transformers", "jinja2", "ftfy", "datasketch", "pyarrow"])
def test_another_version_of_a_library_makes_another_key(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(config())
    monkeypatch.setattr(cache, "version", lambda name: "0" if name == package else importlib.metadata.version(name))
    assert key(config()) != before


def test_changed_data_are_read_anew(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(3))
    prepared(tmp_path, config())
    write_jsonl(tmp_path / "train.jsonl", chats(3, start=1))
    assert "What is 3 " in texts(prepared(tmp_path, config()))[-1]
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    "damage", ["tokens.i32", "trained.u8", "offsets.npy", "train.npy", "summary.json", "sha256.json"]
)
@pytest.mark.parametrize("how", ["cut", "gone", "flipped"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, damage: str, how: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(5))
    expected = texts(prepared(tmp_path, config()))
    (entry,) = (tmp_path / "cache").iterdir()
    broken = entry / damage
    if how == "gone":
        broken.unlink()
    elif how == "flipped":
        content = bytearray(broken.read_bytes())
        content[len(content) // 2] ^= 1
        broken.write_bytes(content)
    else:
        broken.write_bytes(broken.read_bytes()[:-3])
    assert texts(prepared(tmp_path, config())) == expected
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [entry.name]


def test_a_crash_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(5))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(tmp_path, config())
    assert list((tmp_path / "cache").iterdir()) == []


FULL = {"tokens": ([{"text": "many words " * 300}], 2048), "offsets": ([{"text": str(n)} for n in range(300)], 2048)}


@pytest.mark.parametrize("case", FULL)
def test_a_disk_that_is_full(tmp_path: Path, case: str) -> None:
    rows, size = FULL[case]
    write_jsonl(tmp_path / "train.jsonl", rows)
    with small_files(size), pytest.raises(DiskFull, match="give the volume more space"):
        prepared(tmp_path, config(max_length=4096))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(5))
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(InternalError, match="cannot be written to"):
        prepared(tmp_path, config())


def test_two_processes_may_finish_the_same_entry(tmp_path: Path) -> None:
    with cache.building(tmp_path, "key") as first, cache.building(tmp_path, "key") as second:
        (first / "a").write_text("first")
        (second / "a").write_text("second")
    assert (tmp_path / "key" / "a").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_several_that_prepare_the_same_data_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(20))
    everyone, build = threading.Barrier(4), pipeline._build

    def build_together(*arguments: Any) -> None:
        build(*arguments)
        everyone.wait()

    monkeypatch.setattr(pipeline, "_build", build_together)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: texts(prepared(tmp_path, config())), range(4)))
    assert results == [results[0]] * 4
    assert len(list((tmp_path / "cache").iterdir())) == 1
