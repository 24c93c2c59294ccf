"""A byte-level BPE tokenizer of 320 tokens, trained on a few lines, with whatever special tokens and template."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "How do I see the status of a fine-tuning job?",
    "The status of the job says which step it is at, and what the loss is.",
    "Ask the operator for the plan: the plan says how much memory each GPU needs.",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(
    template: str | None = CHATML,
    *,
    bos: str = "<|im_start|>",
    eos: str = "<|im_end|>",
    special: Sequence[str] = (),
    adds_bos: bool = False,
    trim_offsets: bool = False,
) -> PreTrainedTokenizerFast:
    """Ids: padding 0, bos 1, eos 2, then `special`, bytes and merges, 320 at most. Nothing is downloaded."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    _train(backend, bos, eos, special, pre_tokenizers.ByteLevel.alphabet())
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    return _wrapped(backend, template, bos, eos)


def sentencepiece_like_tokenizer(template: str, *, special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma have it: words carry their space as a leading U+2581, and there are no bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(Regex(" "), "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = sorted({chr(code) for code in range(33, 127)} | {"\n"})
    _train(backend, "<s>", "</s>", ["<unk>", *special], alphabet)
    return _wrapped(backend, template, "<s>", "</s>")


def _train(backend: Tokenizer, bos: str, eos: str, special: Sequence[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=320, show_progress=False, special_tokens=["<pad>", bos, eos, *special], initial_alphabet=alphabet
    )
    backend.train_from_iterator(CORPUS, trainer)


def _wrapped(backend: Tokenizer, template: str | None, bos: str, eos: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer
