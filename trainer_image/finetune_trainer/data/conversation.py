"""What every format is turned into: a conversation, or plain text. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_trainer.data.rows import EncodingError, RowError

Message = dict[str, Any]
"""`role` and `content`, and what else a chat template may read, such as `tool_calls`."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of a chat, at least one of them the assistant's."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    """JSON schemas of the functions that the assistant may call."""
    is_plain: bool = False
    """A prompt and its completion, which a model without a chat template reads one after the other."""

    def empty_turn(self) -> int | None:
        """Number of the first turn, from 1, in which the user or the assistant says and calls nothing."""
        for number, message in enumerate(self.messages, 1):
            says = str(message.get("content") or "").strip() or message.get("tool_calls")
            if message["role"] in ("user", "assistant") and not says:
                return number
        return None

    def words(self) -> str:
        """What is said and called. System turns are left out: a data set often has the same one in every row."""
        parts = [str(m.get("content") or "") for m in self.messages if m["role"] != "system"]
        calls = [json.dumps(m["tool_calls"], default=str) for m in self.messages if m.get("tool_calls")]
        return "\n".join(parts + calls)

    def texts(self) -> Iterator[str]:
        """Every text in it, of whatever turn."""
        for message in self.messages:
            yield from (value for value in message.values() if isinstance(value, str))

    def answer_characters(self) -> int:
        """Characters of the assistant's turns, calls of tools included, surrounding blanks left out."""
        return sum(
            len(str(message.get("content") or "").strip()) + _serialized_length(message.get("tool_calls"))
            for message in self.messages
            if message["role"] == "assistant"
        )

    def digest(self) -> bytes:
        """16 bytes that two conversations share when they differ in white space only. Raises RowError."""
        return _digest(["conversation", self.messages, self.tools])


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text to continue."""

    text: str

    def empty_turn(self) -> None:
        """Plain text has no turns."""

    def words(self) -> str:
        """The text."""
        return self.text

    def texts(self) -> Iterator[str]:
        """The text."""
        yield self.text

    def answer_characters(self) -> int:
        """Characters, surrounding blanks left out."""
        return len(self.text.strip())

    def digest(self) -> bytes:
        """16 bytes that two texts share when they differ in white space only. Raises RowError."""
        return _digest(["document", self.text])


Sample = Conversation | Document


def _serialized_length(value: object) -> int:
    return len(json.dumps(value, default=str)) if value else 0


def _digest(value: object) -> bytes:
    try:
        text = json.dumps(_normalized(value), ensure_ascii=False, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
    except UnicodeEncodeError as error:
        raise EncodingError(
            f"holds a lone surrogate (\\u{ord(error.object[error.start]):04x}), which is no character"
        ) from None
    except RecursionError:
        raise RowError("nested too deeply") from None


def _normalized(value: object) -> object:
    match value:
        case str():
            return " ".join(value.split())
        case dict():
            return {str(key): _normalized(item) for key, item in value.items()}
        case list() | tuple():
            return [_normalized(item) for item in value]
    return value
