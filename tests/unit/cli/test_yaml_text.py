"""What is written is read as it was meant, by YAML 1.1 and by what kubectl reads."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_operator.api.documents import read_documents
from finetune_operator.yaml_text import dump, dump_all

NUMBER = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
"""YAML 1.2's, which kubectl goes by."""


@pytest.mark.parametrize(
    "text", ["1e5", "12e4", "1e+308", "007", "-5", "+.5", "1_000", "0x1f", "4:20", "no", "null", *"yYnN"]
)
def test_text_that_looks_like_something_else_is_quoted(text: str) -> None:
    assert dump({"revision": text}) == f"revision: '{text}'\n"
    assert dump({text: "revision"}) == f"'{text}': revision\n"


@pytest.mark.parametrize("value", [1e-05, 3, True, None, 0.5])
def test_numbers_are_no_text(value: object) -> None:
    assert yaml.safe_load(dump({"value": value})) == {"value": value}
    assert "'" not in dump({"value": value})


@given(st.text())
@example("\x85")
@example("y")
@example("a\u2028b\n\u2029")
def test_any_text_comes_back(text: str) -> None:
    written = dump({"text": text})
    assert yaml.safe_load(written) == {"text": text}
    plain = written.removeprefix("text: ").strip()
    assert not NUMBER.match(plain), json.dumps(text)
    (read,) = read_documents(written)
    assert read.data == {"text": text}, "and by our own reading, which is kubectl's"


def test_several_documents_are_apart() -> None:
    assert list(yaml.safe_load_all(dump_all([{"a": "1e5"}, {"b": "2"}]))) == [{"a": "1e5"}, {"b": "2"}]
