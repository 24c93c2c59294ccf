"""A manifest that is being written, beside the options that it is written from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from finetune_operator.api.problems import shown
from finetune_operator.convert.notes import Note, Outcome, one_line, shown_name, shown_value

Path = tuple[str | int, ...]
T = TypeVar("T")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def whole(value: Any) -> int:
    """A whole number, also as text. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a whole number")
    try:
        found = float(value)
        if found == int(found):
            return value if isinstance(value, int) else int(found)
    except (ValueError, OverflowError):
        pass
    raise ValueError("a whole number")


def number(value: Any) -> float:
    """A finite number, also as text: `1e-4` is text to some readers of YAML. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a number")
    try:
        found = float(value)
    except (ValueError, OverflowError):
        raise ValueError("a number") from None
    if found - found != 0:
        raise ValueError("a finite number")
    return found


def flag(value: Any) -> bool:
    """True or false, also as text. Raises ValueError."""
    word = str(value).strip().lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ValueError("true or false")


def text(value: Any) -> str:
    """A word. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError("text")
    return str(value).strip()


def words(value: Any) -> list[str]:
    """A list, or words with commas between them. Raises ValueError."""
    found = value.split(",") if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(one, str) and one.strip() for one in found):
        raise ValueError("a list, or words with commas between them")
    return [one.strip() for one in found]


class Draft:
    """The spec so far, and a note on every option that was looked at."""

    def __init__(self, options: Mapping[str, Any], gpus: int) -> None:
        self.options = {name: value for name, value in options.items() if value is not None}
        """Without those that are null: LLaMA-Factory takes these for not set."""
        self.gpus = gpus
        self.spec: dict[str, Any] = {}
        self.notes: dict[str, Note] = {}
        self.comments: dict[Path, list[str]] = {}
        """What to decide, by the field below spec that it is about."""

    def read(self, option: str, kind: Callable[[Any], T]) -> T | None:
        """The value of an option, None where it is not set or, with a note, where it makes no sense."""
        if option not in self.options:
            return None
        try:
            return kind(self.options[option])
        except ValueError as error:
            self.hand(option, f"is not {error}, and was left out; set the field in the manifest")
            return None

    def is_on(self, option: str) -> bool:
        """Whether a switch is set."""
        return bool(self.read(option, flag))

    def put(self, path: str, value: Any) -> None:
        """Set a field below spec, `training.batchSize`."""
        *above, last = path.split(".")
        at = self.spec
        for name in above:
            at = at.setdefault(name, {})
        at[last] = value

    def carry(self, option: str, path: str, value: Any, text: str = "") -> None:
        """Set a field and say where the option went."""
        self.put(path, value)
        self.note(option, Outcome.CARRIED, f"{path}{'; ' if text else ''}{text}")

    def assume(self, option: str, path: str, value: Any) -> None:
        """Set a field to LLaMA-Factory's default, where the option is not set and our default is another."""
        self.put(path, value)
        self.notes.setdefault(
            option, Note(option, "not set", Outcome.ASSUMED, f"{path}: {shown(value)}, its default there")
        )

    def carry_or_assume(self, option: str, path: str, kind: Callable[[Any], T], default: T) -> T:
        """Carry an option, or its default there; the value."""
        value = self.carry_given(option, path, kind)
        if value is None:
            self.assume(option, path, default)
            return default
        return value

    def carry_given(self, option: str, path: str, kind: Callable[[Any], T]) -> T | None:
        """Carry an option where it is set; the value."""
        value = self.read(option, kind)
        if value is not None:
            self.carry(option, path, value)
        return value

    def ours(self, option: str, text: str) -> None:
        """What an option asks for is done without asking."""
        self.note(option, Outcome.OURS, text)

    def drop(self, option: str, text: str) -> None:
        """An option has no place."""
        self.note(option, Outcome.DROPPED, text)

    def hand(self, option: str, text: str, at: str = "") -> None:
        """A person has to decide; a comment at that field, or the nearest one above it, says so."""
        self.note(option, Outcome.HAND, text)
        path = tuple(int(part) if part.isdigit() else part for part in at.split(".")) if at else ()
        comment = one_line(f"{shown_name(option)}: {text}")
        if comment not in self.comments.setdefault(path, []):
            self.comments[path].append(comment)

    def note(self, option: str, outcome: Outcome, text: str) -> None:
        """Say what became of an option; a later word replaces an earlier one, but for what a person has to decide."""
        known = self.notes.get(option)
        if known is not None and known.outcome is Outcome.HAND:
            if outcome is not Outcome.HAND or text in known.text:
                return
            text = f"{known.text}; {text}"
        value = shown_value(option, self.options[option]) if option in self.options else "not set"
        self.notes[option] = Note(shown_name(option), value, outcome, one_line(text))
