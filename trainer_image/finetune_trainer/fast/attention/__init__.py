"""Causal attention over samples that lie one after the other in one row, without a mask.

A mask over packed rows grows with the square of their length, and keeps the fast kernels away: with it, torch computes
all pairs of tokens and throws away those of different samples. What is here is told where each sample begins instead.
`samples` is what transformers calls, `kernels` what there is to call in turn, `reference` what each is held against.
"""

from finetune_trainer.fast.attention.choice import ROUNDING, Wanted, best_kernel
from finetune_trainer.fast.attention.kernel import Kernel, Unsupported
from finetune_trainer.fast.attention.samples import installed

__all__ = ["ROUNDING", "Kernel", "Unsupported", "Wanted", "best_kernel", "installed"]
