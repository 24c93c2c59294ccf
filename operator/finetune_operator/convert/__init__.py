"""From a LLaMA-Factory training configuration to a FineTuneJob, with a note on every option. Pure: no I/O.

What only a person can decide (a bucket, a method that does not exist here) is left in the manifest in LLaMA-Factory's
own word, under a comment. The API refuses that word, so that nothing else than was meant is trained by accident.
"""

from finetune_operator.convert.llamafactory import Conversion, convert
from finetune_operator.convert.notes import Note, Outcome

__all__ = ["Conversion", "Note", "Outcome", "convert"]
