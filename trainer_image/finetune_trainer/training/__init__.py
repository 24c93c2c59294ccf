"""The training itself: `steps` and `checkpoints` serve every objective, `supervised` trains on given answers."""

from finetune_trainer.training.arguments import training_arguments
from finetune_trainer.training.supervised import FinetuneTrainer

__all__ = ["FinetuneTrainer", "training_arguments"]
