"""Judged answers: pairs of a chosen and a rejected one, and single ones that were liked or not. Pure.

Pairs come in the layouts of LLaMA-Factory (`conversations` or `messages` with `chosen` and `rejected`; `instruction`,
`input`, `chosen`, `rejected`) and of TRL (`prompt`, `chosen`, `rejected`, each text or a list of messages; or `chosen`
and `rejected` as whole conversations, beside which the prompt may be repeated). Turns may come as JSON text. Single
answers come as any conversation with `kto_tag` (LLaMA-Factory) or with a true or false `label` (TRL).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

from finetune_trainer.contract.vocabulary import DatasetFormat
from finetune_trainer.data.cells import maybe_json, maybe_turns
from finetune_trainer.data.conversation import Conversation
from finetune_trainer.data.formats import SHAREGPT_ROLES, parse, recognise
from finetune_trainer.data.rows import RowError, describe

Fields = Mapping[str, Any]

JUDGEMENTS = ("kto_tag", "label")
"""Fields that say whether an answer was liked: LLaMA-Factory's and TRL's."""
_GO_ON = ("assistant", "tool", "function", "ipython")
"""Roles with which an answer goes on from a prompt; with any other one it is a conversation of its own."""
_WORDS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to the same prompt."""

    chosen: Conversation
    rejected: Conversation
    shared: int
    """Messages that both begin with: the prompt."""

    def empty_turn(self) -> int | None:
        """Number of the first turn, from 1, of either side in which nothing is said or called."""
        return self.chosen.empty_turn() or self.rejected.empty_turn()

    def words(self) -> str:
        """What is said and called: the prompt and both answers."""
        return f"{self.chosen.words()}\n{Conversation(self.rejected.messages[self.shared :]).words()}"

    def texts(self) -> Iterator[str]:
        """Every text in it."""
        yield from self.chosen.texts()
        yield from Conversation(self.rejected.messages[self.shared :]).texts()

    def answer_characters(self) -> int:
        """Characters of the shorter answer."""
        sides = (self.chosen, self.rejected)
        return min(Conversation(side.messages[self.shared :]).answer_characters() for side in sides)

    def digest(self) -> bytes:
        """16 bytes that two pairs share when they differ in white space only. Raises RowError."""
        return hashlib.blake2b(self.chosen.digest() + self.rejected.digest(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer, and whether it was liked."""

    conversation: Conversation
    liked: bool

    def empty_turn(self) -> int | None:
        """Number of the first turn, from 1, in which nothing is said or called."""
        return self.conversation.empty_turn()

    def words(self) -> str:
        """What is said and called."""
        return self.conversation.words()

    def texts(self) -> Iterator[str]:
        """Every text in it."""
        return self.conversation.texts()

    def answer_characters(self) -> int:
        """Characters of the answer."""
        return Conversation(self.conversation.messages[-1:]).answer_characters()

    def digest(self) -> bytes:
        """16 bytes that two answers share when they differ in white space only. Raises RowError."""
        return hashlib.blake2b(self.conversation.digest() + bytes([self.liked]), digest_size=16).digest()


def recognise_judged(row: Fields) -> tuple[DatasetFormat, str] | None:
    """The format of a row of single judged answers and what gave it away; None where it is none."""
    rest = {name: value for name, value in row.items() if name not in JUDGEMENTS}
    if row.get("kto_tag") is not None:
        return (DatasetFormat.UNPAIRED, "rows have 'kto_tag'") if _conversational(rest) else None
    if isinstance(row.get("label"), bool) and _conversational(rest):
        return DatasetFormat.UNPAIRED, "rows have an answer and a 'label' that is true or false"
    return None


def _conversational(row: Fields) -> bool:
    found = recognise(row)
    return found is not None and found[0] not in (DatasetFormat.TEXT, DatasetFormat.PREFERENCE)


def parse_pair(row: Fields) -> Pair:
    """One row of format `preference`. Raises RowError, which says what the row lacks."""
    chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
    pairs = zip(chosen.messages, rejected.messages, strict=False)
    shorter = min(len(chosen.messages), len(rejected.messages))
    shared = next((at for at, (a, b) in enumerate(pairs) if a != b), shorter)
    if shared == len(chosen.messages) == len(rejected.messages):
        raise RowError("'chosen' equals 'rejected': there is nothing to prefer")
    if shared == 0:
        raise RowError("'chosen' and 'rejected' do not begin with the same prompt")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if shared == len(side.messages) or side.messages[shared]["role"] != "assistant":
            raise RowError(
                f"'{name}' differs from the other one before its answer; both must answer the same prompt, with a turn "
                "of the assistant"
            )
        if side.messages[-1]["role"] != "assistant":
            raise RowError(f"'{name}' does not end with a turn of the assistant")
    return Pair(chosen, rejected, shared)


def _side(row: Fields, side: str) -> Conversation:
    """The prompt with one of the answers."""
    answer = maybe_turns(row.get(side))
    if answer is None or answer == "" or answer == []:
        raise RowError(f"no '{side}'")
    if isinstance(answer, Mapping):
        answer = [answer]
    if not isinstance(answer, list | str):
        raise RowError(f"has {describe(answer)} as '{side}' instead of text or messages")
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    key, turns = _prompt_turns(rest)
    begins = "assistant" if isinstance(answer, str) else _speaker(answer[0])
    if isinstance(answer, list) and begins is not None and begins not in _GO_ON:
        return _continued(rest, _left_out(key, turns, answer, side), answer)
    if turns:
        if begins == "assistant" and _speaker(turns[-1]) == "assistant":
            raise RowError(
                f"'{key}' ends with a turn of the assistant, and '{side}' begins with another one; '{key}' has to end "
                "with what both answer"
            )
        return _continued(rest, turns, answer)
    if rest.get("instruction") is not None:
        text = answer if isinstance(answer, str) else side
        conversation = _conversation(DatasetFormat.ALPACA, {**rest, "output": text})
        if isinstance(answer, str):
            return conversation
        # With `input` and `history`, which stand beside the instruction; the text stood for the answer.
        return _continued(rest, _without_system([dict(turn) for turn in conversation.messages[:-1]]), answer)
    question = rest.get("prompt")
    if isinstance(answer, str) and question is None:
        raise RowError(f"'{side}' is text, but the row has no 'prompt' or 'instruction' that it answers")
    return _continued(rest, [] if question is None else [{"role": "user", "content": question}], answer)


def _prompt_turns(rest: Fields) -> tuple[str, list[Any]]:
    """The field that has the prompt as turns, and these; none where it is text, or not there."""
    for key in ("messages", "conversations", "prompt"):
        turns = maybe_turns(rest.get(key)) if key == "prompt" else maybe_json(rest.get(key))
        if isinstance(turns, list) and turns:
            return key, turns
    return "", []


def _left_out(key: str, turns: list[Any], whole: list[Any], side: str) -> list[Any]:
    """The turns of a prompt that a whole conversation lacks: those of the system, where it has none of its own.

    The rest has to be a repetition: of the conversation's prompt, or of this prompt with one of the answers. Raises
    RowError where it says something else: added to the conversation, it would not be what anybody answered.
    """
    asked, own = _without_system(turns), _without_system(whole)
    if asked and (not own or _said(asked[0]) != _said(own[0])):
        raise RowError(
            f"'{side}' begins with a turn of the {_speaker(whole[0])} that is not the one '{key}' begins with; give "
            "whole conversations that repeat the prompt, or the answers alone"
        )
    return [] if len(own) < len(whole) else turns[: len(turns) - len(asked)]


def _without_system(turns: list[Any]) -> list[Any]:
    return list(dropwhile(lambda turn: _speaker(turn) in ("system", "developer"), turns))


def _said(turn: object) -> tuple[str | None, object]:
    """Who speaks in a turn, and what they say."""
    text = turn.get("value" if "from" in turn else "content") if isinstance(turn, Mapping) else turn
    return _speaker(turn), text.strip() if isinstance(text, str) else text


def _continued(rest: Fields, turns: list[Any], answer: list[Any] | str) -> Conversation:
    """Turns of a prompt, and an answer in the same style as they or as text."""
    spoken = any(isinstance(turn, Mapping) and "from" in turn for turn in turns)
    if isinstance(answer, str):
        answer = [{"from": "gpt", "value": answer} if spoken else {"role": "assistant", "content": answer}]
    spoken = spoken or (not turns and any(isinstance(turn, Mapping) and "from" in turn for turn in answer))
    key, format_ = ("conversations", DatasetFormat.SHAREGPT) if spoken else ("messages", DatasetFormat.MESSAGES)
    kept = {name: rest[name] for name in ("system", "tools") if name in rest}
    return _conversation(format_, {**kept, key: [*turns, *answer]})


def _speaker(turn: object) -> str | None:
    """The role of a turn of either style; None where it says none."""
    said = (turn.get("role") or turn.get("from")) if isinstance(turn, Mapping) else None
    return SHAREGPT_ROLES.get(said, said) if isinstance(said, str) else None


def _conversation(format_: DatasetFormat, row: Fields) -> Conversation:
    sample = parse(format_, row)
    assert isinstance(sample, Conversation), "these formats are conversations"
    return sample


def parse_judged(row: Fields) -> Judged:
    """One row of format `unpaired`. Raises RowError, which says what the row lacks."""
    field = next((name for name in JUDGEMENTS if row.get(name) is not None), None)
    if field is None:
        raise RowError("neither 'kto_tag' nor 'label' says whether the answer was liked")
    liked = row[field]
    if not isinstance(liked, bool):
        liked = _WORDS.get(str(liked).strip().lower())
        if liked is None:
            raise RowError(f"'{field}' is {row[field]!r}; it has to be true or false")
    rest = {name: value for name, value in row.items() if name not in JUDGEMENTS}
    found = recognise(rest)
    if found is None or not _conversational(rest):
        raise RowError("no prompt and answer, in the form of messages, conversations, instruction or prompt")
    conversation = _conversation(found[0], rest)
    if conversation.messages[-1]["role"] != "assistant" or len(conversation.messages) < 2:
        raise RowError("the conversation does not end with an answer of the assistant to something")
    return Judged(conversation, liked)
