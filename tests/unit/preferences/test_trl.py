"""Whole steps held against TRL's trainers: the same model, the same rows, the same loss and the same rewards."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune_trainer.contract.config import PreferenceConfig
from finetune_trainer.contract.vocabulary import Objective
from finetune_trainer.data import Purpose, prepare
from finetune_trainer.preferences.losses import Verdict
from finetune_trainer.preferences.policy import Judge
from finetune_trainer.preferences.rows import AnswerCollator, PairRows
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer
from tests.unit.data.builders import config, fetcher, write_jsonl

# Nothing stands after the token that ends an answer: there our masks and TRL's would differ, see the decision record.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BETA = 0.3


def turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


ROWS = [
    {
        "prompt": turn("user", f"What is step {n}?"),
        "chosen": turn("assistant", f"The plan says {n}." * (n + 1)),
        "rejected": turn("assistant", f"Memory {n}"),
    }
    for n in range(4)
]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL reports each trainer that is made to its maker, unless told not to."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CI", "1")


def ours(
    folder: Path, tokenizer: PreTrainedTokenizerFast, policy: PreTrainedModel, reference: PreTrainedModel
) -> tuple[Verdict, dict[str, torch.Tensor]]:
    """The verdict and the gradients of the mean loss, with the data prepared as in a run."""
    write_jsonl(folder / "train.jsonl", ROWS)
    data = prepare(
        config(packing=False),
        tokenizer,
        fetcher(folder),
        seed=0,
        cache_dir=folder / "cache",
        purpose=Purpose(Objective.DPO),
    )
    items = PairRows(data.train)
    batch = AnswerCollator(0)([items[n] for n in range(4)])
    settings = PreferenceConfig(beta=BETA)
    with torch.no_grad():
        known = Judge(reference, Objective.DPO, settings).log_probs(reference, batch)
    verdict = Judge(policy, Objective.DPO, settings).verdict(policy, batch, known)
    verdict.losses.mean().backward()
    return verdict, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_a_step_of_dpo_is_trls(offline: None, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(TEMPLATE)
    policy, reference = tiny_model(seed=1), tiny_model(seed=2)
    theirs = copy.deepcopy(policy)
    verdict, gradients = ours(tmp_path, tokenizer, policy, reference)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset, disable_progress_bars
        from trl import DPOConfig, DPOTrainer

        disable_progress_bars()
        arguments: dict[str, Any] = {
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
        }
        trainer = DPOTrainer(
            model=theirs,
            ref_model=copy.deepcopy(reference),
            args=DPOConfig(output_dir=str(tmp_path / "trl"), beta=BETA, per_device_train_batch_size=4, **arguments),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
        )
        batch = trainer.data_collator([trainer.train_dataset[n] for n in range(4)])
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    assert verdict.losses.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    metrics = trainer._metrics["train"]
    assert verdict.liked.mean().item() == pytest.approx(metrics["rewards/chosen"][0], rel=1e-4)
    assert verdict.disliked.mean().item() == pytest.approx(metrics["rewards/rejected"][0], rel=1e-4)
    assert verdict.correct.mean().item() == metrics["rewards/accuracies"][0]
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-5), name
