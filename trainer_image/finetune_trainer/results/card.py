"""The model card of a result (`README.md`): what it is, how it is loaded, what it was made of and how good it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from finetune_trainer.contract import ResultManifest, TrainerConfig
from finetune_trainer.contract.vocabulary import LoraVariant, Method

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Adapter ranks that vLLM reserves room for."""
_NOT_MERGED = (Method.PREFIX, Method.PROMPT, Method.ADAPTER, Method.HEAD)
"""Methods whose results are no change of the base's weights."""


def write_card(folder: Path, result: ResultManifest, config: TrainerConfig) -> None:
    """Write the card of what lies in `folder`. Everything in it stands in the manifest, too."""
    sections = [
        _header(result, config),
        [f"# {config.job.name}", "", _summary(result)],
        ["## How to load it", "", *_loading(result, config)],
        ["## Results", "", *_evaluation(result)] if result.evaluation is not None else [],
        ["## Data", "", *_data(result, config)],
        ["## Training", "", *_training(result, config)],
        ["## Good to know", "", *(f"- {note}" for note in _notes(result, config))],
        ["## Versions", "", ", ".join(f"{name} {number}" for name, number in result.versions.items())],
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections if lines)
    (folder / "README.md").write_text(text.rstrip() + "\n", encoding="utf-8")


def _header(result: ResultManifest, config: TrainerConfig) -> list[str]:
    """What model hubs read."""
    base = result.base_model
    header: dict[str, object] = {
        "base_model": base.uri.removeprefix("hf://"),
        "base_model_relation": "adapter" if result.artifact == "adapter" else "finetune",
        "library_name": "peft" if result.artifact == "adapter" else "transformers",
        "tags": ["finetune-operator", result.method],
    }
    if base.licence is not None and base.uri.startswith("hf://"):
        header["license"] = base.licence.split(",")[0]
    return ["---", yaml.safe_dump(header, sort_keys=True, allow_unicode=True).rstrip(), "---"]


def _summary(result: ResultManifest) -> str:
    base = result.base_model
    revision = f" at revision `{base.revision}`" if base.revision else ""
    share = 100 * result.trainable_parameters / result.total_parameters
    return (
        f"`{base.uri}`{revision} ({base.architecture}, {base.parameters:,} parameters), tuned with method"
        f" **{result.method}**: {result.trainable_parameters:,} parameters were trained ({share:.3g} %)."
    )


def _loading(result: ResultManifest, config: TrainerConfig) -> list[str]:
    base = _loadable(result.base_model.uri)
    if config.head is not None:
        return [
            "```python",
            "from pathlib import Path\n\nfrom finetune_trainer.heads import load_classifier\n"
            "from transformers import AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("delta")\n'
            f'model = load_classifier("{base}", Path("delta"))',
            "```",
        ]
    code = {
        "adapter": (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("adapter")\n'
            f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")\n'
            'model = PeftModel.from_pretrained(base, "adapter")'
        ),
        "delta": (
            "from safetensors.torch import load_file\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("delta")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")\n'
            "# The delta holds the changed tensors and nothing else.\n"
            'unknown = model.load_state_dict(load_file("delta/delta.safetensors"), strict=False).unexpected_keys\n'
            'assert not unknown, f"not the base of this delta: {unknown}"'
        ),
        "model": (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("model")\n'
            'model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")'
        ),
    }[result.artifact]
    return ["```python", code, "```", "", *_serving(result, config, base)]


def _loadable(uri: str) -> str:
    """What transformers takes: a name on the hub or a folder; `base` stands for a copy of what lies elsewhere."""
    scheme, _, rest = uri.partition("://")
    return rest if scheme in ("hf", "file") else "base"


