"""Which characters of a rendered conversation the assistant writes.

A template is a program: nothing in its output says where an answer begins. Where it marks answers itself
(`{% generation %}`), the marks are used. Otherwise the conversation is rendered up to each answer, with the prompt that
inference would use, and up to its end; both must be prefixes of the whole, character for character. Templates that
rewrite earlier turns (reasoning models drop old thoughts) fail that check: there each answer becomes a sample of its
own, rendered as inference would see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_trainer.data.conversation import Conversation, Message
from finetune_trainer.data.rendering import Renderer, Span
from finetune_trainer.data.rows import RowError
from finetune_trainer.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKER = "\ue000answer\ue001"
"""Private-use characters: no template treats them specially and no data set holds them."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text that is tokenized in one piece."""

    text: str
    spans: tuple[Span, ...]
    """The characters that the loss is taken over."""
    is_document: bool = False
    """Plain text: the tokenizer adds what it adds to any text, and the end of the text is learnt."""


class ChatTemplate:
    """The chat template of one tokenizer.

    Raises UsageError where the tokenizer has none, or one that cannot be used: broken, or with answers that do not
    continue its own generation prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, train_on_prompt: bool) -> None:
        self._renderer = Renderer(tokenizer)
        self._eos = tokenizer.eos_token
        self._train_on_prompt = train_on_prompt
        self._has_generation_prompt = True
        self.split_conversations = 0
        """Conversations that became one sample for each answer, because the template rewrites earlier turns."""
        self.appended_eos = 0
        """Samples whose last answer the template does not end, so that the end-of-sequence token was added."""
        self._probe()

    def render(self, conversation: Conversation) -> list[Rendered]:
        """One sample, or one for each answer. Raises RowError where the template refuses the conversation."""
        messages = conversation.messages
        text = self._renderer.render(messages, conversation.tools)
        self._check_tool_calls(conversation, text)
        if self._train_on_prompt:
            return [self._ended(text, ((0, len(text)),), messages)]
        if self._renderer.marks_answers:
            return [self._ended(text, self._marked_spans(conversation), messages)]
        spans = self._answer_spans(conversation, text)
        if spans is not None:
            return [self._ended(text, spans, messages)]
        self.split_conversations += 1
        return self._render_each_answer(conversation)

    def _render_each_answer(self, conversation: Conversation) -> list[Rendered]:
        samples = []
        for position in _answers(conversation.messages):
            messages = conversation.messages[: position + 1]
            text = self._renderer.render(messages, conversation.tools)
            start = self._answer_start(conversation, position, text)
            if start is None:
                raise RowError(
                    f"the chat template renders the answer in message {position + 1} differently from a continuation "
                    "of its own generation prompt, so that the loss cannot be placed on it exactly"
                )
            samples.append(self._ended(text, (self._trimmed(text, start, len(text)),), messages))
        return samples

    def _answer_spans(self, conversation: Conversation, text: str) -> tuple[Span, ...] | None:
        """The answers' characters; None where the template renders a turn differently once more turns follow."""
        spans = []
        for position in _answers(conversation.messages):
            start = self._answer_start(conversation, position, text)
            end = self._answer_end(conversation, position, text, start) if start is not None else None
            if start is None or end is None or end < start:
                return None
            spans.append(self._trimmed(text, start, end))
        return tuple(spans)

    def _answer_start(self, conversation: Conversation, position: int, text: str) -> int | None:
        if position == 0:
            # There is no prompt to render before the first message.
            return self._content_start(conversation, position, text)
        try:
            prompt = self._renderer.render(conversation.messages[:position], conversation.tools, prompt=True)
        except RowError:
            return None
        if not text.startswith(prompt):
            return None
        if not self._has_generation_prompt:
            content = self._content_start(conversation, position, text)
            if content is not None and text[len(prompt) : content].strip():
                # The template writes a header before the answer, but offers no generation prompt that holds it.
                return content
        return len(prompt)

    def _content_start(self, conversation: Conversation, position: int, text: str) -> int | None:
        """Where the content of a message begins, found by putting a marker in its place."""
        messages = list(conversation.messages[: position + 1])
        messages[position] = {**messages[position], "content": _MARKER}
        try:
            marked = self._renderer.render(messages, conversation.tools)
        except RowError:
            return None
        start = marked.find(_MARKER)
        return start if start >= 0 and marked[:start] == text[:start] else None

    def _answer_end(self, conversation: Conversation, position: int, text: str, start: int) -> int | None:
        if position + 1 == len(conversation.messages):
            return len(text)
        try:
            turn = self._renderer.render(conversation.messages[: position + 1], conversation.tools)
        except RowError:
            return None
        if text.startswith(turn):
            return len(turn)
        common = _common_prefix(turn, text)
        # Some templates end a finished conversation with one more token, which is missing while it goes on.
        ends = [
            text.rfind(token, start, common) + len(token)
            for token in self._renderer.control
            if token in text[start:common]
        ]
        end = max(ends, default=None)
        return end if end is not None and not self._without_control(turn[end:]) else None

    def _trimmed(self, text: str, start: int, end: int) -> Span:
        """Without the white space that the template writes after an end-of-turn token: inference has stopped there."""
        stripped = text[start:end].rstrip()
        return (start, start + len(stripped)) if stripped.endswith(self._renderer.control) else (start, end)

    def _marked_spans(self, conversation: Conversation) -> tuple[Span, ...]:
        text, spans = self._renderer.render_marked(conversation)
        if not spans:
            raise RowError("the chat template marks answers with {% generation %}, but none of this conversation")
        return tuple((start, self._with_end_token(text, start, end)) for start, end in spans)

    def _with_end_token(self, text: str, start: int, end: int) -> int:
        """Templates that mark the content alone leave out the token that ends the turn, which has to be learnt too."""
        if text[start:end].rstrip().endswith(self._renderer.control):
            return end
        following = (len(token) for token in self._renderer.control if text.startswith(token, end))
        return end + max(following, default=0)

    def _ended(self, text: str, spans: tuple[Span, ...], messages: Sequence[Message]) -> Rendered:
        eos = self._eos
        if messages[-1]["role"] == "assistant" and eos and not text.rstrip().endswith(self._renderer.control):
            self.appended_eos += 1
            spans, text = (*spans, (len(text), len(text) + len(eos))), text + eos
        return Rendered(text, spans)

    def _without_control(self, text: str) -> str:
        for token in self._renderer.control:
            text = text.replace(token, "")
        return text.strip()

    def _check_tool_calls(self, conversation: Conversation, text: str) -> None:
        for message in conversation.messages:
            for call in message.get("tool_calls") or ():
                function = call.get("function", call) if isinstance(call, dict) else {}
                name = function.get("name") if isinstance(function, dict) else None
                if not isinstance(name, str) or name not in text:
                    raise RowError(f"the chat template does not render the call of the tool {name!r}")

    def _probe(self) -> None:
        """Refuse at once a template under which no row could be used."""
        question: Message = {"role": "user", "content": "a"}
        answer: Message = {"role": "assistant", "content": "b"}
        try:
            bare = self._renderer.render([question], None)
            prompt = self._renderer.render([question], None, prompt=True)
            text = self._renderer.render([question, answer], None)
        except RowError as error:
            raise UsageError(
                f"the tokenizer's chat template cannot render a question and an answer: {error}; repair the template "
                "in the model's folder"
            ) from None
        self._has_generation_prompt = bare != prompt
        if not (text.startswith(prompt) or self._renderer.marks_answers or self._train_on_prompt):
            begin = _common_prefix(prompt, text)
            raise UsageError(
                "the chat template prompts the model in one way and renders its answers in another: the generation "
                f"prompt goes on with {prompt[begin : begin + 40]!r} where a rendered answer has "
                f"{text[begin : begin + 40]!r}. The loss cannot be placed on the answers exactly: use a template that "
                "marks them with {% generation %}, or set spec.dataset.trainOnPrompt to true"
            )


def _answers(messages: Sequence[Message]) -> list[int]:
    return [position for position, message in enumerate(messages) if message["role"] == "assistant"]


def _common_prefix(first: str, second: str) -> int:
    """Characters that both texts start with."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
