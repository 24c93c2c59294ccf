"""The operator and the `finetune` command: everything between a FineTuneJob and the pods of its PyTorchJob."""

__version__ = "0.1.0"
