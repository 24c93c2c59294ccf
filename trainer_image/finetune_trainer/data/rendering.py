"""The tokenizer's own chat template: messages to text, and the template's failures as what they mean for a row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

import jinja2
from transformers.utils import chat_template_utils

from finetune_trainer.data.conversation import Conversation, Message
from finetune_trainer.data.rows import RowError
from finetune_trainer.errors import UsageError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character, and the one after the last."""

RENDERED_ON = datetime(2024, 7, 26)
"""Templates that print the current date print this one, so that samples are the same tomorrow, on another node, and in
a resumed attempt. It is the date that Llama 3's own template falls back to."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NOW = "strftime_now"
# A template's own mistakes surface as whatever Python raises for the expression.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class Renderer:
    """The chat template of one tokenizer. Raises UsageError where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        source = _source(tokenizer)
        self.prints_date = _NOW in source
        """Whether the template asks for the current date."""
        freeze_date(tokenizer)
        self.marks_answers = bool(_GENERATION.search(source))
        """Whether the template says by itself which characters the assistant writes."""
        self.control = _control_tokens(tokenizer, source)
        """Special tokens, and other added tokens that the template writes, the longest first."""

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, *, prompt: bool = False
    ) -> str:
        """The text of a conversation, with the prompt for the next answer if asked. Raises RowError."""
        try:
            return cast(
                str,
                self._tokenizer.apply_chat_template(
                    list(messages), tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=prompt
                ),
            )
        except _TEMPLATE_FAILURES as error:
            raise _refused(error) from None

    def render_marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text, and the characters that the template marks as the assistant's. Raises RowError."""
        tools: list[Any] | None = list(conversation.tools) if conversation.tools else None
        # Its annotation speaks of one string; what it returns is a list of texts and a list of their marks.
        render: Any = chat_template_utils.render_jinja_template
        try:
            texts, spans = render(
                conversations=[list(conversation.messages)],
                tools=tools,
                chat_template=self._tokenizer.get_chat_template(tools=tools),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except _TEMPLATE_FAILURES as error:
            raise _refused(error) from None
        return texts[0], spans[0]


def freeze_date(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let this process render the tokenizer's chat template as of `RENDERED_ON`, whoever asks.

    transformers gives templates a function `strftime_now`, and does not pass on another one. It compiles each template
    once and keeps it: the function is replaced there.
    """
    templates = tokenizer.chat_template
    for source in templates.values() if isinstance(templates, dict) else [templates]:
        if isinstance(source, str) and _NOW in source:
            with suppress(jinja2.TemplateError):
                compiled = chat_template_utils._compile_jinja_template(source)
                compiled.globals[_NOW] = RENDERED_ON.strftime


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise UsageError(
            "the model's tokenizer has no chat template, and the data set holds conversations. Set "
            "spec.dataset.template to chatml, alpaca or a Jinja template, use the instruct variant of the model, or "
            "give plain text (spec.dataset.format: text)"
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise UsageError(f"the tokenizer's chat template cannot be chosen: {first_line(error)}") from None


def _control_tokens(tokenizer: PreTrainedTokenizerBase, source: str) -> tuple[str, ...]:
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    tokens = {token.content for token in added if token.special or token.content in source}
    return tuple(sorted(tokens, key=lambda token: (-len(token), token)))


def _refused(error: BaseException) -> RowError:
    return RowError(f"the chat template refuses the conversation: {first_line(error)}")
