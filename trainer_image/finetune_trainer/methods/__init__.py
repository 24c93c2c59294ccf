"""How a model is tuned. Each method takes a loaded model and a selection, and leaves a model in which exactly the
selected tensors, or exactly the adapters on the selected modules, require gradients."""

from finetune_trainer.methods.apply import Start, TunedModel, apply_method, check_adapters, check_method

__all__ = ["Start", "TunedModel", "apply_method", "check_adapters", "check_method"]
