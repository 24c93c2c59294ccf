"""Judging the base and the tuned model of a run in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.data import PreparedData
from finetune_trainer.evaluation import HeldOutScores, Judgement, answer, prompts_to_answer, text_metrics
from finetune_trainer.tasks import Task, task_of


class Judge:
    """Scores and answers of both states of a model. All processes take part."""

    def __init__(
        self,
        config: TrainerConfig,
        tokenizer: PreTrainedTokenizerBase,
        data: PreparedData,
        task: Task,
        device: torch.device,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._data = data
        self._task = task
        self._device = device
        self._prompts = prompts_to_answer(data.generation_prompts, config)
        self.before: Judgement | None = None
        """Of the base; None where the job does not compare."""

    def rehearse(self, model: torch.nn.Module, world_size: int) -> None:
        """Judge a handful of samples, and forget it: what would fail after hours of training fails before them."""
        evaluation = self._config.evaluation
        little = {
            "max_samples": self._config.training.micro_batch_size * world_size,
            "generations": min(evaluation.generations, 1),
            "generation_samples": 1,
            "max_new_tokens": 1,
        }
        config = self._config.model_copy(update={"evaluation": evaluation.model_copy(update=little)})
        data = replace(self._data, train=self._data.train[:1])
        task = task_of(config, data, self._tokenizer, self._device, lambda: None)
        task.begin(model)
        Judge(config, self._tokenizer, data, task, self._device)._judge(model, task.score_base)

    def base(self, model: torch.nn.Module) -> None:
        """Judge the untouched model, where the job compares with it."""
        if self._config.evaluation.compare_with_base:
            self.before = self._judge(model, self._task.score_base)

    def tuned(self, model: torch.nn.Module) -> Judgement:
        """Judge the trained model."""
        return self._judge(model, self._task.score)

    def _judge(self, model: torch.nn.Module, score: Callable[[torch.nn.Module], HeldOutScores | None]) -> Judgement:
        scores = score(model)
        answers = answer(model, self._tokenizer, self._prompts, self._config, self._device)
        given = [prompt.reference for prompt in self._prompts]
        text = text_metrics(self._config.evaluation.metrics, answers, given) if answers else {}
        return Judgement(scores, tuple(answers), text, self._task.held_out if scores is not None else 0)
