"""Predicting a class or a number of a text: `module` the head, `loading` a result as its users load it, `trainer` the
training, `scores` the evaluation, `task` all of it for one job."""

from finetune_trainer.heads.loading import load_classifier

__all__ = ["load_classifier"]
