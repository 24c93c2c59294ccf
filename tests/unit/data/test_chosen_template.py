"""Templates that the job brings, for a model that has none."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune_trainer.data import use_template
from finetune_trainer.data.conversation import Conversation
from finetune_trainer.data.rows import RowError
from finetune_trainer.data.template import ChatTemplate
from finetune_trainer.errors import UsageError
from tests.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.unit.data.test_template import FIRST, QUESTION, SECOND, SYSTEM, TWO_TURNS, encode, pieces


def test_none_leaves_the_models_own() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    use_template(tokenizer, None)
    assert tokenizer.chat_template == CHATML


def test_chatml_ends_where_serving_stops() -> None:
    tokenizer = tiny_tokenizer(None, eos="</s>", special=("<|im_end|>",))
    use_template(tokenizer, "chatml")
    (sample,) = encode(tokenizer, Conversation((SYSTEM, *TWO_TURNS)))
    assert pieces(tokenizer, sample) == [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>"


def test_chatml_needs_its_tokens() -> None:
    with pytest.raises(UsageError, match=r"spec\.dataset\.template: chatml needs .* no <\|im_start\|>; use alpaca"):
        use_template(tiny_tokenizer(None, bos="<s>", eos="</s>"), "chatml")


def test_alpaca_needs_no_token_of_its_own() -> None:
    tokenizer = tiny_tokenizer(None, bos="<s>", eos="</s>", adds_bos=True)
    use_template(tokenizer, "alpaca")
    (sample,) = encode(tokenizer, Conversation((SYSTEM, *TWO_TURNS)))
    text = str(tokenizer.decode(sample.input_ids))
    assert text.startswith(
        f"<s>{SYSTEM['content']}\n\n### Instruction:\n{QUESTION['content']}\n\n### Response:\n{FIRST}</s>"
    )
    assert [piece.strip() for piece in pieces(tokenizer, sample)] == [f"{FIRST}</s>", f"{SECOND}</s>"]
    tool = {"role": "tool", "content": "0.5"}
    with pytest.raises(RowError, match="has no role tool"):
        encode(tokenizer, Conversation((*TWO_TURNS, tool)))


def test_a_template_as_text_is_used_and_saved(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(None)
    use_template(tokenizer, CHATML)
    (sample,) = encode(tokenizer, Conversation(tuple(TWO_TURNS)))
    assert pieces(tokenizer, sample) == [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == CHATML


def test_a_template_that_is_no_jinja_is_refused() -> None:
    tokenizer = tiny_tokenizer(None)
    use_template(tokenizer, "{% for m in messages %}")
    with pytest.raises(UsageError, match="cannot render a question"):
        ChatTemplate(tokenizer, train_on_prompt=False)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'chatlm' is neither a name .*; did you mean chatml"):
        use_template(tiny_tokenizer(None), "chatlm")
