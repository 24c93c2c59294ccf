"""Held-out prompts that people read the model's answers to. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Container
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


def to_prompt(conversation: Conversation) -> Prompt | None:
    """The last answer in words, and what leads to it; None where nothing does."""
    for position in range(len(conversation.messages) - 1, 0, -1):
        message = conversation.messages[position]
        if message["role"] == "assistant" and str(message["content"]).strip():
            tools = [dict(tool) for tool in conversation.tools] if conversation.tools else None
            return Prompt([dict(turn) for turn in conversation.messages[:position]], message["content"], tools)
    return None


class PromptPicker:
    """Keeps the conversations that will be held out first, while it is not yet known how many will be."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._heap: list[tuple[int, bytes, Prompt]] = []
        self._digests: set[bytes] = set()

    def offer(self, conversation: Conversation, digest: bytes) -> None:
        """Consider a conversation."""
        place = -rank(self._seed, digest)
        if digest in self._digests or (len(self._heap) == KEPT_PROMPTS and place <= self._heap[0][0]):
            return
        prompt = to_prompt(conversation)
        if prompt is None:
            return
        self._digests.add(digest)
        heapq.heappush(self._heap, (place, digest, prompt))
        if len(self._heap) > KEPT_PROMPTS:
            self._digests.discard(heapq.heappop(self._heap)[1])

    def picked(self, held_out: Container[bytes]) -> list[Prompt]:
        """Those that were held out indeed, in an order that depends on their content alone."""
        best_first = sorted(self._heap, key=lambda item: (-item[0], item[1]))
        return [prompt for _, digest, prompt in best_first if digest in held_out]
