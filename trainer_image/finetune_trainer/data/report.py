"""Counting what is found in a data set, and refusing it where too much of it is broken."""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune_trainer.contract.config import CleaningConfig
from finetune_trainer.data.rows import Row, RowError
from finetune_trainer.errors import DataError

EXAMPLES = 5
"""Invalid rows that are shown."""


@dataclass
class Tally:
    """What became of the rows of the training data, or of the validation data."""

    cleaning: CleaningConfig
    what: str
    """For messages: `training data` or `validation data`."""
    rows: int = 0
    invalid: int = 0
    examples: list[str] = field(default_factory=list)
    duplicates: int = 0
    short: int = 0
    truncated: int = 0
    dropped_overlong: int = 0

    def add_invalid(self, row: Row, error: RowError) -> None:
        """Count a row that cannot be used. Raises DataError where none is allowed."""
        example = f"{row.where}: {error}"
        if not self.cleaning.drop_invalid:
            raise DataError(
                f"{example}. Repair the row, or set spec.dataset.cleaning.dropInvalid to true to leave out such rows"
            )
        self.invalid += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)

    def check_invalid_share(self) -> None:
        """Raises DataError where more rows are invalid than allowed."""
        allowed = self.cleaning.max_invalid_share
        if self.rows and self.invalid / self.rows > allowed:
            raise DataError(
                f"{self.invalid} of {self.rows} rows ({self.invalid / self.rows:.1%}) of the {self.what} cannot be "
                f"used, more than the {allowed:.1%} of spec.dataset.cleaning.maxInvalidShare. "
                f"The first is {self.examples[0]}. Repair the rows, check spec.dataset.format, or allow a larger share"
            )

    def check_not_empty(self, left: int, uris: list[str], leaked: int = 0) -> None:
        """Raises DataError where there is nothing left, and says where the rows went."""
        if not self.rows:
            raise DataError(f"the {self.what} is empty: {', '.join(uris)} holds no row")
        if not left:
            causes = {
                f"invalid (first: {self.examples[0] if self.examples else ''})": self.invalid,
                "duplicates": self.duplicates,
                "shorter than spec.dataset.cleaning.minCharacters": self.short,
                "longer than spec.dataset.maxLength": self.dropped_overlong,
                "also in the validation data": leaked,
            }
            known = ", ".join(f"{count} {cause}" for cause, count in causes.items() if count)
            raise DataError(f"none of {self.rows} rows of the {self.what} is left to use: {known}")
