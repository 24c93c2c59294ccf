"""The data set: from files to tokenized samples, packed rows and batches.

`prepare` is the way in. Files become rows (`sources`, `readers`), rows become conversations or text (`formats`), which
are cleaned (`cleaning`), rendered by the model's own chat template (`template`) and tokenized once (`tokenization`,
`samples`, `cache`). `packing` says which samples share a row, `collate` makes tensors of them.
"""

from finetune_trainer.data.chosen_template import use_template
from finetune_trainer.data.collate import Collator, RowDataset
from finetune_trainer.data.packing import pack, padding_share
from finetune_trainer.data.pipeline import PreparedData, prepare
from finetune_trainer.data.prompts import Prompt
from finetune_trainer.data.purpose import Purpose
from finetune_trainer.data.recognition import check_first_rows
from finetune_trainer.data.samples import IGNORED_LABEL, Samples

__all__ = [
    "IGNORED_LABEL",
    "Collator",
    "PreparedData",
    "Prompt",
    "Purpose",
    "RowDataset",
    "Samples",
    "check_first_rows",
    "pack",
    "padding_share",
    "prepare",
    "use_template",
]
