"""Parquet: the same rows as other files, nothing run that comes with it, and nothing unpacked beyond the bounds."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from finetune_trainer.data.readers import read_rows
from finetune_trainer.errors import DataError, UsageError
from tests.unit.data.test_readers import ROWS, values


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 200), path)
    assert values(path) == ROWS * 200
    assert [row.line for row in read_rows(path)] == list(range(1, 601))


TEXTS = pyarrow.array([f"{n} " * 30_000 for n in range(200, 600)])
"""400 of 120 KB: more, together, than a row may have."""
CATEGORIES = TEXTS.dictionary_encode()
OFFSETS = pyarrow.array(range(401), pyarrow.int32())
COLUMNS = {
    "text": TEXTS,
    "views of text": TEXTS.cast(pyarrow.string_view()),
    "categories": CATEGORIES,
    "lists of categories": pyarrow.ListArray.from_arrays(OFFSETS, CATEGORIES),
    "objects of categories": pyarrow.StructArray.from_arrays([CATEGORIES], names=["a"]),
    "maps to categories": pyarrow.MapArray.from_arrays(OFFSETS, pyarrow.array(["k"] * 400), CATEGORIES),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_what_parquet_keeps_apart_from_the_rows_is_not_counted_for_each(tmp_path: Path, kind: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": COLUMNS[kind]}), tmp_path / "a.parquet", compression="zstd")
    assert [value and value["a"] for value in values(tmp_path / "a.parquet")] == COLUMNS[kind].to_pylist()


def test_categories_may_be_empty(tmp_path: Path) -> None:
    table = pyarrow.table({"a": pyarrow.array(["x", None, "y", "x"]).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [value and value["a"] for value in values(tmp_path / "a.parquet")] == ["x", None, "y", "x"]


@pytest.mark.parametrize("nested", [False, True])
def test_a_dictionary_by_another_name_is_refused(tmp_path: Path, nested: bool) -> None:
    column = pyarrow.array(["x", "y"]).dictionary_encode()
    column = pyarrow.ExtensionArray.from_storage(pyarrow.opaque(column.type, "a", "b"), column)
    if nested:
        column = pyarrow.StructArray.from_arrays([column], names=["a"])
    pyarrow.parquet.write_table(pyarrow.table({"label": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column label has the type .*; write the column as plain text"):
        values(tmp_path / "a.parquet")


class Picky(pyarrow.ExtensionType):  # type: ignore[misc]
    """A type that a library has registered, and that does not understand what the file says of it."""

    def __init__(self) -> None:
        super().__init__(pyarrow.string(), "org.example.picky")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"{"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pyarrow.DataType, serialized: bytes) -> Picky:
        json.loads(serialized)
        return cls()


def test_a_registered_type_that_fails_is_explained(tmp_path: Path) -> None:
    column = pyarrow.ExtensionArray.from_storage(Picky(), pyarrow.array(["one"]))
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [{"text": "one"}]
    pyarrow.register_extension_type(Picky())
    try:
        with pytest.raises(DataError, match="not a readable Parquet file"):
            values(tmp_path / "a.parquet")
    finally:
        pyarrow.unregister_extension_type("org.example.picky")


class Payload:
    """What a pickle would run."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("extension", ["arrow.py_extension_type", "org.example.unknown"])
def test_nothing_that_comes_with_a_parquet_column_is_run(tmp_path: Path, extension: str) -> None:
    field = pyarrow.field(
        "text",
        pyarrow.string(),
        metadata={
            "ARROW:extension:name": extension,
            "ARROW:extension:metadata": pickle.dumps(Payload(str(tmp_path / "ran"))),
        },
    )
    table = pyarrow.Table.from_arrays([pyarrow.array(["one", "two"])], schema=pyarrow.schema([field]))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [{"text": "one"}, {"text": "two"}]
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_without_pyarrow_the_error_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.parquet", "a.jsonl.zst"):
        with pytest.raises(UsageError, match=r"finetune-operator\[trainer\]"):
            list(read_rows(tmp_path / name))
