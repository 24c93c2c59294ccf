"""Models with random weights and data of known lengths. Nothing is downloaded."""

from __future__ import annotations

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from bench.trainer.shapes import SHAPES, Shape

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")
ROLES = ("user", "assistant", "<unk>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
PROMPT_TOKENS = 64
MEAN_TOKENS = 350
"""Of a log-normal distribution (sigma 0.9) of which what is shorter than 24 or longer than 2,010 is left out; what
remains has 330 on average."""
_SHARD_BYTES = 2 * 2**30
_WRITERS = 4


def write_model(folder: Path, name: str) -> Path:
    """A checkpoint of a shape in bf16, made on the GPU where there is one, with a tokenizer of one token a word."""
    if (folder / "config.json").exists():
        return folder
    shape = SHAPES[name]
    config = LlamaConfig(**shape.config(), dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number, size = 1, 0
    with ThreadPoolExecutor(_WRITERS) as writers:
        written = []
        for path, parameter in empty.named_parameters():
            if "norm" in path:
                tensor = torch.ones(parameter.shape, dtype=torch.bfloat16)
            else:
                tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                tensor = tensor.normal_(0, config.initializer_range, generator=generator).cpu()
            if shard and size + tensor.nbytes > _SHARD_BYTES:
                written.append(writers.submit(_write_shard, folder, number, shard, index))
                number, size, shard = number + 1, 0, {}
            shard[path] = tensor
            size += tensor.nbytes
        written.append(writers.submit(_write_shard, folder, number, shard, index))
    for writing in written:
        writing.result()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    tokenizer(shape).save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def _write_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor], index: dict[str, str]) -> None:
    name = f"model-{number:05}.safetensors"
    save_file(tensors, folder / name, metadata={"format": "pt"})
    index |= dict.fromkeys(tensors, name)


def tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """One token a word: `w0`, `w1` and so on."""
    words = [*SPECIAL, *ROLES, *(f"w{number}" for number in range(_words(shape)))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def _words(shape: Shape) -> int:
    return min(shape.vocabulary, 32_000) - len(SPECIAL) - len(ROLES)


def write_data(path: Path, kind: str, rows: int, length: int, shape: Shape) -> list[int]:
    """Questions and answers that fill so many rows of `length` tokens at least; the tokens of each sample, no more than
    `length`."""
    rng = random.Random(1234)
    lengths: list[int] = []
    with path.open("w", encoding="utf-8") as file:
        while sum(lengths) < rows * length:
            prompt, answer = _tokens(rng, kind, length)
            question, reply = (" ".join(f"w{rng.randrange(_words(shape))}" for _ in range(n)) for n in (prompt, answer))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            file.write(json.dumps({"messages": turns}) + "\n")
            # Three tokens of the template in each turn.
            lengths.append(min(length, prompt + answer + 6))
    return lengths


def _tokens(rng: random.Random, kind: str, length: int) -> tuple[int, int]:
    """Of a question, and of its answer."""
    scale = length / 2048
    if kind == "filled":
        return max(4, int(PROMPT_TOKENS * scale)), length + 8
    sigma = 0.9
    while True:
        total = int(rng.lognormvariate(math.log(MEAN_TOKENS * scale) - sigma**2 / 2, sigma))
        if max(8, 24 * scale) <= total <= 2010 * scale:
            break
    prompt = max(3, int(total * rng.uniform(0.1, 0.4)))
    return prompt, total - prompt
