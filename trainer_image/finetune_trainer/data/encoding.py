"""Text that was damaged before it came here. The only module that needs ftfy."""

from __future__ import annotations

from collections.abc import Iterable

from finetune_trainer.data.rows import EncodingError
from finetune_trainer.errors import UsageError

_SHOWN = 40


def refuse_nul(texts: Iterable[str]) -> None:
    """Raises EncodingError for a NUL, which stands in no text and ends one in what is written in C."""
    for text in texts:
        if "\0" in text:
            raise EncodingError(f"holds a NUL character, after {text[: text.index(chr(0))][-_SHOWN:]!r}")


def refuse_mojibake(texts: Iterable[str]) -> None:
    """Raises EncodingError for text that was UTF-8, and was decoded as something else.

    By ftfy's heuristic (Speer 2019, doi:10.5281/zenodo.2591652), which looks for sequences of characters that hardly
    occur otherwise, or for characters that stand in place of what could not be decoded. Raises UsageError where ftfy is
    not installed.
    """
    for text in texts:
        if text.isascii():
            continue
        if "\ufffd" in text:
            raise EncodingError(f"holds U+FFFD, which stands for a lost character: {_around(text, chr(0xFFFD))!r}")
        if not _is_bad(text):
            continue
        raise EncodingError(f"text that was decoded with the wrong encoding: {_worst(text)!r}")


def _is_bad(text: str) -> bool:
    try:
        from ftfy.badness import is_bad
    except ImportError as error:
        raise UsageError(
            "spec.dataset.cleaning.dropMojibake needs the package ftfy: install 'finetune-operator[trainer]', or set "
            "it to false"
        ) from error
    return bool(is_bad(text))


def _worst(text: str) -> str:
    """The first word that looks broken, or the beginning where none does by itself."""
    broken = next((word for word in text.split() if not word.isascii() and _is_bad(word)), text)
    return broken[:_SHOWN]


def _around(text: str, char: str) -> str:
    at = text.index(char)
    return text[max(0, at - _SHOWN // 2) : at + _SHOWN // 2]
