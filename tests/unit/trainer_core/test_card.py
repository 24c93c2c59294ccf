"""What a card says of serving: a command only where vLLM loads the artefact as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import EvaluationResult, MergeReport, ResultManifest
from finetune_trainer.contract.manifest import BaseModelRecord, DataReport
from finetune_trainer.results.artefact import artifact_of
from finetune_trainer.results.card import write_card
from finetune_trainer.results.licence import licence_of
from tests.trainer_jobs import trainer_config

LORA = {"rank": 12, "alpha": 8, "dropout": 0.0, "variant": "standard", "bias": "none"}


def card(folder: Path, *, licence: str | None = "apache-2.0", merged: MergeReport | None = None, **changes: Any) -> str:
    config = trainer_config(Path("/model"), Path("/data.jsonl"), **changes)
    result = ResultManifest(
        job="default/tiny",
        uid="uid-1",
        attempt=1,
        created_at="2026-01-01T00:00:00+00:00",
        method=config.method.value,
        artifact=artifact_of(config.method),
        base_model=BaseModelRecord(
            uri="hf://org/base",
            revision="abc123",
            config_sha256="0" * 64,
            architecture="LlamaForCausalLM",
            parameters=1000,
            licence=licence,
        ),
        data=DataReport(sha256="1" * 64, format="messages", rows=8, samples=8),
        config_sha256="2" * 64,
        trainable_parameters=10,
        total_parameters=1000,
        steps=4,
        epochs=1.0,
        train_loss=2.5,
        evaluation=EvaluationResult(
            base={"perplexity": 20.0}, tuned={"perplexity": 5.0, "accuracy": 0.5}, samples=3, tokens=9
        ),
        merged=merged,
        configuration=config.model_dump(by_alias=True, mode="json"),
        versions={"torch": "2.13.0"},
        notes=("a tied tensor was trained",),
        files=(),
    )
    write_card(folder, result, config)
    return (folder / "README.md").read_text()


def test_what_a_card_says(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert "`hf://org/base` at revision `abc123`" in text and "10 parameters were trained (1 %)" in text
    assert "| perplexity | 20 | 5 |" in text and "| accuracy |  | 0.5 |" in text
    assert "- a tied tensor was trained" in text and "licence binds this result, too: apache-2.0" in text
    assert text.startswith("---\nbase_model: org/base\n") and "\nlicense: apache-2.0\n" in text
    assert "vllm serve org/base --enable-lora --max-lora-rank 8 --lora-modules tiny=adapter" in text
    assert "does not say what its licence is" in card(tmp_path, licence=None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora": {**LORA, "variant": "pissa"}}, "--max-lora-rank 32"),
        (
            {"lora": {**LORA, "variant": "dora"}},
            "does not serve DoRA adapters. Make a stand-alone model",
        ),
        ({"lora": {**LORA, "bias": "all"}}, "does not serve adapters with biases"),
        ({"lora": {**LORA, "rank_pattern": {"mlp": 2}}}, "does not serve adapters with another rank or scale"),
        ({"lora": {**LORA, "variant": "eva"}}, "does not serve adapters with another rank or scale"),
        ({"layers": {"also": ["norm"]}}, "does not serve adapters with whole modules beside them"),
        ({"method": "freeze"}, "does not serve results of method freeze. Make a stand-alone model"),
        ({"method": "prefix"}, "With vLLM: it does not serve results of method prefix.\n"),
        ({"method": "full"}, "With vLLM: `vllm serve model`."),
    ],
)
def test_serving(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    assert says in card(tmp_path, **changes)


def test_a_merged_model_is_what_is_served(tmp_path: Path) -> None:
    report = MergeReport(into="base16", largest_logit_difference=0.5, largest_logit=30.0, same_first_choice=0.99)
    text = card(tmp_path, merged=report, lora={**LORA, "variant": "dora"})
    assert "`vllm serve merged`" in text
    assert "difference of a logit" in text and "is 0.5 (the largest logit is 30); 99 % of next tokens" in text


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, None),
        ({"README.md": "---\nlicense: apache-2.0\n---\n# Model"}, "apache-2.0"),
        ({"README.md": "---\nlicense: other\nlicense_name: llama3.1\n---\n"}, "llama3.1"),
        ({"README.md": "---\nlicense: other\n---\n"}, "other"),
        ({"README.md": "# no header\n---\nlicense: mit\n---\n"}, None),
        ({"README.md": "---\nlicense: [unclosed\n---\n"}, None),
        ({"README.md": "---\n- a list\n---\n", "LICENSE.txt": "..."}, "see LICENSE.txt of the base model"),
    ],
)
def test_licences(files: dict[str, str], licence: str | None, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert licence_of(tmp_path) == licence
