"""What the base and the tuned model make of the same held-out data, and whether that is good enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.config import EvaluationConfig
from finetune_trainer.contract.vocabulary import Metric
from finetune_trainer.data import Prompt
from finetune_trainer.errors import UsageError
from finetune_trainer.loss import NextTokenLoss, Targets
from finetune_trainer.methods.lora import quiet_peft
from finetune_trainer.model import autocast

COMPUTED = (Metric.PERPLEXITY, Metric.ACCURACY)


@dataclass(frozen=True)
class Scores:
    """Teacher-forced results over the trained tokens of held-out data."""

    loss: float
    """Mean cross-entropy, in nats per token."""
    correct: int
    """Tokens that were the model's first choice."""
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the model's first choice, 0 to 1."""
        return self.correct / self.tokens

    def metrics(self) -> dict[str, float]:
        """By the names of `Metric`."""
        return {Metric.PERPLEXITY.value: self.perplexity, Metric.ACCURACY.value: self.accuracy}


@dataclass(frozen=True)
class Judgement:
    """What one state of the model makes of the held-out data."""

    scores: Scores | None
    """None without held-out data, or without a token in it to score."""
    answers: tuple[str, ...]
    """To the first held-out prompts, in their order; empty in other processes than that of rank 0."""


def check_evaluation(config: TrainerConfig) -> None:
    """Refuse what evaluation cannot do, before any work is done.

    Raises UsageError that names the field and the remedy.
    """
    evaluation = config.evaluation
    for field, metrics in (
        ("metrics", evaluation.metrics),
        ("gates", tuple(gate.metric for gate in evaluation.gates)),
    ):
        unknown = [metric.value for metric in metrics if metric not in COMPUTED]
        if unknown:
            raise UsageError(
                f"spec.evaluation.{field}: {', '.join(unknown)} cannot be computed by this trainer; it computes"
                f" {', '.join(COMPUTED)}"
            )
    if evaluation.gates and config.dataset.validation is None:
        raise UsageError("spec.evaluation.gates: there is no held-out data to check them on; set dataset.validation")


def score(
    model: nn.Module,
    rows: Dataset[Any],
    collate: Callable[[list[Any]], dict[str, Any]],
    config: TrainerConfig,
    device: torch.device,
) -> Scores | None:
    """Evaluate held-out rows, each rank its share of them; every rank gets the sum. None without a token to score."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = Subset(rows, range(rank, len(rows), world))  # type: ignore[arg-type]
    loader = DataLoader(share, batch_size=config.training.micro_batch_size, collate_fn=collate)
    loss = NextTokenLoss(model)
    total = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    tokens = 0
    model.eval()
    with autocast(config, device):
        for batch in loader:
            targets = Targets.of(batch.pop("labels"), batch.get("position_ids"))
            tokens += targets.tokens.numel()
            inputs = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
            batch_loss, batch_correct = loss.evaluate(
                model, inputs, Targets(targets.positions.to(device), targets.tokens.to(device))
            )
            total += batch_loss
            correct += batch_correct
    sums = torch.tensor([total.item(), correct.item(), tokens], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(sums)
    if sums[2] == 0:
        return None
    return Scores(float(sums[0] / sums[2]), int(sums[1]), int(sums[2]))


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: TrainerConfig,
    device: torch.device,
) -> list[str]:
    """The model's greedy answers to held-out prompts, for people to read. All are written at the same time: on a CPU a
    step of several sequences takes hardly longer than that of one."""
    if not prompts:
        return []
    texts = [
        tokenizer.apply_chat_template(
            prompt.messages, tools=cast("Any", prompt.tools), add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        truncation=True,
        max_length=config.dataset.max_length,
        return_tensors="pt",
        return_token_type_ids=False,
    ).to(device)
    model.eval()
    with quiet_peft(), autocast(config, device):
        produced = model.generate(  # type: ignore[operator]
            **encoded,
            max_new_tokens=config.evaluation.max_new_tokens,
            do_sample=False,
            # A model's own sampling settings mean nothing to greedy decoding.
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    new = produced[:, encoded["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def check_gates(evaluation: EvaluationConfig, tuned: Scores | None) -> None:
    """Let the run fail where the tuned model misses a bound that the job sets.

    Raises UsageError with the reason `GateNotMet`.
    """
    missed = []
    for gate in evaluation.gates:
        if tuned is None:
            missed.append(f"{gate.metric} could not be computed: the held-out data has no token to score")
            continue
        value = tuned.metrics()[gate.metric.value]
        if gate.max is not None and not value <= gate.max:
            missed.append(f"{gate.metric} is {value:.4g}, above {gate.max:g}")
        if gate.min is not None and not value >= gate.min:
            missed.append(f"{gate.metric} is {value:.4g}, below {gate.min:g}")
    if missed:
        raise UsageError(
            f"spec.evaluation.gates: {'; '.join(missed)}. The artefact was written; it is not the latest one",
            reason="GateNotMet",
        )
