"""What stands behind a JSON array in a file: further arrays are read, anything else is refused, nothing is dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.data import json_array
from finetune_trainer.data.readers import read_rows
from finetune_trainer.errors import DataError

ROWS = [{"text": "a ] }"}, {"text": "b"}, {"text": "c"}, {"text": "d"}]
ONE, TWO = json.dumps(ROWS[:2]), json.dumps(ROWS[2:], indent=1)


@pytest.fixture(params=[json_array._CHUNK, 7, 1])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found does not depend on how the file is read."""
    monkeypatch.setattr(json_array, "_CHUNK", request.param)


def read(tmp_path: Path, content: str, name: str = "a.json") -> list[tuple[int, Any]]:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return [(row.line, row.value) for row in read_rows(path)]


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("between", ["", "\n", " \r\n\n\t"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_arrays_that_were_joined_are_all_read(tmp_path: Path, between: str, name: str) -> None:
    found = read(tmp_path, f"[]{ONE}{between}{TWO}\n[]\n", name)
    after = 1 + between.count("\n")
    assert found == list(zip([1, 1, after + 1, after + 4], ROWS, strict=True))


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(
    ("more", "line"),
    [("{}", 1), (', {"text": "c"}]', 1), ("\n\n] ", 3), ('\n"more"', 2), ("\n7", 2), ("\n[]\n}", 3), ("\x1a", 1)],
)
def test_anything_else_behind_an_array_is_refused(tmp_path: Path, more: str, line: int) -> None:
    with pytest.raises(DataError, match=rf"^a\.json:{line}: .* behind the end of the JSON array; "):
        read(tmp_path, ONE + more)


WRAPPED = '{"version": 1, "data": ' + ONE + "\n"


@pytest.mark.parametrize("tail", ["}", "}\n \n", ', "more": {"data": [1, "]}"], "x": {}}, "y": [[]]}'])
def test_the_rest_of_the_object_around_an_array_holds_no_rows(tmp_path: Path, tail: str) -> None:
    assert [value for _, value in read(tmp_path, WRAPPED + tail)] == ROWS[:2]


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(("tail", "line"), [("}\n}", 3), ("}\n" + ONE, 3), ("}\n\n7", 4), ("} , ", 2)])
def test_anything_behind_the_object_around_an_array_is_refused(tmp_path: Path, tail: str, line: int) -> None:
    with pytest.raises(DataError, match=rf"^a\.json:{line}: .* behind the end of the JSON object; "):
        read(tmp_path, '{"data":' + ONE + "\n" + tail)


def test_lines_that_each_hold_an_array_under_data_are_not_taken_for_one_object(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"data": [row], "id": n}) + "\n" for n, row in enumerate(ROWS))
    with pytest.raises(DataError, match=r"^a\.json:2: .* call it \.jsonl"):
        read(tmp_path, lines)
    assert len(read(tmp_path, lines, "a.jsonl")) == len(ROWS)


@pytest.mark.parametrize("content", [f"{ONE}\n[", WRAPPED, WRAPPED + ', "more": {'])
def test_a_file_that_is_cut_off_behind_its_first_array(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="never closed"):
        read(tmp_path, content)
