"""Texts with a class or a number, for a head. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.contract.config import HeadConfig
from finetune_trainer.contract.vocabulary import DatasetFormat, HeadTask
from finetune_trainer.data.cells import maybe_json
from finetune_trainer.data.conversation import Conversation, Document, Message
from finetune_trainer.data.formats import parse
from finetune_trainer.data.rows import RowError, describe
from finetune_trainer.errors import DataError

Fields = Mapping[str, Any]
Numbers = npt.NDArray[np.float64]

_TEXT = ("text", "prompt")
_TURNS = {"messages": "role", "conversations": "from"}
MAX_CLASSES = 10_000
"""More different labels than that are no classes."""


@dataclass(frozen=True, slots=True)
class Labeled:
    """A text or a conversation, and what is to be predicted of it."""

    input: str | tuple[Message, ...]
    label: str | float
    """The name of a class, or a number."""

    @property
    def turns(self) -> tuple[Message, ...]:
        """The input as a conversation."""
        return ({"role": "user", "content": self.input},) if isinstance(self.input, str) else self.input

    @property
    def _read(self) -> Conversation | Document:
        return Document(self.input) if isinstance(self.input, str) else Conversation(self.input)

    def empty_turn(self) -> int | None:
        """Number of the first turn, from 1, in which nothing is said or called."""
        return None if isinstance(self.input, str) else Conversation(self.input).empty_turn()

    def words(self) -> str:
        """What is said in the input."""
        return self._read.words()

    def texts(self) -> Iterator[str]:
        """Every text in the input."""
        return self._read.texts()

    def answer_characters(self) -> int:
        """Characters of the input, surrounding blanks left out: there is no answer."""
        texts = [self.input] if isinstance(self.input, str) else [str(turn["content"]) for turn in self.input]
        return sum(len(text.strip()) for text in texts)

    def digest(self) -> bytes:
        """16 bytes that two inputs share when they differ in white space, or in their label: the same text on both
        sides of a split would be a leak whatever its labels are. Raises RowError."""
        return self._read.digest()


def recognise_labeled(row: Fields) -> tuple[DatasetFormat, str] | None:
    """The format of a labelled row and what gave it away; None where it is none."""
    if row.get("label") is None:
        return None
    key = next((name for name in (*_TEXT, *_TURNS) if row.get(name)), None)
    return None if key is None else (DatasetFormat.LABELED, f"rows have '{key}' and 'label'")


def parse_labeled(row: Fields, head: HeadConfig) -> Labeled:
    """One row of format `labeled`. Raises RowError, which says what the row lacks."""
    label = _number(row.get("label")) if head.task is HeadTask.REGRESSION else _class(row.get("label"), head.labels)
    for name in _TEXT:
        if isinstance(row.get(name), str) and row[name]:
            return Labeled(row[name], label)
    for key, speaker in _TURNS.items():
        if row.get(key) is not None:
            return Labeled(_turns(row, key, speaker), label)
    raise RowError(f"no {', '.join(repr(name) for name in (*_TEXT, *_TURNS))} to read")


def _turns(row: Fields, key: str, speaker: str) -> tuple[Message, ...]:
    turns = maybe_json(row[key])
    if not isinstance(turns, list):
        raise RowError(f"'{key}' is {describe(turns)}, not a list of turns")
    # Read as any conversation is, which has to have an answer; this one's stands for the label, and is left out again.
    answer = {"role": "assistant", "content": "-"} if speaker == "role" else {"from": "gpt", "value": "-"}
    format_ = DatasetFormat.MESSAGES if speaker == "role" else DatasetFormat.SHAREGPT
    sample = parse(format_, {"system": row.get("system"), key: [*turns, answer]})
    assert isinstance(sample, Conversation), "both formats are conversations"
    if len(sample.messages) == 1:
        raise RowError(f"'{key}' is an empty list")
    return sample.messages[:-1]


def _number(label: object) -> float:
    if isinstance(label, str):
        try:
            label = float(label)
        except ValueError:
            raise RowError(f"'label' is {label!r}, no number; regression predicts numbers") from None
    if isinstance(label, bool) or not isinstance(label, int | float):
        raise RowError(f"'label' is {describe(label)} instead of a number")
    if not math.isfinite(label):
        raise RowError(f"'label' is {label}, which cannot be predicted")
    return float(label)


def _class(label: object, names: Sequence[str]) -> str:
    """The name of a class. A number is one as well, or where the names are given and none of them is that number, its
    place among them; so is its text, which is all that CSV has."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, float) or not isinstance(label, bool | int | str) or label == "":
        raise RowError(f"'label' is {describe(label)} instead of the name or number of a class")
    name = str(label).lower() if isinstance(label, bool) else str(label).strip()
    if not names or name in names:
        return name
    # More digits are no place, and Python refuses to convert thousands of them.
    place = int(name) if isinstance(label, str) and name.isdecimal() and len(name) < 10 else label
    if isinstance(place, int) and 0 <= place < len(names):
        return names[place]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RowError(f"'label' {name!r} is none of spec.head.labels ({', '.join(names[:10])}){hint}")


class LabelBook:
    """The labels of all samples as they are read, and in the end the number of each one's class."""

    def __init__(self, head: HeadConfig) -> None:
        self._task = head.task
        self._fixed = head.labels
        self._numbers: dict[str, int] = {}

    def number(self, label: str | float) -> float:
        """A label as a number: itself, or that of its class for the time being.

        Raises DataError where there are too many different ones.
        """
        if not isinstance(label, str):
            return label
        known = self._numbers.setdefault(label, len(self._numbers))
        if known >= MAX_CLASSES:
            raise DataError(
                f"more than {MAX_CLASSES} different labels, the last one {label!r}: these are no classes. Set "
                "spec.head.task to regression, or check the data's 'label'"
            )
        return float(known)

    def names(self) -> tuple[str, ...]:
        """The classes: as the job names them, else those found, in numerical order where all are numbers."""
        if self._task is HeadTask.REGRESSION:
            return ()
        if self._fixed:
            return self._fixed
        integral = all(name.removeprefix("-").isdecimal() for name in self._numbers)
        return tuple(sorted(self._numbers, key=lambda name: (int(name) if integral else 0, name)))

    def settled(self, numbers: Sequence[float]) -> Numbers:
        """[samples], numbers for the time being as places in `names`; numbers that are no class stay."""
        found = np.asarray(numbers, dtype=np.float64)
        if self._task is HeadTask.REGRESSION or not self._numbers:
            return found
        place = {name: at for at, name in enumerate(self.names())}
        order = np.asarray([place[name] for name in self._numbers], dtype=np.float64)
        return order[found.astype(np.int64)]


def check_classes(names: Sequence[str], training: Numbers, validation: Numbers) -> dict[str, int]:
    """Training samples of each class.

    training, validation: [samples], numbers of classes. Raises DataError where there is nothing to tell apart, or a
    class that nothing teaches is asked for in the validation data.
    """
    counts = np.bincount(training.astype(np.int64), minlength=len(names))
    asked = np.bincount(validation.astype(np.int64), minlength=len(names))
    unknown = [name for name, taught, wanted in zip(names, counts, asked, strict=True) if wanted and not taught]
    if unknown:
        raise DataError(
            f"the validation data has the class {unknown[0]!r}, which no training row has"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
            + "; give rows of it to train on, or a larger training share"
        )
    if (counts > 0).sum() < 2:
        raise DataError(f"all training rows have the class {names[int(counts.argmax())]!r}; nothing can be learnt")
    return {name: int(count) for name, count in zip(names, counts, strict=True)}
