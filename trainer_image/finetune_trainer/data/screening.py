"""Which rows are used: parsed, checked, and compared with those before them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.contract.config import DatasetConfig
from finetune_trainer.contract.vocabulary import DatasetFormat
from finetune_trainer.data.cleaning import Entry
from finetune_trainer.data.columns import Columns
from finetune_trainer.data.encoding import refuse_mojibake, refuse_nul
from finetune_trainer.data.near_duplicates import NearDuplicates
from finetune_trainer.data.purpose import AnySample, Purpose
from finetune_trainer.data.report import Tally
from finetune_trainer.data.rows import Dropped, Row, RowError


@dataclass(frozen=True, slots=True)
class Screened:
    """A row that may be used."""

    place: str
    sample: AnySample
    digest: bytes


class Screen:
    """What cleaning has seen so far. Validation rows come first, so that the training rows among them are known."""

    def __init__(self, config: DatasetConfig, purpose: Purpose, folder: Path) -> None:
        """`folder` is for what is too large for memory. Raises UsageError where a package is missing."""
        self._cleaning = config.cleaning
        self._purpose = purpose
        self._columns = Columns(config)
        self._held_out: dict[bytes, str] = {}
        self._seen: tuple[dict[bytes, str], dict[bytes, str]] = ({}, self._held_out)
        threshold = config.cleaning.near_duplicates
        self._near = NearDuplicates(threshold, folder) if threshold is not None else None

    def check(self, row: Row, format_: DatasetFormat, *, is_validation: bool) -> Screened:
        """Raises RowError, whose kind says why the row is not used."""
        if row.value is None:
            raise row.error or RowError("the row has no value")
        sample = self._purpose.parse(format_, self._columns.usual(row.value))
        digest = sample.digest()
        refuse_nul(sample.texts())
        if self._cleaning.drop_mojibake:
            refuse_mojibake(sample.texts())
        empty = sample.empty_turn()
        if self._cleaning.drop_empty_turns and empty is not None:
            raise Dropped("empty_turns", f"turn {empty} says nothing")
        if (length := sample.answer_characters()) < self._cleaning.min_characters:
            raise Dropped("short", f"{length} characters")
        if not is_validation and digest in self._held_out:
            raise Dropped("leaked", f"equals {self._held_out[digest]}")
        if self._cleaning.deduplicate and digest in self._seen[is_validation]:
            raise Dropped("duplicates", f"equals {self._seen[is_validation][digest]}")
        return Screened(row.where, sample, digest)

    def remember(self, screened: Screened, *, is_validation: bool) -> None:
        """Compare later rows with this one: it can be rendered."""
        if self._cleaning.deduplicate or is_validation:
            self._seen[is_validation].setdefault(screened.digest, screened.place)

    def keep(self, sample: AnySample) -> None:
        """Note a sample that is used, for `without_near_duplicates`; in the order of its entries."""
        if self._near is not None:
            self._near.add(sample.words())

    def without_near_duplicates(
        self, validation: list[Entry], training: list[Entry], tallies: tuple[Tally, Tally]
    ) -> tuple[list[Entry], list[Entry]]:
        """(validation, training) entries that resemble none before them, counting the others in (training, validation)
        tallies. Both lists are in the order in which `keep` was called, validation first."""
        if self._near is None:
            return validation, training
        entries = [*validation, *training]
        found = self._near.matches()
        for number, other in found.items():
            is_validation = number < len(validation)
            leaks = not is_validation and other < len(validation)
            kind = "near_leaked" if leaks else "near_duplicates"
            tallies[is_validation].add(kind, entries[number].place, f"resembles {entries[other].place}")
        kept = [entry for number, entry in enumerate(entries) if number not in found]
        first = len(validation) - sum(number < len(validation) for number in found)
        return kept[:first], kept[first:]

    def close(self) -> None:
        """Give disk space back."""
        if self._near is not None:
            self._near.close()
