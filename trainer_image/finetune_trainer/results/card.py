"""The model card of a result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.vocabulary import LoraVariant
from finetune_trainer.results.artefact import BaseReference, artifact_of


def write_card(
    folder: Path,
    config: TrainerConfig,
    base: BaseReference,
    metrics: Mapping[str, Mapping[str, float]],
    notes: tuple[str, ...],
) -> None:
    """`README.md`: what this is, how to load it, and what was measured."""
    kind = artifact_of(config.method)
    loading = {
        "adapter": (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base.name}")\n'
            'model = PeftModel.from_pretrained(base, "adapter")'
        ),
        "delta": (
            "from pathlib import Path\n\nfrom finetune_trainer.results.delta import load_delta\n"
            "from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{base.name}")\nload_delta(model, Path("delta"))'
        ),
        "model": (
            'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("model")'
        ),
    }[kind]
    lines = [
        f"# {config.job.name}",
        "",
        f"`{base.uri}`{f' at {base.revision}' if base.revision else ''}, tuned with method {config.method}.",
        "",
        "```python",
        loading,
        "```",
        "",
    ]
    if metrics:
        names = sorted({name for values in metrics.values() for name in values})
        lines += [f"| held-out | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for who, values in metrics.items():
            lines.append(f"| {who} | {' | '.join(f'{values[n]:.4g}' if n in values else '' for n in names)} |")
        lines.append("")
    lines += [f"- {note}" for note in notes]
    if config.lora is not None and config.method.uses_lora and config.lora.variant is not LoraVariant.STANDARD:
        lines.append(f"- Trained as {config.lora.variant}.")
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
