"""Held-out prompts that people read the model's answers to. Pure."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Container
from dataclasses import dataclass

from finetune_trainer.data.cleaning import rank
from finetune_trainer.data.conversation import Conversation, Message

KEPT_PROMPTS = 1000
"""As many as a job may have compared with generated answers."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The turns before an answer, and the answer that the data set has for them."""

    messages: list[Message]
    reference: str
    tools: list[dict[str, object]] | None = None


def answers_in_words(conversation: Conversation) -> list[int]:
    """Places of the answers that something leads to."""
    turns = conversation.messages
    return [
        position
        for position in range(1, len(turns))
        if turns[position]["role"] == "assistant" and str(turns[position]["content"]).strip()
    ]


def prompt_of(conversation: Conversation, position: int) -> Prompt:
    """What leads to the answer at a place, and that answer."""
    tools = [dict(tool) for tool in conversation.tools] if conversation.tools else None
    before = [dict(turn) for turn in conversation.messages[:position]]
    return Prompt(before, conversation.messages[position]["content"], tools)


class PromptPicker:
    """Keeps the conversations that will be held out first, while it is not yet known how many will be.

    Of each it takes the longest prompt of at most `max_length` tokens: one that is cut asks for something else.
    """

    def __init__(self, seed: int, max_length: int) -> None:
        self._seed = seed
        self._max_length = max_length
        self._heap: list[tuple[int, bytes, Prompt]] = []
        self._digests: set[bytes] = set()
        self._without: set[bytes] = set()
        """Conversations none of whose prompts fits."""

    def offer(self, conversation: Conversation, digest: bytes, tokens: Callable[[Prompt], float]) -> None:
        """Consider a conversation. `tokens`: the length of a prompt as a model is asked it, infinite where it cannot
        be."""
        place = -rank(self._seed, digest)
        if digest in self._digests or (len(self._heap) == KEPT_PROMPTS and place <= self._heap[0][0]):
            return
        answers = answers_in_words(conversation)
        # The prompt of each is longer than those before it: few of a long conversation's have to be looked at.
        fitting = bisect_left(answers, True, key=lambda at: tokens(prompt_of(conversation, at)) > self._max_length)
        if not fitting:
            self._without.update([digest] if answers else [])
            return
        self._digests.add(digest)
        heapq.heappush(self._heap, (place, digest, prompt_of(conversation, answers[fitting - 1])))
        if len(self._heap) > KEPT_PROMPTS:
            self._digests.discard(heapq.heappop(self._heap)[1])

    def picked(self, held_out: Container[bytes]) -> list[Prompt]:
        """Those that were held out indeed, in an order that depends on their content alone."""
        best_first = sorted(self._heap, key=lambda item: (-item[0], item[1]))
        return [prompt for _, digest, prompt in best_first if digest in held_out]

    def notes(self, held_out: Container[bytes]) -> list[str]:
        """What a reader of the result should know."""
        count = sum(digest in held_out for digest in self._without)
        if not count:
            return []
        return [
            f"{count} held-out conversations are not among those that a model answers: no answer of theirs has a prompt"
            f" of at most {self._max_length} tokens (spec.dataset.maxLength) that the chat template takes"
        ]
