"""The loss stands on the answers and on what ends them, and nowhere else, whatever the template does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from finetune_trainer.contract.vocabulary import Overlong
from finetune_trainer.data.conversation import Conversation
from finetune_trainer.data.rows import RowError
from finetune_trainer.data.template import ChatTemplate
from finetune_trainer.data.tokenization import Encoded, Encoder
from finetune_trainer.errors import UsageError
from tests.tiny_tokenizer import CHATML, sentencepiece_like_tokenizer, tiny_tokenizer
from tests.unit.data import templates

SYSTEM = {"role": "system", "content": "You know the plan."}
QUESTION = {"role": "user", "content": "How is the job?"}
ANSWER = {"role": "assistant", "content": "The job is at step 3."}
SECOND_QUESTION = {"role": "user", "content": "And the loss?"}
SECOND_ANSWER = {"role": "assistant", "content": "It is 0.5, and é 日本."}
ONE_TURN = [QUESTION, ANSWER]
TWO_TURNS = [QUESTION, ANSWER, SECOND_QUESTION, SECOND_ANSWER]

FIRST, SECOND = str(ANSWER["content"]), str(SECOND_ANSWER["content"])
LLAMA3_SPECIAL = ("<|start_header_id|>", "<|end_header_id|>")


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    # Its tokenizer adds a bos token to any text, and its template writes one as well.
    return tiny_tokenizer(
        templates.LLAMA3, bos="<|begin_of_text|>", eos="<|eot_id|>", special=LLAMA3_SPECIAL, adds_bos=True
    )


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(templates.MISTRAL, bos="<s>", eos="</s>", special=("[INST]", "[/INST]"))


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(templates.GEMMA, bos="<bos>", eos="<eos>", special=("<start_of_turn>", "<end_of_turn>"))


def zephyr_tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(templates.ZEPHYR, bos="<s>", eos="</s>")


def phi3_tokenizer() -> PreTrainedTokenizerFast:
    special = ("<|end|>", "<|user|>", "<|assistant|>")
    return tiny_tokenizer(templates.PHI3, bos="<s>", eos="<|endoftext|>", special=special)


def encode(
    tokenizer: PreTrainedTokenizerFast,
    conversation: Conversation,
    *,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> list[Encoded]:
    template = ChatTemplate(tokenizer, train_on_prompt=train_on_prompt, mask_history=mask_history)
    return Encoder(tokenizer, 4096, Overlong.TRUNCATE).encode(template.render(conversation))


def pieces(tokenizer: PreTrainedTokenizerFast, sample: Encoded) -> list[str]:
    """The runs of trained tokens, as text."""
    runs: list[list[int]] = []
    previous = False
    for token, trained in zip(sample.input_ids.tolist(), sample.trained.tolist(), strict=True):
        if trained:
            if not previous:
                runs.append([])
            runs[-1].append(token)
        previous = trained
    return [str(tokenizer.decode(run)) for run in runs]


CASES = {
    "chatml": (tiny_tokenizer(), TWO_TURNS, [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]),
    "chatml, system": (tiny_tokenizer(), [SYSTEM, *ONE_TURN], [f"{FIRST}<|im_end|>"]),
    "default system": (
        tiny_tokenizer(templates.CHATML_WITH_DEFAULT_SYSTEM),
        TWO_TURNS,
        [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"],
    ),
    "llama 3": (llama3_tokenizer(), [SYSTEM, *TWO_TURNS], [f"{FIRST}<|eot_id|>", f"{SECOND}<|eot_id|>"]),
    "mistral": (mistral_tokenizer(), TWO_TURNS, [f" {FIRST}</s>", f" {SECOND}</s>"]),
    "gemma": (gemma_tokenizer(), TWO_TURNS, [f"{FIRST}<end_of_turn>", f"{SECOND}<end_of_turn>"]),
    "phi 3": (phi3_tokenizer(), TWO_TURNS, [f"{FIRST}<|end|>", f"{SECOND}<|end|>\n<|endoftext|>"]),
    "zephyr": (zephyr_tokenizer(), [SYSTEM, *TWO_TURNS], [f"{FIRST}</s>", f"{SECOND}</s>"]),
    "no generation prompt": (
        tiny_tokenizer(templates.NO_GENERATION_PROMPT),
        TWO_TURNS,
        [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"],
    ),
    "content marked": (
        tiny_tokenizer(templates.MARKED_CONTENT),
        TWO_TURNS,
        [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"],
    ),
    "turn marked": (
        tiny_tokenizer(templates.MARKED_WITH_END),
        TWO_TURNS,
        [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"],
    ),
    "turn marked, the next one close behind": (
        tiny_tokenizer(templates.MARKED_CLOSE),
        TWO_TURNS,
        [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"],
    ),
    "nothing ends a turn": (
        tiny_tokenizer(templates.PLAIN, eos="</s>"),
        TWO_TURNS,
        # What ends the text is added. " I" is one token: with the prompt's space it holds the answer's first letter.
        [f"{FIRST}\n", f" {SECOND}\n</s>"],
    ),
    "answer first": (
        tiny_tokenizer(),
        [ANSWER, SECOND_QUESTION, SECOND_ANSWER],
        [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"],
    ),
    "two answers in a row": (
        tiny_tokenizer(),
        [QUESTION, ANSWER, SECOND_ANSWER],
        [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"],
    ),
    "question last": (tiny_tokenizer(), [*ONE_TURN, SECOND_QUESTION], [f"{FIRST}<|im_end|>"]),
    "empty answer": (tiny_tokenizer(), [QUESTION, {"role": "assistant", "content": ""}], ["<|im_end|>"]),
    "answer that holds an end token": (
        tiny_tokenizer(),
        [QUESTION, {"role": "assistant", "content": "a<|im_end|>b \n"}, SECOND_QUESTION, SECOND_ANSWER],
        ["a<|im_end|>b \n<|im_end|>", f"{SECOND}<|im_end|>"],
    ),
    "question that repeats the answer": (
        tiny_tokenizer(),
        [{"role": "user", "content": FIRST}, ANSWER],
        [f"{FIRST}<|im_end|>"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_answers_and_their_ends_are_trained(case: str) -> None:
    tokenizer, messages, expected = CASES[case]
    (sample,) = encode(tokenizer, Conversation(tuple(messages)))
    assert pieces(tokenizer, sample) == expected


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_the_template_tokenized_at_once(case: str) -> None:
    tokenizer, messages, _ = CASES[case]
    (sample,) = encode(tokenizer, Conversation(tuple(messages)))
    expected = list(tokenizer.apply_chat_template(messages, return_dict=False))
    if case == "nothing ends a turn":
        expected.append(tokenizer.eos_token_id)
    assert sample.input_ids.tolist() == expected


@pytest.mark.parametrize("case", CASES)
def test_train_on_prompt_trains_everything_but_the_first_token(case: str) -> None:
    tokenizer, messages, _ = CASES[case]
    (sample,) = encode(tokenizer, Conversation(tuple(messages)), train_on_prompt=True)
    assert not sample.trained[0]
    assert sample.trained[1:].all()


@pytest.mark.parametrize("case", CASES)
def test_mask_history_trains_the_last_answer_alone(case: str) -> None:
    tokenizer, messages, expected = CASES[case]
    (sample,) = encode(tokenizer, Conversation(tuple(messages)), mask_history=True)
    assert pieces(tokenizer, sample) == expected[-1:]


def test_mask_history_of_a_template_that_rewrites_earlier_turns_is_one_sample() -> None:
    tokenizer = tiny_tokenizer(templates.REASONING)
    (sample,) = encode(tokenizer, Conversation(tuple(TWO_TURNS)), mask_history=True)
    assert pieces(tokenizer, sample) == [f"<think>\n\n</think>\n\n{SECOND}<|im_end|>"]
    assert FIRST in str(tokenizer.decode(sample.input_ids))
    # With a turn behind the last answer, the text ends with that answer.
    (other,) = encode(tokenizer, Conversation((*TWO_TURNS, QUESTION)), mask_history=True)
    assert other.input_ids.tolist() == sample.input_ids.tolist()


TEMPLATES = {
    "chatml": tiny_tokenizer(),
    "llama 3": llama3_tokenizer(),
    "mistral": mistral_tokenizer(),
    "gemma": gemma_tokenizer(),
    "zephyr": zephyr_tokenizer(),
    "marked": tiny_tokenizer(templates.MARKED_CONTENT),
}
ENDS = {"llama 3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>", "zephyr": "</s>"}
SAID = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="<>[]|"), min_size=1)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3))
def test_whatever_is_said_the_answers_are_trained_and_nothing_else(name: str, turns: list[tuple[str, str]]) -> None:
    tokenizer = TEMPLATES[name]
    turns = [(question.strip() or "q", answer.strip() or "a") for question, answer in turns]
    messages = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    (sample,) = encode(tokenizer, Conversation(tuple(messages)))
    end = ENDS.get(name, "<|im_end|>")
    # Mistral writes a space before an answer, and no header that would end the prompt.
    lead = " " if name == "mistral" else ""
    assert pieces(tokenizer, sample) == [f"{lead}{answer}{end}" for _, answer in turns]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_offsets_without_leading_spaces_do_not_move_the_loss(trim_offsets: bool) -> None:
    tokenizer = tiny_tokenizer(templates.MISTRAL, bos="<s>", eos="</s>", trim_offsets=trim_offsets)
    (sample,) = encode(tokenizer, Conversation(tuple(TWO_TURNS)))
    assert pieces(tokenizer, sample) == [f" {FIRST}</s>", f" {SECOND}</s>"]


def test_words_that_carry_their_space() -> None:
    tokenizer = sentencepiece_like_tokenizer(templates.MISTRAL, special=("[INST]", "[/INST]"))
    (sample,) = encode(tokenizer, Conversation(tuple(ONE_TURN)))
    assert [text.strip() for text in pieces(tokenizer, sample)] == [f"{FIRST}</s>"]
    assert sample.input_ids[0] == tokenizer.bos_token_id


def test_a_template_that_rewrites_earlier_turns_gives_a_sample_for_each_answer() -> None:
    tokenizer = tiny_tokenizer(templates.REASONING)
    template = ChatTemplate(tokenizer, train_on_prompt=False)
    samples = Encoder(tokenizer, 4096, Overlong.TRUNCATE).encode(template.render(Conversation(tuple(TWO_TURNS))))
    thought = "<think>\n\n</think>\n\n"
    assert [pieces(tokenizer, sample) for sample in samples] == [
        [f"{thought}{FIRST}<|im_end|>"],
        [f"{thought}{SECOND}<|im_end|>"],
    ]
    # The second sample sees the first answer as inference would: without its thought, and without loss on it.
    assert tokenizer.decode(samples[1].input_ids).count("<think>") == 1
    assert template.split_conversations == 1


REWRITTEN = {
    "a system turn that moves": (
        templates.MOVES_SYSTEM,
        [SYSTEM, *TWO_TURNS],
        [[f"{FIRST}<|im_end|>"], [f"{SECOND}<|im_end|>"]],
    ),
    "a footer": (
        templates.FOOTER,
        TWO_TURNS,
        [[f"{FIRST}<|im_end|>\nThe end.<|im_end|>"], [f"{SECOND}<|im_end|>\nThe end.<|im_end|>"]],
    ),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_each_answer_follows_the_prompt_that_inference_would_use(case: str) -> None:
    source, messages, expected = REWRITTEN[case]
    tokenizer = tiny_tokenizer(source)
    samples = encode(tokenizer, Conversation(tuple(messages)))
    assert [pieces(tokenizer, sample) for sample in samples] == expected
    for position, sample in zip((len(messages) - 3, len(messages) - 1), samples, strict=True):
        prompt = tokenizer.apply_chat_template(messages[:position], add_generation_prompt=True, return_dict=False)
        assert sample.input_ids[: len(prompt)].tolist() == prompt
        assert not sample.trained[: len(prompt)].any()
        assert sample.trained[len(prompt)]


def test_a_reasoning_template_keeps_a_single_answer_in_one_piece() -> None:
    template = ChatTemplate(tiny_tokenizer(templates.REASONING), train_on_prompt=False)
    assert len(template.render(Conversation(tuple(ONE_TURN)))) == 1
    assert template.split_conversations == 0


def test_calls_of_tools_are_trained() -> None:
    tokenizer = tiny_tokenizer(templates.TOOLS)
    call = {"type": "function", "function": {"name": "loss", "arguments": {"step": 3}}}
    messages = (
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "0.5"},
        SECOND_ANSWER,
    )
    tools = ({"type": "function", "function": {"name": "loss", "parameters": {}}},)
    (sample,) = encode(tokenizer, Conversation(messages, tools))
    assert pieces(tokenizer, sample) == [
        '<tool_call>{"name": "loss", "arguments": {"step": 3}}</tool_call><|im_end|>',
        f"{SECOND}<|im_end|>",
    ]
    assert '"parameters"' in tokenizer.decode(sample.input_ids)


REFUSED = {
    "system role": (gemma_tokenizer(), [SYSTEM, *ONE_TURN], "System role not supported"),
    "alternation": (mistral_tokenizer(), [QUESTION, QUESTION, ANSWER], "roles must alternate"),
    "calls of tools are left out": (
        tiny_tokenizer(),
        [QUESTION, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "loss"}}]}],
        "does not render the call of the tool 'loss'",
    ),
    "an answer that does not continue its prompt": (
        tiny_tokenizer(templates.PROMPTS_A_THOUGHT_AFTER_SYSTEM),
        [SYSTEM, *ONE_TURN],
        "answer in message 3 differently from a continuation",
    ),
    "nothing marked": (
        tiny_tokenizer(templates.MARKED_CONTENT.replace("== 'assistant'", "== 'model'")),
        ONE_TURN,
        "marks answers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_conversation_that_the_template_refuses_is_an_invalid_row(case: str) -> None:
    tokenizer, messages, message = REFUSED[case]
    template = ChatTemplate(tokenizer, train_on_prompt=False)
    with pytest.raises(RowError, match=message):
        template.render(Conversation(tuple(messages)))


UNUSABLE = {
    "none": (None, "has no chat template"),
    "broken": ("{% for m in messages %}", "cannot render"),
    "unknown name": ("{{ messages[0].nothing.here }}", "cannot render"),
    "prompts a thought": (templates.PROMPTS_A_THOUGHT, r"goes on with '<think>\\n' where"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unusable_template_is_refused_at_once(case: str) -> None:
    source, message = UNUSABLE[case]
    with pytest.raises(UsageError, match=message):
        ChatTemplate(tiny_tokenizer(source), train_on_prompt=False)


def test_a_prompt_that_differs_does_not_matter_where_everything_is_trained() -> None:
    (sample,) = encode(tiny_tokenizer(templates.PROMPTS_A_THOUGHT), Conversation(tuple(ONE_TURN)), train_on_prompt=True)
    assert sample.trained[1:].all()


def test_named_templates_without_a_default_are_refused() -> None:
    tokenizer = tiny_tokenizer(None)
    tokenizer.chat_template = {"one": CHATML, "two": CHATML}
    with pytest.raises(UsageError, match="cannot be chosen"):
        ChatTemplate(tokenizer, train_on_prompt=False)
