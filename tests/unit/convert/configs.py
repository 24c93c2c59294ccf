"""Training configurations as users of LLaMA-Factory write them, one for each kind, with its option names."""

from __future__ import annotations

from typing import Any

DATA = "s3://data/train.jsonl"
BASE: dict[str, Any] = {
    "model_name_or_path": "org/model-1b", "stage": "sft", "do_train": True, "dataset": DATA, "template": "qwen3",
    "cutoff_len": 512, "output_dir": "saves/it", "logging_steps": 5, "save_steps": 100, "plot_loss": True,
    "overwrite_output_dir": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
    "learning_rate": 1e-4, "num_train_epochs": 2.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True,
    "preprocessing_num_workers": 4, "ddp_timeout": 1000, "report_to": "none", "resume_from_checkpoint": None,
}  # fmt: skip
_LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}
_FULL = {"finetuning_type": "full"}
_PREFERENCE = {**_LORA, "stage": "dpo", "pref_beta": 0.2, "learning_rate": 5e-6}

EXAMPLES: dict[str, dict[str, Any]] = {
    "lora-sft": _LORA,
    "lora-sft-ds3": {**_LORA, "deepspeed": "examples/deepspeed/ds_z3_config.json"},
    "lora-sft-ray": {**_LORA, "ray_num_workers": 4, "ray_init_kwargs": {"runtime_env": {}}},
    "lora-dpo": {**_PREFERENCE, "pref_loss": "sigmoid"},
    "lora-orpo": {**_PREFERENCE, "pref_loss": "orpo"},
    "lora-simpo": {**_PREFERENCE, "pref_loss": "simpo", "simpo_gamma": 0.7},
    "lora-kto": {**_LORA, "stage": "kto", "pref_beta": 0.1, "kto_chosen_weight": 1.5},
    "lora-pretrain": {**_LORA, "stage": "pt"},
    "lora-reward": {**_LORA, "stage": "rm"},
    "lora-ppo": {**_LORA, "stage": "ppo", "reward_model": "saves/reward", "top_p": 0.9, "max_new_tokens": 512},
    "qlora-bnb": {**_LORA, "quantization_bit": 4, "quantization_method": "bnb", "double_quantization": False},
    "qlora-hqq": {**_LORA, "quantization_bit": 8, "quantization_method": "hqq"},
    "qlora-gptq": {**_LORA, "model_name_or_path": "org/model-1b-GPTQ"},
    "fsdp-qlora": {**_LORA, "quantization_bit": 4, "fsdp": "full_shard auto_wrap offload"},
    "full-ds3": {**_FULL, "deepspeed": "ds_z3_offload_config.json", "pure_bf16": True, "bf16": None},
    "full-ds2": {**_FULL, "deepspeed": "zero2.json"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 4, "freeze_trainable_modules": "mlp,self_attn"},
    "llama-pro": {"finetuning_type": "freeze", "freeze_trainable_layers": 8, "use_llama_pro": True},
    "galore": {**_FULL, "use_galore": True, "galore_layerwise": True, "galore_target": "mlp,self_attn",
               "galore_rank": 128, "galore_scale": 2.0, "pure_bf16": True},
    "apollo": {**_FULL, "use_apollo": True, "apollo_layerwise": True, "apollo_target": "all", "apollo_rank": 128,
               "apollo_scale": 32.0, "apollo_scale_type": "channel"},
    "badam": {**_FULL, "use_badam": True, "badam_mode": "layer", "badam_switch_mode": "ascending",
              "badam_switch_interval": 50, "badam_verbose": 2},
    "adam-mini": {**_FULL, "use_adam_mini": True},
    "muon": {**_FULL, "use_muon": True},
    "mod": {**_FULL, "mixture_of_depths": "convert", "optim": "paged_adamw_8bit"},
    "dft": {**_FULL, "use_dft_loss": True},
    "fp8": {**_FULL, "fp8": True, "fp8_backend": "torchao", "fp8_enable_fsdp_float8_all_gather": False},
    "loraplus": {**_LORA, "loraplus_lr_ratio": 16.0},
    "pissa": {**_LORA, "pissa_init": True, "pissa_iter": 16, "pissa_convert": True},
    "dora": {**_LORA, "use_dora": True, "use_rslora": False},
    "oft": {"finetuning_type": "oft", "oft_block_size": 32, "oft_target": "all"},
    "vision": {**_LORA, "image_max_pixels": 262144, "video_max_pixels": 16384, "freeze_vision_tower": True},
    "kt": {**_LORA, "use_kt": True, "kt_cpu_activation": "retain"},
    "megatron": {**_FULL, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2, "use_mca": True},
}  # fmt: skip

PROBLEMS = {
    "lora-reward": "spec.training.objective",
    "lora-ppo": "spec.training.objective",
    "llama-pro": "spec.layers",
    "oft": "spec.method",
}
"""Kinds that a person has to decide about before the API takes them, and the field that it refuses."""


def config(**changes: Any) -> dict[str, Any]:
    """The base with changes; None takes an option away."""
    return {name: value for name, value in {**BASE, **changes}.items() if value is not None}
