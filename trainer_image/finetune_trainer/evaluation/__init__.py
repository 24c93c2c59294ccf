"""Evaluation on held-out data: `scores` with the given answers, `generation` and `text` with the model's own."""

from finetune_trainer.evaluation.generation import answer, prompts_to_answer
from finetune_trainer.evaluation.judgement import (
    HeldOutScores,
    Judgement,
    check_evaluation,
    check_gates,
    check_prompts,
    missed_gates,
)
from finetune_trainer.evaluation.scores import Scores, score
from finetune_trainer.evaluation.text import text_metrics

__all__ = [
    "HeldOutScores",
    "Judgement",
    "Scores",
    "answer",
    "check_evaluation",
    "check_gates",
    "check_prompts",
    "missed_gates",
    "prompts_to_answer",
    "score",
    "text_metrics",
]