def _serving(result: ResultManifest, config: TrainerConfig, base: str) -> list[str]:
    if result.artifact == "model":
        return ["With vLLM: `vllm serve model`."]
    if result.merged is not None:
        return ["With vLLM: `vllm serve merged`, the stand-alone model beside this card."]
    obstacle = _vllm_obstacle(config)
    if obstacle is not None:
        if config.method in _NOT_MERGED:
            return [f"With vLLM: it does not serve {obstacle}."]
        into = " --into dequantized" if config.lora is not None and config.lora.variant is LoraVariant.LOFTQ else ""
        merged = f"`finetune merge {result.configuration['output']['uri']}/runs/{result.uid} -o merged{into}`"
        return [f"With vLLM: it does not serve {obstacle}. Make a stand-alone model of it: {merged}."]
    assert config.lora is not None
    rank = 2 * config.lora.rank if config.lora.variant in (LoraVariant.PISSA, LoraVariant.OLORA) else config.lora.rank
    room = next((size for size in _VLLM_RANKS if size >= rank), rank)
    return [
        "With vLLM:",
        "",
        "```sh",
        f"vllm serve {base} --enable-lora --max-lora-rank {room} --lora-modules {config.job.name}=adapter",
        "```",
    ]


def _vllm_obstacle(config: TrainerConfig) -> str | None:
    """What of this adapter vLLM refuses, by the checks of its PEFT helper; None where it serves it."""
    if config.lora is None or not config.method.uses_lora:
        return f"results of method {config.method}"
    if config.lora.variant is LoraVariant.DORA:
        return "DoRA adapters"
    if config.lora.variant is LoraVariant.LOFTQ:
        return "adapters that belong to a quantized base"
    if config.lora.variant is LoraVariant.EVA or config.lora.rank_pattern or config.lora.alpha_pattern:
        return "adapters with another rank or scale in each module"
    if config.lora.bias != "none":
        return "adapters with biases"
    if config.layers is not None and config.layers.also:
        return "adapters with whole modules beside them"
    return None


def _evaluation(result: ResultManifest) -> list[str]:
    assert result.evaluation is not None
    columns = {"base": result.evaluation.base, "tuned": result.evaluation.tuned}
    shown = {name: values for name, values in columns.items() if values is not None}
    rows = [[name, *(_number(values.get(name)) for values in shown.values())] for name in result.evaluation.tuned]
    return [
        *_table(["held-out data", *shown], rows),
        "",
        f"{result.evaluation.samples:,} held-out samples, {result.evaluation.tokens:,} tokens.",
    ]


def _data(result: ResultManifest, config: TrainerConfig) -> list[str]:
    data = result.data
    sources = [
        f"- `{source.uri}`" + (f", weight {source.weight:g}" if source.weight != 1 else "")
        for source in config.dataset.sources
    ]
    return [
        *sources,
        "",
        f"Format {data.format}; {data.rows:,} rows, {data.samples:,} training samples, {data.tokens:,} tokens, of which"
        f" {data.trained_tokens:,} trained. SHA-256 of the files: `{data.sha256}`.",
    ]


def _training(result: ResultManifest, config: TrainerConfig) -> list[str]:
    training = config.training
    rows = [
        ["steps", f"{result.steps:,} ({result.epochs:.3g} epochs)"],
        ["final loss", _number(result.train_loss)],
        ["learning rate", f"{training.learning_rate:g}, {training.scheduler}"],
        ["batch", f"{training.batch_size} rows of at most {config.dataset.max_length:,} tokens"],
        ["optimizer", training.optimizer.value],
        ["precision", training.precision.value],
        ["seed", str(training.seed)],
    ]
    if config.lora is not None and config.method.uses_lora:
        rows.append(["LoRA", f"{config.lora.variant}, rank {config.lora.rank}, alpha {config.lora.alpha}"])
    if config.quantization is not None:
        rows.append(["base in training", config.quantization.type.value])
    return _table(["", ""], rows)


def _notes(result: ResultManifest, config: TrainerConfig) -> Iterable[str]:
    yield from result.notes
    if result.merged is not None:
        merged = result.merged
        yield (
            f"merged into {merged.into}: the largest difference of a logit to the adapter on the base that it was"
            f" trained on is {merged.largest_logit_difference:.3g} (the largest logit is {merged.largest_logit:.3g});"
            f" {100 * merged.same_first_choice:.4g} % of next tokens are the same, on random tokens"
        )
    licence = result.base_model.licence
    yield (
        f"the base model's licence binds this result, too: {licence}"
        if licence is not None
        else "the base model does not say what its licence is; look it up before you pass this result on"
    )
    yield "manifest.json lists every file with its SHA-256, and the whole configuration"


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
