"""Which characters of a rendered conversation the assistant writes.

A template is a program: nothing in its output says where an answer begins. Where it marks answers itself
(`{% generation %}`), the marks are used. Otherwise the conversation is rendered up to each answer, with the prompt that
inference would use, and up to its end; both must be prefixes of the whole, character for character. Templates that
rewrite earlier turns (reasoning models drop old thoughts) fail that check: there each answer becomes a sample of its
own, rendered as inference would see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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
    """Plain text: the tokenizer adds what it adds to any text, and the end of the text is learnt. Without spans, all of
    it is."""
    is_input: bool = False
    """Read as a whole to say something about it; nothing of it is predicted."""
    is_templated: bool = False
    """An input that the chat template wrote, special tokens included."""


class ChatTemplate:
    """The chat template of one tokenizer.

    Raises UsageError where the tokenizer has none, or one that cannot be used: broken, or with answers that do not
    continue its own generation prompt.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, train_on_prompt: bool, mask_history: bool = False
    ) -> None:
        self._renderer = Renderer(tokenizer)
        self._eos = tokenizer.eos_token
        self._train_on_prompt = train_on_prompt
        self._mask_history = mask_history
        self.prints_date = self._renderer.prints_date
        """Whether the template asks for the current date."""
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
        last = _answers(messages)[-1]
        if self._renderer.marks_answers:
            spans = self._marked_spans(conversation)
            earlier = self._count_marked(conversation, last) if self._mask_history else 0
            return [self._ended(text, spans[earlier:], messages)]
        if self._mask_history:
            final = self._answer_spans(conversation, text, last)
            return [self._ended(text, final, messages) if final else self._render_answer_at(conversation, last)]
        found = self._answer_spans(conversation, text)
        if found is not None:
            return [self._ended(text, found, messages)]
        self.split_conversations += 1
        return self._render_each_answer(conversation)

    def render_input(self, messages: Sequence[Message]) -> Rendered:
        """A conversation to say something about. Raises RowError where the template refuses it."""
        return Rendered(self._renderer.render(messages, None), (), is_input=True, is_templated=True)

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> str:
        """What a model is asked to continue. Raises RowError where the template refuses it."""
        return self._renderer.render(messages, tools, prompt=True)

    def render_answer(self, conversation: Conversation, first: int) -> Rendered:
        """One sample in which nothing is learnt but what the assistant says from message `first` on.

        Raises RowError where the template refuses the conversation, or rewrites these turns as it goes on.
        """
        messages = conversation.messages
        text = self._renderer.render(messages, conversation.tools)
        self._check_tool_calls(conversation, text)
        answers = [position for position in _answers(messages) if position >= first]
        if self._renderer.marks_answers:
            spans = self._marked_spans(conversation)[-len(answers) :]
            return self._ended(text, spans, messages)
        found = self._answer_spans(conversation, text, first)
        if found is not None:
            return self._ended(text, found, messages)
        if answers == [len(messages) - 1]:
            return self._render_answer_at(conversation, answers[0])
        raise RowError("the chat template renders the answers differently once more turns follow")

    def _render_each_answer(self, conversation: Conversation) -> list[Rendered]:
        return [self._render_answer_at(conversation, position) for position in _answers(conversation.messages)]

    def _render_answer_at(self, conversation: Conversation, position: int) -> Rendered:
        """One answer, with what comes before it rendered as inference would see it."""
        messages = conversation.messages[: position + 1]
        text = self._renderer.render(messages, conversation.tools)
        start = self._answer_start(conversation, position, text)
        if start is None:
            raise RowError(
                f"the chat template renders the answer in message {position + 1} differently from a continuation "
                "of its own generation prompt, so that the loss cannot be placed on it exactly"
            )
        return self._ended(text, (self._trimmed(text, start, len(text)),), messages)

    def _answer_spans(self, conversation: Conversation, text: str, first: int = 0) -> tuple[Span, ...] | None:
        """The answers' characters, from message `first` on; None where the template renders a turn differently once
        more turns follow."""
        spans = []
        for position in (answer for answer in _answers(conversation.messages) if answer >= first):
            start = self._answer_start(conversation, position, text)
            end = self._answer_end(conversation, position, text, start) if start is not None else None
            if start is None or end is None or end < start:
                return None
            spans.append(self._trimmed(text, start, self._with_end_token(text, start, end)))
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

    def _count_marked(self, conversation: Conversation, position: int) -> int:
        """Marked spans before a message."""
        if not _answers(conversation.messages[:position]):
            return 0
        return len(self._renderer.render_marked(replace(conversation, messages=conversation.messages[:position]))[1])

    def _with_end_token(self, text: str, start: int, end: int) -> int:
        """Some templates mark the content alone, and some end an answer with the next turn's first token alone (GLM 4):
        the token that inference stops at has to be learnt too."""
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
