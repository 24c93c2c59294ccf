"""Prefix, prompt, LLaMA-Adapter and (IA)3: their sizes, what they start from, and that they learn, load and go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_trainer.contract import select
from finetune_trainer.contract.vocabulary import Method
from finetune_trainer.errors import UsageError
from finetune_trainer.layers import layout_of
from finetune_trainer.methods import apply_method, check_method
from finetune_trainer.methods.lora import quiet_peft
from finetune_trainer.results.artefact import export
from finetune_trainer.results.verify import verify_loads
from tests.tiny_models import meta_model, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer
from tests.trainer_jobs import fit, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder
from tests.unit.trainer_core.test_exactness import quick
from tests.unit.trainer_core.test_export import BASE

IDS = torch.arange(3, 15)[None]
HIDDEN, BLOCKS, KEYS = 64, 4, 32


@pytest.mark.parametrize(
    ("method", "prompt", "layers", "count"),
    [
        ("prompt", {"virtual_tokens": 5}, None, 5 * HIDDEN),
        ("prefix", {"virtual_tokens": 7}, None, 7 * BLOCKS * 2 * KEYS),
        (
            "prefix",
            {"virtual_tokens": 7, "projection": True, "projection_size": 24},
            None,
            # The embedding, and an MLP of the two layers with biases.
            7 * KEYS + (KEYS * 24 + 24) + (24 * BLOCKS * 2 * KEYS + BLOCKS * 2 * KEYS),
        ),
        ("adapter", {"virtual_tokens": 3}, {"last": 2}, 2 * (3 * HIDDEN + 1)),
    ],
)
def test_sizes_are_the_jobs(method: str, prompt: dict[str, Any], layers: dict[str, Any] | None, count: int) -> None:
    model = tiny_model()
    layout = layout_of(model)
    config = trainer_config(Path("m"), Path("d"), method=method, prompt=prompt, layers=layers)
    tuned = apply_method(model, layout, select(layout, Method(method), config.layers), config)
    assert tuned.trainable == count


def test_a_prompt_may_start_from_tokens_of_the_vocabulary() -> None:
    rows = []
    for initialization in ("random", "vocabulary"):
        model = tiny_model()
        layout = layout_of(model)
        prompt = {"virtual_tokens": 4, "initialization": initialization}
        config = trainer_config(Path("m"), Path("d"), method="prompt", prompt=prompt)
        tuned = apply_method(model, layout, select(layout, Method.PROMPT, None), config)
        (trained,) = (p.detach() for p in tuned.model.parameters() if p.requires_grad)
        words = model.get_input_embeddings().weight.detach()
        rows.append([bool((words == position).all(1).any()) for position in trained])
    assert rows == [[False] * 4, [True] * 4]


@pytest.mark.parametrize(
    ("method", "prompt", "layers", "rate"),
    [
        ("prompt", {"virtual_tokens": 4, "initialization": "vocabulary"}, None, 0.1),
        ("prefix", {"virtual_tokens": 4}, None, 0.1),
        ("prefix", {"virtual_tokens": 4, "projection": True, "projection_size": 16}, None, 0.01),
        ("adapter", {"virtual_tokens": 4}, {"last": 3}, 0.1),
        ("ia3", None, {"ids": [1, 2]}, 0.1),
    ],
)
def test_they_learn_load_and_go_on(
    method: str,
    prompt: dict[str, Any] | None,
    layers: dict[str, Any] | None,
    rate: float,
    model_folder: ModelFolder,
    tmp_path: Path,
) -> None:
    base = model_folder()
    training = {"max_steps": 8, "learning_rate": rate, "batch_size": 8, "micro_batch_size": 8}
    changes = {"prompt": prompt} if prompt is not None else {}
    config = quick(method, layers, training=training, checkpoints={"every": 4, "unit": "step"}, **changes)
    whole = fit(base, config, tmp_path / "whole")
    assert whole.losses[-1] < 0.99 * whole.losses[0]
    trained = {name for name, p in whole.tuned.model.named_parameters() if p.requires_grad}
    assert whole.changed() == trained
    again = fit(base, config, tmp_path / "again", resume=tmp_path / "whole" / "checkpoint-4")
    assert again.losses[-4:] == whole.losses[-4:]

    target = export(whole.tuned, whole.layout, config, tiny_tokenizer(), BASE, tmp_path / "out")
    verify_loads(target, "adapter", whole.layout, AutoConfig.from_pretrained(base))
    with quiet_peft():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), target).eval()
        whole.tuned.model.eval()
        expected = whole.tuned.model(input_ids=IDS).logits
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["prefix", "prompt", "adapter"])
def test_sizes_have_to_be_there(method: str) -> None:
    config = trainer_config(Path("m"), Path("d"), method=method, prompt=None)
    with pytest.raises(UsageError, match=rf"spec\.prompt: method {method} needs it; set virtualTokens"):
        check_method(config, layout_of(meta_model()), "llama")


@pytest.mark.parametrize("method", ["prefix", "adapter"])
def test_who_cannot_recompute_is_told_a_value_of_the_field(method: str) -> None:
    training = {"gradient_checkpointing": True}
    config = trainer_config(Path("m"), Path("d"), method=method, prompt={"virtual_tokens": 4}, training=training)
    with pytest.raises(UsageError, match=r"spec\.training\.gradientCheckpointing: .*; set it to never$"):
        check_method(config, layout_of(meta_model()), "llama")
