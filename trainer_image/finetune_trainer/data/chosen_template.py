"""A chat template that the job brings, for a model that has none or another one."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from finetune_trainer.contract.vocabulary import ChatTemplateName
from finetune_trainer.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Taori et al. 2023, "Stanford Alpaca". Its headers are words, so that any tokenizer has them.
_ALPACA = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ raise_exception('the template alpaca has no role ' + message['role']) }}{% endif %}{% endfor %}"
)


def use_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Give a tokenizer the template of `dataset.template`; it is saved with the tokenizer. Nothing happens for None.

    `chatml` ends answers with <|im_end|>, which becomes the end-of-sequence token, as serving stops there. Raises
    UsageError for a name that is not known, and for `chatml` where the tokenizer has not its tokens.
    """
    if template is None:
        return
    if "{{" in template or "{%" in template:
        tokenizer.chat_template = template
    elif template == ChatTemplateName.CHATML:
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in _CHATML_TOKENS if token not in vocabulary]
        if missing:
            raise UsageError(
                f"spec.dataset.template: chatml needs the tokens {' and '.join(_CHATML_TOKENS)}, and the tokenizer has "
                f"no {missing[0]}; use alpaca, which needs none, or a Jinja template with tokens that it has"
            )
        tokenizer.chat_template = _CHATML
        tokenizer.eos_token = _CHATML_TOKENS[1]
    elif template == ChatTemplateName.ALPACA:
        tokenizer.chat_template = _ALPACA
    else:
        names = [name.value for name in ChatTemplateName]
        near = difflib.get_close_matches(template, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"spec.dataset.template: {template!r} is neither a name ({', '.join(names)}) nor a Jinja template{hint}"
        )
