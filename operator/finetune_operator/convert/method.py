"""The model, and how it is tuned."""

from __future__ import annotations

import re

from finetune_operator.convert.draft import Draft, number, text, whole, words

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_QUANTIZED = re.compile(r"(gptq|awq|aqlm|-int4|-int8|hqq|eetq)(?![a-z])", re.IGNORECASE)
_ALSO = {"embed_tokens": "embeddings", "wte": "embeddings", "word_embeddings": "embeddings", "embed_in": "embeddings"}
_VARIANTS = {"use_dora": "dora", "pissa_init": "pissa", "loraplus_lr_ratio": "lora+", "use_rslora": "rslora"}


def carry_model(draft: Draft) -> None:
    """Where the model is, and its revision."""
    name = draft.read("model_name_or_path", text)
    if name is None:
        draft.put("model.uri", "")
        draft.hand("model_name_or_path", "is not set; name the model", "model.uri")
    elif "://" in name:
        draft.carry("model_name_or_path", "model.uri", name)
    elif _HUB_NAME.fullmatch(name):
        draft.carry("model_name_or_path", "model.uri", f"hf://{name}")
    else:
        draft.put("model.uri", file_uri(name))
        draft.hand(
            "model_name_or_path",
            "a path on your machine, good for `finetune run`; a cluster needs hf://, s3:// or pvc://",
            "model.uri",
        )
    if name is not None and _QUANTIZED.search(name):
        draft.hand(
            "model_name_or_path",
            "looks quantized already, which cannot be trained here; name the original, with method qlora",
            "model.uri",
        )
    revision = draft.read("model_revision", text)
    if revision == "main":
        draft.ours("model_revision", "the newest; what was loaded is recorded in the result")
    elif revision is not None:
        draft.carry("model_revision", "model.revision", revision)


def file_uri(path: str) -> str:
    """A path as a `file:` URI: relative to the manifest, or absolute."""
    return f"file://{path}" if path.startswith("/") else f"file:{path.removeprefix('./')}"


def carry_method(draft: Draft) -> str:
    """Method, layers, adapters, quantization; the method's name."""
    kind = draft.read("finetuning_type", text)
    method = kind or "lora"
    bits = draft.read("quantization_bit", whole)
    if method == "lora" and bits is not None:
        method = "qlora"
    draft.put("method", method)
    if kind in ("full", "freeze", "lora"):
        draft.carry("finetuning_type", "method", method)
    elif kind is not None:
        draft.hand("finetuning_type", "no such method here; lora is the nearest to oft", "method")
    if method == "freeze":
        _freeze(draft)
    elif method in ("lora", "qlora"):
        _lora(draft, method)
    if method == "qlora":
        _quantization(draft, bits or 4)
    elif bits is not None:
        draft.hand("quantization_bit", f"{method} cannot train a quantized base; not carried", "method")
    return method


def _freeze(draft: Draft) -> None:
    if draft.is_on("use_llama_pro"):
        draft.put("layers", {})
        draft.hand(
            "use_llama_pro",
            "trains every n-th block, where n is the model's number of blocks divided by freeze_trainable_layers; set "
            "layers.every to n",
            "layers",
        )
        draft.hand("freeze_trainable_layers", "see use_llama_pro", "layers")
    else:
        _freeze_layers(draft)
    _modules(draft, "freeze_trainable_modules")
    _also(draft, "freeze_extra_modules")


def _freeze_layers(draft: Draft) -> None:
    count = draft.read("freeze_trainable_layers", whole)
    if count is None:
        draft.assume("freeze_trainable_layers", "layers.last", 2)
    elif count == 0:
        draft.put("layers", {})
        draft.hand("freeze_trainable_layers", "0 trains no block; set one of last, first, ids, every, all", "layers")
    else:
        draft.carry("freeze_trainable_layers", "layers.last" if count > 0 else "layers.first", abs(count))


def _modules(draft: Draft, option: str) -> None:
    found = draft.read(option, words)
    if found is None:
        return
    if "all" in found:
        draft.ours(option, "all that the method can train")
        return
    outside = [name for name in found if name.rpartition(".")[2] in {*_ALSO, "lm_head"}]
    inside = [name for name in found if name not in outside]
    if inside:
        draft.carry(option, "layers.modules", inside)
    if outside:
        draft.hand(
            option,
            f"{', '.join(outside)}: not part of a block; adapters go on blocks only, layers.also trains it in full",
            "layers",
        )


def _also(draft: Draft, option: str) -> None:
    found = draft.read(option, words)
    if found is not None:
        draft.carry(option, "layers.also", [_ALSO.get(name, name) for name in found])


def _lora(draft: Draft, method: str) -> None:
    draft.carry_or_assume("lora_rank", "lora.rank", whole, 8)
    draft.carry_given("lora_alpha", "lora.alpha", whole)
    draft.carry_given("lora_dropout", "lora.dropout", number)
    _modules(draft, "lora_target")
    _also(draft, "additional_target")
    _variant(draft, method)
    if draft.is_on("use_llama_pro"):
        draft.hand("use_llama_pro", "puts adapters on every n-th block only; set layers.every", "layers")


def _variant(draft: Draft, method: str) -> None:
    ratio = draft.read("loraplus_lr_ratio", number)
    wanted = [name for name in _VARIANTS if (ratio is not None if name == "loraplus_lr_ratio" else draft.is_on(name))]
    for option in _VARIANTS:
        if option in draft.options and option not in wanted:
            draft.ours(option, "off")
    if not wanted:
        return
    first, *others = wanted
    draft.carry(first, "lora.variant", _VARIANTS[first])
    if first == "loraplus_lr_ratio":
        draft.put("lora.learningRateRatio", ratio)
    for option in others:
        draft.hand(option, f"an adapter has one variant here, and {_VARIANTS[first]} was taken", "lora.variant")
    if first == "pissa_init" and method == "qlora":
        draft.hand("pissa_init", "does not start on a quantized base; loftq is meant for that", "lora.variant")


def _quantization(draft: Draft, bits: int) -> None:
    kind = draft.read("quantization_type", text)
    library = (draft.read("quantization_method", text) or "bnb").lower()
    type_ = (kind or "nf4") if bits == 4 else "int8" if bits == 8 else f"{bits}-bit"
    draft.carry("quantization_bit", "quantization.type", type_)
    if bits not in (4, 8):
        draft.hand("quantization_bit", "choose nf4, fp4, int8 or fp8", "quantization.type")
    if kind is not None and bits == 4:
        draft.carry("quantization_type", "quantization.type", kind)
    if library in ("bnb", "bitsandbytes"):
        if "quantization_method" in draft.options:
            draft.ours("quantization_method", "bitsandbytes")
    else:
        draft.hand("quantization_method", "not here; bitsandbytes' type of as many bits was taken", "quantization.type")
    if "double_quantization" in draft.options:
        draft.carry("double_quantization", "quantization.doubleQuant", draft.is_on("double_quantization"))
    precision = {"bf16": "bfloat16", "fp16": "float16"}.get(draft.spec["training"]["precision"], "float32")
    if bits == 4:
        draft.put("quantization.computeDtype", precision)
