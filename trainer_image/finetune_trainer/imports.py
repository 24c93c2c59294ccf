"""Optional packages that libraries import wherever they find them, though a run does not need them.

transformers and PEFT ask whether a package is there, and then import it: bitsandbytes, which brings torch's compiler
with it, for quantized bases; scipy for the losses of object detection; datasets, and pandas with it, for data that this
trainer reads itself. Together they were 7 of the 23 s of processor time of an import.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.strategies import TORCH_OPTIMIZERS
from finetune_trainer.contract.vocabulary import QuantizationType


def not_needed(config: TrainerConfig) -> frozenset[str]:
    """Packages that a run can do without."""
    spared = {"datasets", "scipy"}
    quantized = config.quantization is not None and config.quantization.type is not QuantizationType.FP8
    if not quantized and config.training.optimizer in TORCH_OPTIMIZERS:
        spared.add("bitsandbytes")
    return frozenset(spared)


def _remember() -> None:
    """Have the libraries ask now for what they would otherwise look for later."""
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available
    from transformers.utils.import_utils import is_bitsandbytes_available

    for ask in (is_bnb_available, is_bnb_4bit_available, is_bitsandbytes_available):
        ask()


@contextmanager
def without(names: Iterable[str]) -> Iterator[None]:
    """Whoever asks for these packages inside finds them missing, unless they are imported already.

    transformers and PEFT are made to ask, and keep the answer: only for a process that is this one run. Afterwards the
    packages can be imported like any other.
    """
    hidden = [name for name in names if name not in sys.modules]
    # `importlib.util.find_spec` answers None for such an entry, and an import of it fails.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
        _remember()
    finally:
        for name in hidden:
            del sys.modules[name]
