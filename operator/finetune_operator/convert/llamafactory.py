"""The whole conversion: recognise, carry section by section, say what is left, validate."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator import constants as c
from finetune_operator.api.parse import parse_manifest
from finetune_operator.api.v1alpha1.job import FineTuneJobSpec
from finetune_operator.convert.dataset import carry_dataset
from finetune_operator.convert.draft import Draft, number, text, whole, words
from finetune_operator.convert.method import carry_method, carry_model
from finetune_operator.convert.notes import Note, Outcome, one_line, shown_name
from finetune_operator.convert.objective import (
    carry_compilation,
    carry_course,
    carry_objective,
    carry_precision,
    carry_speed,
)
from finetune_operator.convert.parallelism import carry_batches, carry_parallelism, gpus_of
from finetune_operator.convert.placeless import PLACELESS
from finetune_operator.convert.text import to_text
from finetune_operator.errors import InvalidManifest

CARRIED: frozenset[str] = frozenset(
    "model_name_or_path model_revision finetuning_type freeze_trainable_layers freeze_trainable_modules"
    " freeze_extra_modules use_llama_pro lora_rank lora_alpha lora_dropout lora_target additional_target use_dora"
    " use_rslora pissa_init loraplus_lr_ratio quantization_bit quantization_type quantization_method"
    " double_quantization stage pref_beta pref_loss pref_ftx dpo_label_smoothing simpo_gamma kto_chosen_weight"
    " kto_rejected_weight bf16 pure_bf16 fp16 num_train_epochs max_steps learning_rate lr_scheduler_type"
    " lr_scheduler_kwargs warmup_ratio warmup_steps optim use_galore use_apollo use_badam use_adam_mini use_muon"
    " weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm neftune_noise_alpha seed"
    " disable_gradient_checkpointing use_unsloth_gc flash_attn torch_compile per_device_train_batch_size"
    " gradient_accumulation_steps auto_find_batch_size deepspeed fsdp dataset dataset_dir template cutoff_len"
    " max_samples packing neat_packing train_on_prompt mask_history mix_strategy interleave_probs eval_dataset val_size"
    " predict_with_generate output_dir logging_steps save_steps save_strategy save_total_limit resume_from_checkpoint"
    " report_to".split()
)
"""Options that the sections below carry, where they have an effect."""
_KNOWN = CARRIED | PLACELESS.keys()
_TRAINING = ("stage", "finetuning_type", "dataset", "do_train", "per_device_train_batch_size")
_MAX_OPTIONS = 1000
_UNSURE = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Conversion:
    """A manifest, and what there is to say about it."""

    manifest: dict[str, Any]
    text: str
    """The manifest as YAML, with a comment at everything that a person has to decide."""
    notes: tuple[Note, ...]
    """One for each option, in the order of the input, then what was assumed."""
    problems: tuple[str, ...]
    """What the API would refuse; empty where the manifest can be applied as it is."""


def convert(
    options: Any,
    *,
    name: str,
    output: str | None = None,
    gpus: int | None = None,
    dataset_info: Mapping[str, Any] | None = None,
    source: str = "",
) -> Conversion:
    """A training configuration as a FineTuneJob.

    name: of the job; what Kubernetes does not take in it is replaced.
    output: `s3://bucket/prefix` for results.
    gpus: in all; 1, or `ray_num_workers`, where it is not given.
    dataset_info: LLaMA-Factory's `dataset_info.json`, which says where its data sets lie.
    source: what errors call the input.

    Raises InvalidManifest where the input is no training configuration of LLaMA-Factory.
    """
    _check(options, source)
    draft = Draft(options, gpus_of(options, gpus))
    carry_model(draft)
    objective = carry_objective(draft)
    carry_precision(draft)
    method = carry_method(draft)
    carry_dataset(draft, objective, dataset_info)
    carry_course(draft)
    carry_speed(draft)
    carry_batches(draft)
    carry_parallelism(draft, whole_on_each=objective != "sft")
    carry_compilation(draft, objective)
    _carry_running(draft, output)
    _note_rest(draft, options, method, objective)
    manifest = _manifest(draft.spec, name)
    return Conversion(
        manifest,
        to_text(manifest, {("spec", *path): texts for path, texts in draft.comments.items()}),
        _in_order(draft.notes, options),
        _problems(manifest),
    )


def _check(options: Any, source: str) -> None:
    if not isinstance(options, Mapping):
        raise InvalidManifest(["this is no map of options; give a training YAML of LLaMA-Factory"], source=source)
    if len(options) > _MAX_OPTIONS:
        raise InvalidManifest([f"more than {_MAX_OPTIONS} options; LLaMA-Factory has some 400"], source=source)
    if "apiVersion" in options and "kind" in options:
        raise InvalidManifest(["this is a Kubernetes manifest already"], source=source)
    if "peft_config" in options or "train_dataset" in options:
        raise InvalidManifest(
            ["this has the layout of LLaMA-Factory's v1 (model, peft_config, train_dataset), which is not read; write "
             "it with model_name_or_path, finetuning_type, dataset"],
            source=source,
        )  # fmt: skip
    idle = options.get("do_train") is False or ("do_train" not in options and options.get("do_predict") is True)
    if idle or ("export_dir" in options and "dataset" not in options):
        raise InvalidManifest(
            ["this trains nothing (do_train is not true); `finetune merge` exports a model, and evaluation.metrics "
             "of a job judge one"],
            source=source,
        )  # fmt: skip
    if "model_name_or_path" not in options or not any(option in options for option in _TRAINING):
        raise InvalidManifest(
            ["this is no training configuration of LLaMA-Factory: it needs model_name_or_path and one of "
             f"{', '.join(_TRAINING)}"],
            source=source,
        )  # fmt: skip


def _carry_running(draft: Draft, output: str | None) -> None:
    """Results, reports, checkpoints."""
    folder = draft.read("output_dir", text)
    draft.put("output.uri", output if output is not None else folder or "")
    if output is None:
        draft.hand("output_dir", "name a bucket: s3://bucket/prefix (--output)", "output.uri")
    elif folder is not None:
        draft.drop("output_dir", f"results go to {output}")
    steps = draft.read("logging_steps", number)
    if steps is not None and steps >= 1:
        draft.carry("logging_steps", "training.loggingSteps", round(steps))
    elif steps is not None:
        draft.ours("logging_steps", "every step is reported")
    _checkpoints(draft)
    reports = draft.read("report_to", words) if draft.options.get("report_to") != [] else None
    if reports is not None:
        others = [one for one in reports if one not in ("none", "tensorboard", "all")]
        if others:
            draft.drop("report_to", f"metrics go to status and TensorBoard, not to {', '.join(others)}")
        else:
            draft.ours("report_to", "TensorBoard lies beside the result")


def _checkpoints(draft: Draft) -> None:
    every, strategy = draft.read("save_steps", number), draft.read("save_strategy", text)
    if strategy == "epoch":
        draft.put("checkpoints.every", 1)
        draft.carry("save_strategy", "checkpoints.unit", "epoch")
        if every is not None:
            draft.drop("save_steps", "save_strategy is epoch")
    elif every is not None and every >= 1:
        draft.carry("save_steps", "checkpoints.every", round(every))
    elif every is not None:
        draft.hand("save_steps", "a share of the run; write checkpoints.every as steps", "output")
    if strategy == "steps":
        draft.ours("save_strategy", "checkpoints.unit is step")
    elif strategy not in (None, "epoch"):
        draft.drop("save_strategy", "checkpoints are always kept, for interruptions")
    limit = draft.read("save_total_limit", whole)
    if limit is not None and limit >= 1:
        draft.carry("save_total_limit", "checkpoints.keep", limit)
    resume = draft.options.get("resume_from_checkpoint")
    if isinstance(resume, str) and resume.lower() not in ("true", "false"):
        draft.hand("resume_from_checkpoint", "checkpoints of LLaMA-Factory cannot be continued here", "output")
    elif resume is not None:
        draft.ours("resume_from_checkpoint", "an attempt continues from the job's own newest checkpoint")


def _note_rest(draft: Draft, options: Mapping[str, Any], method: str, objective: str) -> None:
    """A note on every option that no section looked at."""
    for option, value in options.items():
        if option in draft.notes:
            continue
        if option not in _KNOWN:
            near = difflib.get_close_matches(option, sorted(_KNOWN), n=2, cutoff=0.75)
            meant = f"; near: {', '.join(near)}" if near else ""
            draft.options.setdefault(option, value)
            draft.note(option, Outcome.UNKNOWN, f"not an option of LLaMA-Factory that is known here{meant}")
        elif value is None:
            draft.notes[option] = Note(shown_name(option), "null", Outcome.OURS, "not set")
        elif option in PLACELESS:
            _note_placeless(draft, option, value)
        else:
            draft.drop(option, f"has no effect with method {method}, objective {objective} and the other options")


def _note_placeless(draft: Draft, option: str, value: Any) -> None:
    entry = PLACELESS[option]
    if value in entry.idle:
        draft.ours(option, "off")
    elif entry.outcome is Outcome.HAND:
        draft.hand(option, entry.reason, entry.at)
    else:
        draft.note(option, entry.outcome, entry.reason)


def _manifest(spec: Mapping[str, Any], name: str) -> dict[str, Any]:
    """In the order of the API's fields."""
    order = [field.alias or key for key, field in FineTuneJobSpec.model_fields.items()]
    return {
        "apiVersion": c.API_VERSION,
        "kind": c.KIND,
        "metadata": {"name": job_name(name)},
        "spec": {key: spec[key] for key in order if key in spec},
    }


def job_name(name: str) -> str:
    """A name that Kubernetes takes for the job and its pods."""
    words = _UNSURE.sub("-", name.lower()).strip("-")
    safe = words if words[:1].isalpha() else f"job-{words}".rstrip("-")
    return safe[: c.MAX_NAME_LENGTH].rstrip("-")


def _in_order(notes: Mapping[str, Note], options: Mapping[str, Any]) -> tuple[Note, ...]:
    given = [notes[option] for option in options]
    return (*given, *(note for option, note in notes.items() if option not in options))


def _problems(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        parse_manifest(manifest)
    except InvalidManifest as error:
        return tuple(one_line(problem) for problem in error.problems)
    return ()
