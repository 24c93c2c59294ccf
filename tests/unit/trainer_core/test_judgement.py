"""Gates, and the answers that metrics are taken over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.contract.config import EvaluationConfig
from finetune_trainer.data import Prompt
from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation import Judgement, Scores, answer, check_gates, prompts_to_answer
from finetune_trainer.model import read_tokenizer
from tests.trainer_jobs import QUESTIONS, fit, trainer_config, write_dataset
from tests.unit.trainer_core.conftest import ModelFolder

CPU = torch.device("cpu")
PROMPTS = [
    Prompt([{"role": "user", "content": question * n}], given) for n, (question, given) in enumerate(QUESTIONS[:5], 1)
]


@pytest.mark.parametrize(
    ("gate", "missed"),
    [
        ({"metric": "perplexity", "max": 5.0}, None),
        ({"metric": "perplexity", "max": 4.0}, "perplexity is 4.482, above 4"),
        ({"metric": "accuracy", "min": 0.25}, None),
        ({"metric": "accuracy", "min": 0.3}, "accuracy is 0.25, below 0.3"),
        ({"metric": "bleu", "min": 30}, None),
        ({"metric": "bleu", "min": 30.5}, "bleu is 30, below 30.5"),
        ({"metric": "rouge", "min": 0.4}, None),
        ({"metric": "rouge", "min": 0.5}, "rouge is 0.4, below 0.5"),
        ({"metric": "exactMatch", "min": 0.1}, "exactMatch could not be computed"),
    ],
)
def test_gates(gate: dict[str, Any], missed: str | None) -> None:
    evaluation = EvaluationConfig.model_validate({"metrics": [], "compare_with_base": False, "gates": [gate]})
    judgement = Judgement(Scores(loss=1.5, correct=5, tokens=20), (), {"bleu": 30.0, "rouge1": 0.9, "rougeL": 0.4})
    if missed is None:
        check_gates(evaluation, judgement)
    else:
        with pytest.raises(UsageError, match=missed):
            check_gates(evaluation, judgement)
    with pytest.raises(UsageError, match="nothing to score"):
        check_gates(evaluation, Judgement(None))


def test_every_missed_gate_is_named() -> None:
    gates = [{"metric": "perplexity", "max": 1.0}, {"metric": "accuracy", "min": 1.0}]
    evaluation = EvaluationConfig.model_validate({"metrics": [], "compare_with_base": False, "gates": gates})
    with pytest.raises(UsageError, match=r"perplexity is .*; accuracy is "):
        check_gates(evaluation, Judgement(Scores(loss=1.5, correct=5, tokens=20)))


def test_a_hopeless_perplexity_is_infinite() -> None:
    assert Scores(loss=1e4, correct=0, tokens=1).perplexity == float("inf")


@pytest.mark.parametrize(
    ("metrics", "generations", "samples", "count"),
    [
        (["perplexity"], 2, 100, 2),
        (["perplexity"], 0, 100, 0),
        (["bleu"], 2, 4, 4),
        (["exactMatch"], 4, 3, 4),
        (["rouge"], 0, 100, 5),
    ],
)
def test_how_many_prompts_are_answered(
    metrics: list[str], generations: int, samples: int, count: int, model_folder: ModelFolder
) -> None:
    config = trainer_config(
        model_folder(),
        model_folder() / "none.jsonl",
        evaluation={"metrics": metrics, "generations": generations, "generation_samples": samples},
    )
    assert list(prompts_to_answer(PROMPTS, config)) == PROMPTS[:count]


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_answers_come_in_the_order_of_the_prompts_however_many_are_written_at_once(
    size: int, model_folder: ModelFolder
) -> None:
    from transformers import AutoModelForCausalLM

    folder = model_folder()
    config = trainer_config(
        folder,
        folder / "none.jsonl",
        dataset={"max_length": 256},
        evaluation={"max_new_tokens": 6, "generation_batch_size": size},
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), read_tokenizer(folder)
    alone = [answer(model, tokenizer, [prompt], config, CPU)[0] for prompt in PROMPTS]
    assert len(set(alone)) > 1
    assert answer(model, tokenizer, PROMPTS, config, CPU) == alone
    assert answer(model, tokenizer, [], config, CPU) == []


@pytest.mark.parametrize("method", ["prompt", "prefix", "adapter", "lora"])
def test_a_tuned_model_answers_in_a_batch_as_alone(method: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = model_folder()
    config = trainer_config(
        folder,
        write_dataset(tmp_path / "data.jsonl"),
        method=method,
        training={"max_steps": 8, "learning_rate": 0.3},
        evaluation={"max_new_tokens": 16, "generation_batch_size": len(PROMPTS)},
    )
    model, tokenizer = fit(folder, config, tmp_path / "run").tuned.model, read_tokenizer(folder)
    alone = [answer(model, tokenizer, [prompt], config, CPU)[0] for prompt in PROMPTS]
    assert answer(model, tokenizer, PROMPTS, config, CPU) == alone


def test_a_prompt_is_never_cut(model_folder: ModelFolder) -> None:
    from transformers import AutoModelForCausalLM

    folder = model_folder()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), read_tokenizer(folder)

    def answers(max_length: int) -> list[str]:
        dataset, evaluation = {"max_length": max_length}, {"max_new_tokens": 6}
        config = trainer_config(folder, folder / "none.jsonl", dataset=dataset, evaluation=evaluation)
        return answer(model, tokenizer, PROMPTS[3:], config, CPU)

    assert answers(8) == answers(256)
