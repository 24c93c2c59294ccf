"""Options without a field of their own, each with the reason, and the values with which it asks for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_operator.convert.notes import Outcome

_OFF: tuple[Any, ...] = (False, "", "none", [], {}, 0)
_NOT_DURING = "nothing is evaluated during training; held-out data are evaluated before and after it"


@dataclass(frozen=True, slots=True)
class Placeless:
    """What is said of an option that is not carried."""

    outcome: Outcome
    reason: str
    idle: tuple[Any, ...] = ()
    """Values with which it asks for nothing."""
    at: str = ""
    """Field below spec where a comment says what there is to decide."""


def _all(
    names: str, outcome: Outcome, reason: str, idle: tuple[Any, ...] = (), at: str = ""
) -> Iterator[tuple[str, Placeless]]:
    for name in names.split():
        yield name, Placeless(outcome, reason, idle, at)


PLACELESS: dict[str, Placeless] = dict(
    [
        # What the operator or the trainer does anyway.
        *_all("do_train", Outcome.OURS, "a job trains"),
        *_all("overwrite_output_dir", Outcome.OURS, "each job has a folder of its own below output.uri"),
        *_all("plot_loss", Outcome.OURS, "loss and gradient norms go to status and TensorBoard"),
        *_all("logging_dir logging_first_step logging_strategy", Outcome.OURS, "TensorBoard lies beside the result"),
        *_all("save_only_model", Outcome.OURS, "a result is the model alone; checkpoints can always be continued"),
        *_all("gradient_checkpointing activation_checkpointing", Outcome.OURS,
              "as few blocks are recomputed as memory asks for"),
        *_all("do_eval eval_on_start", Outcome.OURS, "held-out data are evaluated before and after training"),
        *_all("compute_accuracy", Outcome.OURS, "accuracy is among the metrics"),
        *_all("per_device_eval_batch_size eval_accumulation_steps", Outcome.OURS, "chosen to fit"),
        *_all("enable_liger_kernel use_liger_kernel liger_kernel_config use_v1_kernels use_unsloth",
              Outcome.OURS, "the trainer has fast paths of its own (flashAttn, torchCompile)", _OFF),
        *_all("pissa_iter pissa_convert", Outcome.OURS, "the result is an adapter of the published base"),
        *_all("ddp_timeout", Outcome.OURS, "runPolicy.stallSeconds finds what hangs"),
        *_all("include_num_input_tokens_seen include_tokens_per_second include_effective_tokens_per_second",
              Outcome.OURS, "tokens per second are in status"),
        *_all("low_cpu_mem_usage use_fast_tokenizer remove_unused_columns ignore_pad_token_for_loss"
              " use_cache use_kv_cache full_determinism", Outcome.OURS, "always so"),
        *_all("ray_num_workers", Outcome.CARRIED, "resources.gpus, where --gpus does not say otherwise"),
        # What has to do with one machine, one process, or the look of a run.
        *_all("preprocessing_num_workers preprocessing_batch_size overwrite_cache dataloader_num_workers"
              " dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_drop_last"
              " tokenized_path data_shared_file_system streaming buffer_size group_by_length data_seed",
              Outcome.DROPPED, "how data are prepared is the trainer's affair"),
        *_all("use_reentrant_gc print_param_status disable_tqdm log_level"
              " log_level_replica log_on_each_node logging_nan_inf_filter use_cpu local_rank ddp_backend"
              " ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers save_safetensors tf32"
              " torch_compile_backend torch_compile_mode torch_empty_cache_steps skip_memory_metrics debug"
              " accelerator_config prediction_loss_only average_tokens_across_devices batch_eval_metrics"
              " fsdp_transformer_layer_cls_to_wrap fp16_opt_level half_precision_backend device_map"
              " restore_callback_states_from_checkpoint ignore_data_skip save_on_each_node optim_args"
              " gradient_checkpointing_kwargs activation_checkpointing_kwargs bf16_full_eval fp16_full_eval"
              " dataloader_in_order dataloader_multiprocessing_context ddp_static_graph enable_jit_checkpoint"
              " eval_do_concat_batches eval_use_gather_object include_for_metrics label_names length_column_name"
              " train_sampling_strategy trackio_space_id trackio_bucket_id trackio_static_space_id",
              Outcome.DROPPED, "a detail of its trainer"),
        *_all("eval_strategy evaluation_strategy", Outcome.DROPPED, _NOT_DURING, ("no", False)),
        *_all("eval_steps eval_delay", Outcome.DROPPED, _NOT_DURING),
        *_all("cache_dir media_dir offload_folder download_mode", Outcome.DROPPED, "a folder of one machine"),
        *_all("run_name project", Outcome.DROPPED, "metadata.name names a job (--name)"),
        *_all("ray_init_kwargs ray_run_name ray_storage_path ray_storage_filesystem resources_per_worker"
              " placement_strategy master_addr master_port", Outcome.DROPPED, "pods are started by Kubernetes"),
        *_all("infer_backend infer_dtype vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config"
              " sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend do_sample"
              " temperature top_p top_k num_beams eval_num_beams max_length repetition_penalty length_penalty"
              " skip_special_tokens"
              " sample_backend generation_max_length generation_num_beams", Outcome.DROPPED, "is about inference"),
        *_all("max_new_tokens", Outcome.DROPPED, "is about inference; evaluation.maxNewTokens is the like"),
        *_all("export_dir export_size export_device export_quantization_bit export_quantization_dataset"
              " export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id",
              Outcome.DROPPED, "`finetune merge` or output.merge makes a stand-alone model"),
        *_all("push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision",
              Outcome.DROPPED, "results go to output.uri", _OFF),
        *_all("image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels"
              " video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate",
              Outcome.DROPPED, "text only here", _OFF),
        *_all("freeze_vision_tower freeze_multi_modal_projector", Outcome.OURS, "only the text part is trained"),
        *_all("swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir"
              " swanlab_lark_webhook_url swanlab_lark_secret", Outcome.DROPPED, "metrics go to status and TensorBoard"),
        *_all("use_swanlab", Outcome.DROPPED, "metrics go to status and TensorBoard", _OFF),
        *_all("enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps"
              " profiler_active_steps profiler_repeat profiler_record_shapes profiler_profile_memory"
              " profiler_with_stack profile_modules", Outcome.DROPPED, "there is no profiler", _OFF),
        # What belongs to a choice that is noted itself.
        *_all("galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise",
              Outcome.DROPPED, "of GaLore"),
        *_all("apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type"
              " apollo_scale_type apollo_layerwise apollo_scale_front", Outcome.DROPPED, "of APOLLO"),
        *_all("badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio"
              " badam_mask_mode badam_verbose", Outcome.DROPPED, "of BAdam"),
        *_all("oft_rank oft_block_size oft_target module_dropout", Outcome.DROPPED, "of OFT"),
        *_all("ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards reward_model"
              " reward_model_adapters reward_model_quantization_bit reward_model_type", Outcome.DROPPED, "of PPO"),
        *_all("asft_alpha eaft_alpha loraplus_lr_embedding", Outcome.DROPPED, "has no place"),
        *_all("kt_cpu_activation kt_weight_path kt_non_expert_weight_path kt_expert_checkpoint_path"
              " kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size kt_config",
              Outcome.DROPPED, "of KTransformers"),
        *_all("fp8_backend fp8_enable_fsdp_float8_all_gather", Outcome.DROPPED, "of fp8"),
        *_all("fsdp_config quantization_device_map init_special_tokens", Outcome.DROPPED, "has no place"),
        *_all("sequence_parallel use_distributed_optimizer overlap_param_gather overlap_grad_reduce mixed_precision"
              " bias_activation_fusion apply_rope_fusion masked_softmax_fusion cross_entropy_loss_fusion"
              " recompute_granularity recompute_method recompute_num_layers moe_grouped_gemm"
              " moe_token_dispatcher_type use_packed_sequences export_hf_on_finish extra_config"
              " account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split"
              " calculate_per_token_loss megatron_pretrained_checkpoint", Outcome.DROPPED, "of Megatron"),
        # What changes what is learnt, or where, and is not here.
        *_all("tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size"
              " context_parallel_size virtual_pipeline_model_parallel_size hyper_parallel_cp_size", Outcome.HAND,
              "a model is divided by DeepSpeed or FSDP here; see parallelism.strategy", (0, 1, False)),
        *_all("use_mca use_megatron_bridge use_hyper_parallel hyper_parallel_args use_kt", Outcome.HAND,
              "not here; see `finetune plan` for whether the job fits without it", _OFF, "training"),
        *_all("disable_shuffling", Outcome.HAND, "samples are always shuffled; not carried", _OFF, "dataset"),
        *_all("fp8", Outcome.HAND, "products in FP8 are for method qlora here: quantization.type fp8", _OFF,
              "training"),
        *_all("use_dft_loss use_asft_loss use_eaft_loss label_smoothing_factor pref_bco_weight ld_alpha",
              Outcome.HAND, "this loss is not here; the usual cross-entropy (or that of the "
              "objective) is taken", _OFF, "training"),
        *_all("moe_aux_loss_coef", Outcome.HAND, "the model's own config.json decides: set output_router_logits to true"
              " there, and router_aux_loss_coef", _OFF, "model"),
        *_all("ref_model ref_model_adapters ref_model_quantization_bit", Outcome.HAND,
              "the reference is the model before tuning", at="training"),
        *_all("shift_attn mixture_of_depths rope_scaling train_from_scratch resize_vocab add_tokens"
              " add_special_tokens new_special_tokens_config upcast_layernorm upcast_lmhead_output"
              " split_special_tokens optim_target_modules parallelism_config", Outcome.HAND,
              "the model is tuned as it was published; not carried", _OFF,
              "model"),
        *_all("freeze_language_model", Outcome.HAND, "only the text part is trained here", _OFF),
        *_all("default_system", Outcome.HAND, "put the system prompt in the data, or in a template of your own",
              at="dataset"),
        *_all("tool_format enable_thinking preserve_thinking", Outcome.HAND,
              "the model's own chat template decides; write dataset.template where it should be another", at="dataset"),
        *_all("adapter_name_or_path adapter_folder", Outcome.HAND,
              "a job starts from a model; merge the adapter first, and name the merged model in model.uri",
              at="model.uri"),
        *_all("create_new_adapter", Outcome.DROPPED, "a job always makes a new one"),
        *_all("early_stopping_steps load_best_model_at_end metric_for_best_model greater_is_better", Outcome.HAND,
              "the last step's weights are the result; evaluation.gates can refuse them", _OFF),
        *_all("eval_on_each_dataset", Outcome.HAND, "held-out data are evaluated together", _OFF),
        *_all("hf_hub_token", Outcome.HAND, "put it in a Secret and name that in model.tokenSecretRef", at="model"),
        *_all("ms_hub_token om_hub_token hub_token", Outcome.DROPPED, "not needed here"),
        *_all("trust_remote_code", Outcome.HAND,
              "not carried: set model.trustRemoteCode only where the model needs its own code, which the cluster's "
              "administrator has to allow", _OFF, "model"),
        *_all("do_predict", Outcome.DROPPED, "evaluation.metrics bleu and rouge judge written answers", _OFF),
    ]
)  # fmt: skip
"""By option; what is carried stands in the modules that carry it."""
