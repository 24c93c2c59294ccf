"""Runs the trainer on real GPUs, strategy by strategy, and compares. See README.md."""
