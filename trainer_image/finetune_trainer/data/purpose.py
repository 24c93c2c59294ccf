"""What rows are read for, and so which formats they may have: answers to learn, judged answers, or labelled texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.config import DatasetConfig, HeadConfig
from finetune_trainer.contract.vocabulary import DatasetFormat, Objective
from finetune_trainer.data.conversation import Sample
from finetune_trainer.data.formats import most_frequent, parse, recognise
from finetune_trainer.data.labeled import Labeled, parse_labeled, recognise_labeled
from finetune_trainer.data.preference import Judged, Pair, parse_judged, parse_pair, recognise_judged
from finetune_trainer.errors import UsageError

AnySample = Sample | Pair | Judged | Labeled


@dataclass(frozen=True, slots=True)
class Purpose:
    """The use that a job has for its data."""

    objective: Objective = Objective.SFT
    head: HeadConfig | None = None
    """Set for method `head`."""

    @classmethod
    def of(cls, config: TrainerConfig) -> Purpose:
        """What a job's data are for."""
        return cls(config.training.objective, config.head)

    @property
    def formats(self) -> tuple[DatasetFormat, ...]:
        """The formats that serve it."""
        if self.head is not None:
            return (DatasetFormat.LABELED,)
        if self.objective is Objective.KTO:
            return (DatasetFormat.UNPAIRED, DatasetFormat.PREFERENCE)
        if self.objective.is_preference:
            return (DatasetFormat.PREFERENCE,)
        return (
            DatasetFormat.MESSAGES,
            DatasetFormat.SHAREGPT,
            DatasetFormat.ALPACA,
            DatasetFormat.PROMPT_COMPLETION,
            DatasetFormat.TEXT,
        )

    @property
    def _what(self) -> str:
        return "method head" if self.head is not None else f"spec.training.objective {self.objective}"

    def recognise(self, row: Mapping[str, Any]) -> tuple[DatasetFormat, str] | None:
        """The format of one row and what gave it away; None where it is none that is known."""
        labelled = recognise_labeled(row) if self.head is not None else None
        return labelled or recognise_judged(row) or recognise(row)

    def recognise_most(self, rows: Iterable[Mapping[str, Any]]) -> tuple[DatasetFormat, str] | None:
        """The format that most of these rows have, and why it was taken; the earlier one of two that are as
        frequent."""
        return most_frequent([self.recognise(row) for row in rows])

    def check_format(self, format_: DatasetFormat, uri: str, reason: str) -> None:
        """Raises UsageError for a format that does not serve this purpose."""
        if format_ in self.formats:
            return
        why = f" ({reason})" if reason else ""
        remedy = {
            DatasetFormat.PREFERENCE: "set spec.training.objective to dpo, kto, orpo or simpo, or give the chosen "
            "answers as 'messages'",
            DatasetFormat.UNPAIRED: "set spec.training.objective to kto, or give the liked answers as 'messages'",
            DatasetFormat.LABELED: "use method head",
        }.get(format_)
        if self.objective is not Objective.SFT or self.head is not None:
            wanted = "rows of a text and its label" if self.head is not None else "judged answers"
            remedy = f"give {wanted}, or change it"
        raise UsageError(
            f"spec.dataset: {uri} has the format '{format_}'{why}, and {self._what} needs "
            f"{' or '.join(repr(str(one)) for one in self.formats)}; {remedy}"
        )

    def check_settings(self, dataset: DatasetConfig) -> None:
        """Refuse settings that mean nothing to this purpose. Raises UsageError."""
        if not self.objective.is_preference and self.head is None:
            return
        if dataset.packing:
            raise UsageError(
                f"spec.dataset.packing: {self._what} looks at each sample as a whole, and packed rows hold several; "
                "set it to false"
            )
        if dataset.train_on_prompt:
            raise UsageError(f"spec.dataset.trainOnPrompt: {self._what} learns nothing from prompts; set it to false")

    def parse(self, format_: DatasetFormat, row: Mapping[str, Any]) -> AnySample:
        """One row in one of `formats`. Raises RowError, which says what the row lacks."""
        if format_ is DatasetFormat.PREFERENCE:
            return parse_pair(row)
        if format_ is DatasetFormat.UNPAIRED:
            return parse_judged(row)
        if self.head is not None:
            return parse_labeled(row, self.head)
        return parse(format_, row)
