"""Throughput of the trainer on two GPUs beside one, and a model of more. See README.md."""
