"""Where each option goes, what is written down where defaults differ, and the arithmetic of batches."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_operator.api.documents import read_documents
from finetune_operator.convert import Outcome
from tests.unit.convert.conversions import at, converted, outcome

CARRY: list[tuple[dict[str, Any], str, Any]] = [
    ({"model_revision": "v2"}, "model.revision", "v2"),
    ({"model_revision": "1e5"}, "model.revision", "1e5"),
    ({"model_revision": "main"}, "model.revision", None),
    ({"model_name_or_path": "s3://m/x"}, "model.uri", "s3://m/x"),
    ({"model_name_or_path": "gpt2"}, "model.uri", "hf://gpt2"),
    ({"model_name_or_path": "/data/models/x"}, "model.uri", "file:///data/models/x"),
    ({"model_name_or_path": "./models/x"}, "model.uri", "file:models/x"),
    ({"lora_alpha": 12}, "lora.alpha", 12),
    ({"lora_alpha": None}, "lora.alpha", None),
    ({"lora_dropout": 0.1}, "lora.dropout", 0.1),
    ({"lora_target": "q_proj, v_proj"}, "layers.modules", ["q_proj", "v_proj"]),
    ({"lora_target": ["q_proj"]}, "layers.modules", ["q_proj"]),
    ({"lora_target": "q_proj,lm_head"}, "layers.modules", ["q_proj"]),
    ({"additional_target": "embed_tokens,lm_head"}, "layers.also", ["embeddings", "lm_head"]),
    ({"use_rslora": True}, "lora.variant", "rslora"),
    ({"use_rslora": True, "use_dora": True}, "lora.variant", "dora"),
    ({"finetuning_type": "freeze"}, "layers.last", 2),
    ({"finetuning_type": "freeze", "freeze_trainable_layers": -3}, "layers.first", 3),
    ({"finetuning_type": "freeze", "freeze_extra_modules": "norm"}, "layers.also", ["norm"]),
    ({"quantization_bit": 4, "quantization_type": "fp4"}, "quantization.type", "fp4"),
    ({"quantization_bit": 4, "bf16": None, "fp16": True}, "quantization.computeDtype", "float16"),
    ({"quantization_bit": 4, "bf16": None}, "quantization.computeDtype", "float32"),
    ({"max_steps": 50}, "training.maxSteps", 50),
    ({"max_steps": -1}, "training.maxSteps", None),
    ({"learning_rate": "2e-5"}, "training.learningRate", 2e-5),
    ({"warmup_steps": 20}, "training.warmupSteps", 20),
    ({"warmup_steps": 20}, "training.warmupRatio", None),
    ({"warmup_steps": 0.2, "warmup_ratio": None}, "training.warmupRatio", 0.2),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}},
     "training.schedulerOptions", {"power": 2.0}),
    (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-5}'},
        "training.schedulerOptions",
        {"minLearningRateRatio": 0.1},
    ),
    (
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}},
        "training.schedulerOptions",
        {"cycles": 3},
    ),
    ({"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"decay_type": "cosine", "min_lr_ratio": 0.2}},
     "training.schedulerOptions", {"decayType": "cosine", "minLearningRateRatio": 0.2}),
    ({"optim": "adamw_torch"}, "training.optimizer", "adamw_torch"),
    ({"optim": "adamw_torch_fused"}, "training.optimizer", "adamw"),
    ({"optim": "adamw_bnb_8bit"}, "training.optimizer", "adamw_8bit"),
    ({"weight_decay": 0.1}, "training.weightDecay", 0.1),
    ({"adam_beta1": 0.8}, "training.adamBeta1", 0.8),
    ({"adam_beta2": 0.95}, "training.adamBeta2", 0.95),
    ({"adam_epsilon": 1e-6}, "training.adamEpsilon", 1e-6),
    ({"max_grad_norm": 0.5}, "training.maxGradNorm", 0.5),
    ({"neftune_noise_alpha": 5}, "training.neftuneAlpha", 5.0),
    ({"neftune_noise_alpha": 0}, "training.neftuneAlpha", None),
    ({"seed": 7}, "training.seed", 7),
    ({"bf16": None, "fp16": True}, "training.precision", "fp16"),
    ({"disable_gradient_checkpointing": True}, "training.gradientCheckpointing", "never"),
    ({"gradient_checkpointing": True}, "training.gradientCheckpointing", None),
    ({"use_unsloth_gc": True}, "training.gradientCheckpointing", "offload"),
    ({"use_unsloth_gc": False}, "training.gradientCheckpointing", None),
    ({"use_unsloth_gc": True, "disable_gradient_checkpointing": True}, "training.gradientCheckpointing", "never"),
    ({"flash_attn": "sdpa"}, "training.flashAttn", "sdpa"),
    ({"flash_attn": "fa2"}, "training.flashAttn", None),
    ({"torch_compile": True}, "training.torchCompile", "always"),
    ({"torch_compile": True, "deepspeed": "ds_z3.json"}, "training.torchCompile", None),
    ({"torch_compile": True, "fsdp": "full_shard"}, "training.torchCompile", None),
    ({"torch_compile": True, "stage": "dpo"}, "training.torchCompile", None),
    ({"torch_compile": True, "quantization_bit": 8}, "training.torchCompile", None),
    ({"torch_compile": False, "fsdp": "full_shard"}, "training.torchCompile", "never"),
    ({"auto_find_batch_size": True}, "training.microBatchSize", "auto"),
    ({"deepspeed": "ds_z0_config.json"}, "parallelism", {"strategy": "ddp"}),
    ({"deepspeed": "cfg/ds_z2_offload.json"}, "parallelism.offload", {"optimizer": "cpu"}),
    ({"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}},
     "parallelism.zeroStage", 3),
    (
        {"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}},
        "parallelism.offload",
        {"parameters": "cpu"},
    ),
    ({"fsdp": "full_shard"}, "parallelism", {"strategy": "fsdp"}),
    ({"fsdp": ""}, "parallelism", None),
    ({"template": "chatml"}, "dataset.template", "chatml"),
    ({"template": "llama3"}, "dataset.template", None),
    ({"max_samples": 100}, "dataset.maxSamples", 100),
    ({"neat_packing": True}, "dataset.packing", True),
    ({"packing": False, "stage": "pt"}, "dataset.packing", False),
    ({"train_on_prompt": True}, "dataset.trainOnPrompt", True),
    ({"mask_history": True}, "dataset.maskHistory", True),
    ({"val_size": 0.1}, "dataset.validation", {"fraction": 0.1}),
    ({"val_size": 50}, "dataset.validation", {"count": 50}),
    ({"val_size": 0}, "dataset.validation", None),
    ({"eval_dataset": "s3://data/held.jsonl"}, "dataset.validation", {"uri": "s3://data/held.jsonl"}),
    ({"eval_dataset": "s3://data/held.jsonl", "val_size": 0.1}, "dataset.validation", {"uri": "s3://data/held.jsonl"}),
    ({"val_size": 0.1, "predict_with_generate": True},
     "evaluation.metrics", ["perplexity", "accuracy", "bleu", "rouge"]),
    ({"predict_with_generate": True}, "evaluation.metrics", None),
    ({"save_steps": 200}, "checkpoints", {"every": 200}),
    ({"save_strategy": "epoch"}, "checkpoints", {"every": 1, "unit": "epoch"}),
    ({"save_total_limit": 3}, "checkpoints.keep", 3),
    ({"pref_loss": "ipo", "stage": "dpo"}, "training.preference.loss", "ipo"),
    ({"pref_ftx": 0.5, "stage": "dpo"}, "training.preference.sftWeight", 0.5),
    ({"dpo_label_smoothing": 0.1, "stage": "dpo"}, "training.preference.labelSmoothing", 0.1),
    ({"pref_loss": "simpo", "stage": "dpo"}, "training.preference.beta", 0.1),
    ({"kto_rejected_weight": 2.0, "stage": "kto"}, "training.preference.rejectedWeight", 2.0),
    ({"stage": "dpo", "packing": True, "train_on_prompt": True}, "dataset.packing", False),
    ({"stage": "dpo", "deepspeed": "ds_z3.json"}, "parallelism", None),
    ({"stage": "dpo", "deepspeed": "ds_z0.json"}, "parallelism.strategy", "ddp"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "path", "expected"), CARRY, ids=[json.dumps(case[0]) for case in CARRY])
def test_an_option_goes_to_its_field_and_the_manifest_is_valid(
    changes: dict[str, Any], path: str, expected: Any
) -> None:
    found = converted(**changes)
    assert at(found, path) == expected
    assert found.problems == ()
    assert read_documents(found.text)[0].data == found.manifest


@pytest.mark.parametrize(
    ("option", "path", "default"),
    [
        ("lora_rank", "lora.rank", 8),
        ("learning_rate", "training.learningRate", 5e-5),
        ("lr_scheduler_type", "training.scheduler", "linear"),
        ("warmup_ratio", "training.warmupRatio", 0.0),
        ("per_device_train_batch_size", "training.microBatchSize", 8),
        ("bf16", "training.precision", "fp32"),
        ("packing", "dataset.packing", False),
    ],
)
def test_where_defaults_differ_theirs_is_written_down(option: str, path: str, default: Any) -> None:
    found = converted(**{option: None})
    assert at(found, path) == default and outcome(found, option) is Outcome.ASSUMED


@pytest.mark.parametrize(
    ("micro", "accumulation", "gpus", "batch"), [(2, 4, 1, 8), (2, 4, 8, 64), (3, 1, 0, 3), (1, None, 2, 2)]
)
def test_batch_arithmetic(micro: int, accumulation: int | None, gpus: int, batch: int) -> None:
    found = converted(gpus, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)
    training = found.manifest["spec"]["training"]
    assert (training["batchSize"], training["microBatchSize"]) == (batch, micro)
    assert found.manifest["spec"]["resources"] == {"gpus": gpus} and found.problems == ()


def test_nothing_is_offloaded_without_a_gpu() -> None:
    found = converted(0, use_unsloth_gc=True)
    assert at(found, "training.gradientCheckpointing") is None and found.problems == ()
    assert outcome(found, "use_unsloth_gc") is Outcome.OURS


def test_gpus_as_given_win_over_rays_workers() -> None:
    assert at(converted(2, ray_num_workers=4), "resources.gpus") == 2
