"""What is found in the data, and what is done with it, stands in the result."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from transformers import AutoTokenizer

from finetune_trainer import train
from finetune_trainer.context import RunContext
from finetune_trainer.contract import ResultManifest
from finetune_trainer.preemption import StopRequest
from finetune_trainer.progress import ProgressReporter
from finetune_trainer.storage import ObjectStore, S3Uri
from finetune_trainer.workspace import Workspace
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.trainer_jobs import QUESTIONS, trainer_config

TEMPLATE = "{{ strftime_now('%Y') + '\n' }}" + CHATML


def test_a_base_model_with_a_template_of_the_jobs_own(store: ObjectStore, folder_uri: S3Uri, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer(None).save_pretrained(tmp_path / "model")
    rows = [{"ask": question, "reply": answer} for question, answer in (*QUESTIONS, QUESTIONS[2])]
    lines = [*(json.dumps(row) for row in rows), '{"ask": "What', '{"ask": "Who?", "reply": ""}']
    store.put_bytes(folder_uri.child("data/train.jsonl.gz"), gzip.compress("\n".join(lines).encode()))
    config = trainer_config(
        tmp_path / "model",
        tmp_path,
        dataset={
            "sources": [{"uri": str(folder_uri.child("data"))}],
            "columns": {"prompt": "ask", "response": "reply"},
            "template": TEMPLATE,
            "validation": {"count": 2},
            "cleaning": {"max_invalid_share": 0.5, "near_duplicates": 0.9},
        },
        output={"uri": str(folder_uri)},
        training={"max_steps": 2},
        evaluation={"generations": 1, "max_new_tokens": 4},
    )
    context = RunContext(
        workspace=Workspace.at(tmp_path / "work"),
        store=store,
        progress=ProgressReporter(),
        stop=StopRequest(),
        rank=0,
        local_rank=0,
        world_size=1,
    )
    result = train.run(config, context)

    run_uri = S3Uri.parse(result.uri)
    manifest = ResultManifest.model_validate_json(store.get_bytes(run_uri.child("manifest.json")))
    store.get_tree(run_uri, manifest.files, tmp_path / "got")
    data = manifest.data
    assert (data.rows, data.samples, data.validation_samples, data.format) == (11, 6, 2, "alpaca")
    assert (data.duplicates, data.invalid, data.empty_turns, data.near_duplicates) == (1, 1, 1, 0)
    assert data.examples["duplicates"] == ("train.jsonl.gz:9: equals train.jsonl.gz:3",)
    assert data.examples["emptyTurns"] == ("train.jsonl.gz:11: turn 2 says nothing",)
    assert data.examples["invalid"][0].startswith("train.jsonl.gz:10: not JSON")
    date = "the chat template prints the current date; it was rendered as of 26 July 2024 throughout"
    assert date in manifest.notes
    assert date in (tmp_path / "got" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "got" / "adapter").chat_template == TEMPLATE
