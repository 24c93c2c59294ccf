"""Reading a base model: its configuration and tokenizer first, its weights only when everything else was checked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune_trainer.contract import MAX_BLOCKS, ModelLayout, Selection, TrainerConfig
from finetune_trainer.contract.heads import outputs_of
from finetune_trainer.contract.vocabulary import Method, Precision
from finetune_trainer.errors import InputMissing, UsageError
from finetune_trainer.heads.module import classifier_options, install_head
from finetune_trainer.methods.qlora import prepare_quantized, quantization_of

# What a library makes of a file that is not what it should be is whatever Python raises for the expression.
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    StrictDataclassError,
)

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float32}


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's `config.json`.

    Raises InputMissing where there is none or no safetensors weights, and UsageError where transformers cannot use it.
    """
    if not (folder / "config.json").is_file():
        raise InputMissing(f"spec.model.uri: no config.json in {folder.name}; name the folder of a transformers model")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        found = f"only pickled weights ({pickles[0]}), which may run code when read" if pickles else "no weights"
        raise InputMissing(
            f"spec.model.uri: {folder.name} has {found}; save the model with save_pretrained, which writes safetensors"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)  # nosec B615  # a folder
    except UNREADABLE as error:
        raise UsageError(f"spec.model.uri: transformers cannot read config.json of {folder.name}: {error}") from error
    assert isinstance(config, PreTrainedConfig)
    blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(blocks, int) and blocks > MAX_BLOCKS:
        raise UsageError(f"spec.model.uri: config.json says {blocks} blocks; at most {MAX_BLOCKS} are built")
    if config.is_encoder_decoder:
        raise UsageError(
            f"spec.model.uri: {config.model_type} is an encoder-decoder; use a decoder-only language model"
        )
    return config


def empty_model(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without memory behind its tensors.

    Raises UsageError where transformers has no causal language model for this configuration.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise UsageError(f"spec.model.uri: no language model can be built from its config.json: {error}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token: its own, or the end-of-text token, which is masked where it pads.

    Raises InputMissing where there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)  # nosec B615  # a folder
    except Exception as error:
        # The tokenizers library raises Exception itself, and nothing narrower.
        if type(error) is not Exception and not isinstance(error, UNREADABLE):
            raise
        raise InputMissing(f"spec.model.uri: no usable tokenizer in {folder.name}: {error}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"spec.model.uri: the tokenizer of {folder.name} has no end-of-text token; set eos_token in it"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    folder: Path,
    config: TrainerConfig,
    layout: ModelLayout,
    selection: Selection,
    device: torch.device,
    classes: Sequence[str] = (),
) -> PreTrainedModel:
    """The model with its weights on a device, in the precision that the method wants of them.

    For a strategy that divides the weights that is the CPU of each process. What is not changed of them is the files'
    own pages, which the processes of a node share.

    Frozen weights are kept in the training's precision, quantized for QLoRA; weights that are trained themselves in
    fp32, read without a detour over fewer bits. `classes` are those of a head. Raises GPU memory errors of torch as
    they are.
    """
    kind: Any = AutoModelForCausalLM if config.head is None else AutoModelForSequenceClassification
    frozen = DTYPES[config.training.precision]
    options: dict[str, Any] = {"dtype": "auto" if config.method.trains_base_weights else frozen}
    if config.method is Method.QLORA:
        assert config.quantization is not None, "check_method has seen to it"
        # What shards weights wants them in a floating-point type; packed 4-bit weights are indifferent to it.
        storage = frozen if config.parallelism.divides_weights else torch.uint8
        options["quantization_config"] = quantization_of(config.quantization, layout, selection, storage)
    if config.head is not None:
        options |= classifier_options(config.head, classes)
    try:
        model = kind.from_pretrained(
            folder,
            use_safetensors=True,
            device_map={"": str(device)},
            trust_remote_code=config.model.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputMissing(f"spec.model.uri: the weights in {folder.name} cannot be read: {error}") from error
    assert isinstance(model, PreTrainedModel)
    if config.parallelism.divides_weights:
        # It will not stay where it was loaded: accelerate's hooks would bring its inputs back there.
        remove_hook_from_module(model, recurse=True)
        model.__dict__.pop("hf_device_map", None)
    if config.method is Method.QLORA:
        prepare_quantized(model, selection.adapted)
    if config.head is not None:
        install_head(model, config.head, outputs_of(config.head, classes))
    if config.method.trains_base_weights:
        set_precision(model, trained=selection.parameters, frozen=frozen)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def set_precision(model: PreTrainedModel, trained: Collection[str], frozen: torch.dtype) -> None:
    """Widen the trained parameters to fp32 and bring the others to the frozen precision. Ties stay."""
    wanted = set(trained)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name in wanted else frozen)


def autocast(config: TrainerConfig, device: torch.device) -> torch.autocast:
    """The arithmetic of forward passes outside the trainer: the same as within it."""
    dtype = DTYPES[config.training.precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the model's own settings, and the tokenizer's end-of-text token."""
    settings = getattr(model, "generation_config", None)
    own = getattr(settings, "eos_token_id", None)
    known = own if isinstance(own, list) else [] if own is None else [own]
    assert isinstance(tokenizer.eos_token_id, int), "read_tokenizer has seen to it"
    return sorted({*known, tokenizer.eos_token_id})
