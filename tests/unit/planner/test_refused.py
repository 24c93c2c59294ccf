"""Jobs that no plan can be made for: what is wrong with them, field by field."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.errors import DoesNotFit, NotSupported
from finetune_trainer.contract.vocabulary import Strategy
from tests.unit.planner.models import CACHED, OLD_CARD, planned


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"parallelism": {"strategy": "fsdp"}}, "spec.parallelism.strategy: fsdp divides a model among GPUs"),
        (
            {"parallelism": {"strategy": "fsdp"}, "training": {"optimizer": "adamw_8bit"}, "resources": {"gpus": 2}},
            "spec.training.optimizer: adamw_8bit does not know the sharded tensors of fsdp",
        ),
        ({"method": "prompt", "dataset": {"packing": True}}, "spec.dataset.packing: method prompt"),
        ({"method": "prefix", "training": {"gradientCheckpointing": "always"}}, "spec.training.gradientCheckpointing"),
        ({"method": "ia3", "layers": {"also": ["norm"]}}, "spec.layers.also: method ia3"),
        ({"method": "adapter", "layers": {"first": 2}}, "spec.layers.first: method adapter"),
        ({"method": "qlora", "lora": {"variant": "pissa"}}, "spec.lora.variant: pissa"),
        (
            {"training": {"objective": "dpo", "torchCompile": "always"}},
            "spec.training.torchCompile: objective dpo is not compiled",
        ),
        ({"method": "head", "training": {"flashAttn": "varlen"}}, "spec.training.flashAttn: method head"),
        ({"method": "head", "training": {"flashAttn": "flex"}}, "spec.training.flashAttn: method head"),
        (
            {"resources": {"gpus": 0}, "training": {"flashAttn": "flex", "precision": "fp32"}},
            "spec.training.flashAttn: flex needs a GPU",
        ),
        *(
            (
                {"parallelism": {"strategy": strategy}, "resources": {"gpus": 2}, "training": {field: value}},
                f"spec.training.{field}: {value} cannot be {verb}: strategy {strategy} has none of the fast paths;"
                f" use auto or {other}, or strategy ddp",
            )
            for strategy in ("deepspeed", "fsdp")
            for field, value, verb, other in (
                ("torchCompile", "always", "kept", "never"),
                ("flashAttn", "varlen", "used", "sdpa"),
                ("fuseAdapters", "always", "kept", "never"),
            )
        ),
        (
            {"method": "prompt", "training": {"torchCompile": "always"}},
            "spec.training.torchCompile: always cannot be kept: method prompt adds positions of its own",
        ),
        (
            {"method": "qlora", "quantization": {"type": "int8"}, "training": {"torchCompile": "always"}},
            "spec.training.torchCompile: always cannot be kept: products with an int8 base are not compiled; use auto",
        ),
        (
            {"training": {"neftuneAlpha": 5, "flashAttn": "flex"}},
            "spec.training.flashAttn: flex cannot be used: NEFTune",
        ),
        (
            {"method": "full", "training": {"fuseAdapters": "always"}},
            "spec.training.fuseAdapters: always cannot be kept",
        ),
        ({"lora": {"dropout": 0.1}, "training": {"fuseAdapters": "always"}}, "with lora.dropout each adapter has"),
        ({"method": "head", "training": CACHED}, "spec.training.cacheFrozenPrefix: method head runs all blocks"),
        (
            {"training": {"objective": "dpo", **CACHED}},
            "spec.training.cacheFrozenPrefix: objective dpo runs all blocks in every epoch; or use auto or never",
        ),
        ({"method": "prompt", "training": CACHED}, "spec.training.cacheFrozenPrefix: method prompt adds positions"),
        (
            {"parallelism": {"strategy": "fsdp"}, "resources": {"gpus": 2}, "training": CACHED},
            "spec.training.cacheFrozenPrefix: strategy fsdp runs all blocks in every epoch; use strategy ddp",
        ),
        ({"training": {"neftuneAlpha": 5, **CACHED}}, "spec.training.cacheFrozenPrefix: NEFTune's noise"),
        (
            {"training": {"epochs": 1.5, **CACHED}},
            "spec.training.cacheFrozenPrefix: it pays from the second epoch on, and there are 1.5; set epochs to 2",
        ),
        ({"training": CACHED}, "spec.training.cacheFrozenPrefix: the first block, or something below it, is trained"),
        ({"resources": {"gpus": 0}, "training": {"precision": "fp16"}}, "spec.training.precision: fp16"),
        ({"resources": {"gpus": 0}, "training": {"optimizer": "paged_adamw"}}, "spec.training.optimizer: paged_adamw"),
    ],
)
def test_what_the_trainer_cannot_do_is_refused_by_field(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(NotSupported) as caught:
        planned(**parts)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("training", "remedy"),
    [
        (CACHED, "training.cacheFrozenPrefix: auto"),
        ({"torchCompile": "always"}, "training.torchCompile: auto"),
        (
            {"flashAttn": "varlen", "torchCompile": "always"},
            "training.flashAttn: auto and training.torchCompile: auto",
        ),
    ],
)
def test_a_fast_path_by_name_rules_out_what_divides_the_model(training: dict[str, Any], remedy: str) -> None:
    """What is too large for one GPU would else be divided, and the trainer refuse it there."""
    parts: dict[str, Any] = {"method": "freeze", "layers": {"last": 2}, "resources": {"gpus": 4}}
    assert planned(gpu_memory=OLD_CARD // 2, **parts).plan.strategy in ("deepspeed", "fsdp")
    with pytest.raises(DoesNotFit, match=rf"It would fit with: .*{remedy} \("):
        planned(gpu_memory=OLD_CARD // 2, training=training, **parts)


def test_a_strategy_that_cannot_divide_the_job_is_refused() -> None:
    int8 = {"method": "qlora", "quantization": {"type": "int8"}, "resources": {"gpus": 2}}
    with pytest.raises(NotSupported, match=r"spec\.quantization\.type: fsdp cannot divide int8 weights"):
        planned(parallelism={"strategy": "fsdp"}, **int8)
    with pytest.raises(NotSupported, match=r"spec\.parallelism\.strategy: deepspeed needs GPUs"):
        planned(parallelism={"strategy": "deepspeed"}, resources={"gpus": 0})
    with pytest.raises(NotSupported, match="fsdp cannot be run by this trainer"):
        planned(parallelism={"strategy": "fsdp"}, strategies=frozenset({Strategy.SINGLE}))
