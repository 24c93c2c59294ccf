"""The loss under chat templates of well-known models, as TRL ships them, against expectations written by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerFast

from finetune_trainer.data.conversation import Conversation
from tests.tiny_tokenizer import tiny_tokenizer
from tests.unit.data.test_template import (
    ANSWER,
    FIRST,
    QUESTION,
    SECOND,
    SECOND_ANSWER,
    SECOND_QUESTION,
    SYSTEM,
    TWO_TURNS,
    encode,
    pieces,
)

_SPECIAL = re.compile(r"<\|[A-Za-z_]+\|>|<(?:start|end)_of_turn>")
EOS = {"llama3": "<|eot_id|>", "llama3_2": "<|eot_id|>", "gptoss": "<|return|>", "gemma": "<eos>", "gemma3": "<eos>"}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with the template of a model and the special tokens that it writes."""
    source = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    eos = EOS.get(name.removesuffix("_training"), "<|im_end|>" if "<|im_end|>" in source else "<|endoftext|>")
    special = sorted({*_SPECIAL.findall(source)} - {eos})
    return tiny_tokenizer(source, bos="<s>", eos=eos, special=special)


def trained(name: str, messages: list[dict[str, Any]], **options: Any) -> list[list[str]]:
    """The trained pieces of each sample."""
    tokenizer = tokenizer_of(name)
    return [pieces(tokenizer, sample) for sample in encode(tokenizer, Conversation(tuple(messages), **options))]


CALL = {"type": "function", "function": {"name": "loss", "arguments": {"step": 3}}}
TOOLS = ({"type": "function", "function": {"name": "loss", "parameters": {"type": "object", "properties": {}}}},)
WITH_A_CALL = [
    QUESTION,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "0.5"},
    SECOND_ANSWER,
]
THOUGHT = {"role": "assistant", "content": "<think>\nIt says 3.\n</think>\n\n" + FIRST}
SECOND_THOUGHT = {"role": "assistant", "content": SECOND, "reasoning_content": "It says 0.5."}

CASES: dict[str, tuple[str, list[dict[str, Any]], list[list[str]]]] = {
    "llama 3": ("llama3", [SYSTEM, *TWO_TURNS], [[f"{FIRST}<|eot_id|>", f"{SECOND}<|eot_id|>"]]),
    "llama 3.2": ("llama3_2", [SYSTEM, *TWO_TURNS], [[f"{FIRST}<|eot_id|>", f"{SECOND}<|eot_id|>"]]),
    "gemma": ("gemma", TWO_TURNS, [[f"{FIRST}<end_of_turn>", f"{SECOND}<end_of_turn>"]]),
    "gemma 3": ("gemma3", [SYSTEM, *TWO_TURNS], [[f"{FIRST}<end_of_turn>", f"{SECOND}<end_of_turn>"]]),
    "phi 3": ("phi3", [SYSTEM, *TWO_TURNS], [[f"{FIRST}<|end|>", f"{SECOND}<|end|>\n<|endoftext|>"]]),
    "qwen 2.5": ("qwen2_5", TWO_TURNS, [[f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]]),
    "glm 4, which ends a turn with the next one's first token": (
        "glm4moe",
        TWO_TURNS,
        [[f"\n<think></think>\n{FIRST}<|user|>", f"\n<think></think>\n{SECOND}<|endoftext|>"]],
    ),
    "gpt-oss, which ends the last answer differently": (
        "gptoss",
        TWO_TURNS,
        [[f"<|channel|>final<|message|>{text}<|return|>"] for text in (FIRST, SECOND)],
    ),
    "qwen 3 without a thought": (
        "qwen3",
        [QUESTION, ANSWER],
        [[f"<think>\n\n</think>\n\n{FIRST}<|im_end|>"]],
    ),
    "qwen 3 with a thought": (
        "qwen3",
        [QUESTION, THOUGHT],
        [[f"<think>\nIt says 3.\n</think>\n\n{FIRST}<|im_end|>"]],
    ),
    "qwen 3 drops the earlier thought": (
        "qwen3",
        [QUESTION, THOUGHT, SECOND_QUESTION, SECOND_THOUGHT],
        [
            [f"<think>\nIt says 3.\n</think>\n\n{FIRST}<|im_end|>"],
            [f"<think>\nIt says 0.5.\n</think>\n\n{SECOND}<|im_end|>"],
        ],
    ),
    "qwen 3 instruct": ("qwen3_instruct_2507", TWO_TURNS, [[f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_answers_and_their_ends_are_trained(case: str) -> None:
    name, messages, expected = CASES[case]
    assert trained(name, messages) == expected


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507"])
def test_calls_of_tools_are_trained_and_what_tools_answer_is_not(name: str) -> None:
    assert trained(name, WITH_A_CALL, tools=TOOLS) == [
        ['<tool_call>\n{"name": "loss", "arguments": {"step": 3}}\n</tool_call><|im_end|>', f"{SECOND}<|im_end|>"]
    ]


def test_calls_within_one_question_of_a_reasoning_model() -> None:
    call = '<tool_call>\n{"name": "loss", "arguments": {"step": 3}}\n</tool_call><|im_end|>'
    # The call's thought is there when the model calls, and left out when it goes on: two samples.
    assert trained("qwen3", WITH_A_CALL, tools=TOOLS) == [
        [f"<think>\n\n</think>\n\n{call}"],
        [f"<think>\n\n</think>\n\n{SECOND}<|im_end|>"],
    ]


MARKED = ["cohere", "cohere2", "gemma", "gemma3", "llama3", "phi3", "phi3_5", "qwen2_5", "qwen3_instruct_2507", "lfm2"]


@pytest.mark.parametrize("name", MARKED)
def test_the_loss_is_where_a_template_that_marks_the_answers_has_it(name: str) -> None:
    def words(found: list[list[str]]) -> list[list[str]]:
        # White space around an answer is on one side of the mark or on the other.
        return [[piece.strip() for piece in sample] for sample in found]

    assert words(trained(name, TWO_TURNS)) == words(trained(f"{name}_training", TWO_TURNS))


@pytest.mark.parametrize("name", ["llama3_2", "gptoss"])
def test_a_template_that_prints_the_date_prints_the_same_one_always(name: str) -> None:
    tokenizer = tokenizer_of(name)
    (sample,) = encode(tokenizer, Conversation((QUESTION, ANSWER)))
    text = tokenizer.decode(sample.input_ids)
    assert "26 Jul 2024" in text or "2024-07-26" in text
    # Whoever renders it in this process: the evaluation's prompts too.
    assert text.startswith(str(tokenizer.apply_chat_template([QUESTION], tokenize=False)))
