"""How a model is tuned. Each method takes a loaded model and a selection, and leaves a model in which exactly the
selected tensors, or exactly the adapters on the selected modules, require gradients."""

from finetune_trainer.methods.apply import TunedModel, apply_method, check_method

__all__ = ["TunedModel", "apply_method", "check_method"]
