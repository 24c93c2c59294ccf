"""Counting what is found in a data set, with examples, and refusing it where too much of it is broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic.alias_generators import to_camel

from finetune_trainer.contract.config import CleaningConfig
from finetune_trainer.data.rows import RowError
from finetune_trainer.errors import DataError

EXAMPLES = 5
"""Rows that are shown of each kind."""
BROKEN = ("invalid", "encoding")
"""Kinds of rows that `dropInvalid` and `maxInvalidShare` speak of."""
DROPPED = {
    "invalid": "invalid",
    "encoding": "of a broken encoding",
    "empty_turns": "with an empty turn",
    "short": "shorter than spec.dataset.cleaning.minCharacters",
    "duplicates": "duplicates",
    "near_duplicates": "near duplicates",
    "dropped_overlong": "longer than spec.dataset.maxLength",
    "leaked": "also in the validation data",
    "near_leaked": "close to a row of the validation data",
}
"""Why rows or samples are left out: the names of the counts in `DataReport`, and how a message says it."""
KINDS = (*DROPPED, "truncated")


@dataclass
class Tally:
    """What became of the rows of the training data, or of the validation data."""

    cleaning: CleaningConfig
    what: str
    """For messages: `training data` or `validation data`."""
    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """By the names of `KINDS`."""
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str, finding: str) -> None:
        """Count something that was found at a place, which is `file:line`."""
        self.counts[kind] += 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < EXAMPLES:
            shown.append(f"{place}: {finding}")

    def add_rejected(self, place: str, error: RowError) -> None:
        """Count a row that is not used. Raises DataError where it is broken, and none may be."""
        if error.kind in BROKEN and not self.cleaning.drop_invalid:
            raise DataError(
                f"{place}: {error}. Repair the row, or set spec.dataset.cleaning.dropInvalid to true to leave out such "
                "rows"
            )
        self.add(error.kind, place, str(error))

    def check_invalid_share(self) -> None:
        """Raises DataError where more rows are broken than allowed."""
        allowed = self.cleaning.max_invalid_share
        broken = sum(self.counts[kind] for kind in BROKEN)
        if self.rows and broken / self.rows > allowed:
            raise DataError(
                f"{broken} of {self.rows} rows ({broken / self.rows:.1%}) of the {self.what} cannot be used, more than "
                f"the {allowed:.1%} of spec.dataset.cleaning.maxInvalidShare. The first is {self._first_broken()}. "
                "Repair the rows, check spec.dataset.format, or allow a larger share"
            )

    def check_not_empty(self, left: int, uris: Sequence[str]) -> None:
        """Raises DataError where there is nothing left, and says where the rows went."""
        if not self.rows:
            raise DataError(f"the {self.what} is empty: {', '.join(uris)} holds no row")
        if not left:
            known = ", ".join(f"{self.counts[kind]} {why}" for kind, why in DROPPED.items() if self.counts[kind])
            first = f" (the first broken one: {self._first_broken()})" if self._first_broken() else ""
            raise DataError(f"none of {self.rows} rows of the {self.what} is left to use: {known}{first}")

    def _first_broken(self) -> str:
        return next((self.examples[kind][0] for kind in BROKEN if kind in self.examples), "")


def examples_of(tallies: Sequence[Tally]) -> dict[str, tuple[str, ...]]:
    """The first few examples of each kind, by the names that the counts have in `manifest.json`."""
    found = {kind: [one for tally in tallies for one in tally.examples.get(kind, ())][:EXAMPLES] for kind in KINDS}
    return {to_camel(kind): tuple(shown) for kind, shown in found.items() if shown}
