"""Judged answers of LLaMA-Factory's dataset_info.json: what the manifest says is what the API and the trainer take."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.convert import Outcome
from finetune_trainer.contract.config import DatasetConfig
from finetune_trainer.contract.vocabulary import DatasetFormat
from finetune_trainer.data.columns import Columns
from finetune_trainer.data.preference import parse_judged
from tests.unit.convert.conversions import at, converted, outcome

ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
TURNS = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}]
# As in LLaMA-Factory's data/dataset_info.json and data/kto_en_demo.json.
DEMO = {
    "file_name": "kto_en_demo.json",
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "kto_tag": "label"},
    "tags": ROLES,
}
ENTRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "its example": (DEMO, {"messages": TURNS, "label": True}),
    "its own name": ({**DEMO, "columns": {"messages": "talk", "kto_tag": "kto_tag"}}, {"talk": TURNS, "kto_tag": True}),
    "sharegpt": (
        {"formatting": "sharegpt", "columns": {"kto_tag": "kto_tag"}},
        {
            "conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Three."}],
            "kto_tag": True,
        },
    ),
    "alpaca": (
        {"columns": {"prompt": "question", "response": "answer", "kto_tag": "label"}},
        {"question": "How many?", "answer": "Three.", "label": True},
    ),
}


@pytest.mark.parametrize(("entry", "row"), ENTRIES.values(), ids=list(ENTRIES))
def test_answers_judged_one_by_one_are_unpaired(entry: dict[str, Any], row: dict[str, Any]) -> None:
    info = {"judged": {"cloud_file_name": "s3://data/judged.json", **entry}}
    found = converted(stage="kto", dataset="judged", dataset_info=info)
    assert found.problems == () and at(found, "dataset.format") == "unpaired"
    assert outcome(found, "dataset") is Outcome.CARRIED

    said = at(found, "dataset")
    config = DatasetConfig.model_validate(
        {"sources": [{"uri": said["uri"]}], **{key: said[key] for key in ("format", "columns", "tags") if key in said}}
    )
    assert config.format is DatasetFormat.UNPAIRED
    judged = parse_judged(Columns(config).usual(row))
    assert judged.liked and [one["content"] for one in judged.conversation.messages] == ["How many?", "Three."]


def test_a_judgement_with_another_name_is_told() -> None:
    info = {"judged": {**DEMO, "columns": {"messages": "messages", "kto_tag": "liked"}}}
    found = converted(stage="kto", dataset="judged", dataset_info=info)
    note = next(note.text for note in found.notes if note.option == "dataset")
    assert at(found, "dataset.format") == "unpaired" and "columns.kto_tag" in note


def test_judged_answers_are_not_learnt_as_if_all_were_good() -> None:
    found = converted(stage="sft", dataset="judged", dataset_info={"judged": DEMO})
    assert len(found.problems) == 1 and "unpaired" in found.problems[0]
