"""The trainer's configuration: every default is resolved here, nothing is left to guess in the pod."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from finetune_operator.api.v1alpha1 import Dataset, FineTuneJobSpec, Lora, Prompt, Quantization, Training
from finetune_operator.render.attempt import Attempt
from finetune_operator.render.objectives import head_of, learning_rate_of, preference_of
from finetune_trainer.contract import LayerSelection, TrainerConfig
from finetune_trainer.contract import config as t
from finetune_trainer.contract.vocabulary import Method, OffloadTarget, Scheduler, Strategy

VIRTUAL_TOKENS = {Method.PREFIX: 20, Method.PROMPT: 20, Method.ADAPTER: 10}
"""For prefix and prompt PEFT's examples, for adapter Zhang et al. 2023 (arXiv:2303.16199, section 4.1)."""
MIN_LEARNING_RATE_RATIO = 0.1
"""Where `cosine_with_min_lr` ends, as a share of the peak."""


def trainer_config(attempt: Attempt) -> TrainerConfig:
    """The configuration of one attempt."""
    spec = attempt.spec
    s3 = spec.output.s3
    return TrainerConfig(
        job=t.JobIdentity(
            name=attempt.job.name,
            namespace=attempt.job.namespace,
            uid=attempt.uid,
            attempt=attempt.number,
            spec_sha256=spec_sha256(spec, attempt.job.namespace),
        ),
        model=t.ModelConfig(
            uri=spec.model.uri, revision=spec.model.revision, trust_remote_code=spec.model.trust_remote_code
        ),
        dataset=_dataset(spec.dataset),
        method=spec.method,
        layers=_layers(spec),
        lora=_lora(spec),
        prompt=_prompt(spec),
        quantization=_quantization(attempt),
        head=head_of(spec),
        training=_training(attempt),
        parallelism=_parallelism(attempt),
        s3=t.S3Config(
            endpoint=s3.endpoint or attempt.defaults.s3_endpoint, region=s3.region or attempt.defaults.s3_region
        ),
        output=t.OutputConfig(uri=spec.output.uri, merge=spec.output.merge, reuse=spec.output.reuse),
        evaluation=t.EvaluationConfig.model_validate(spec.evaluation.model_dump()),
        checkpoints=t.CheckpointConfig.model_validate(spec.checkpoints.model_dump()),
        adapters=tuple(_adapter(name, replace(attempt, spec=stage)) for name, stage in spec.stages()),
    )


def spec_sha256(spec: FineTuneJobSpec, namespace: str) -> str | None:
    """SHA-256 of what a spec says; None where that does not tell what is trained on, as a file of one machine.

    Left out is how often and when it is tried, and whether an earlier result will do: a job that asks for a new one
    replaces it for those that do not. So is what has its default, so that fields which a later version adds change
    nothing.
    """
    left_out: dict[str, bool | dict[str, bool]] = {"run_policy": True, "output": {"reuse": True}}
    said = spec.model_dump(mode="json", by_alias=True, exclude=left_out, exclude_defaults=True)
    text = json.dumps(said)
    # By the text, so that no address is forgotten, wherever it stands.
    if '"file:' in text:
        return None
    if '"pvc://' in text:
        said["namespace"] = namespace  # a claim of the same name is another one elsewhere
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _adapter(name: str, attempt: Attempt) -> t.AdapterConfig:
    spec = attempt.spec
    lora = _lora(spec)
    assert lora is not None, "the rules have seen to the method"
    return t.AdapterConfig(
        name=name, dataset=_dataset(spec.dataset), layers=_layers(spec), lora=lora, training=_training(attempt)
    )


def _dataset(data: Dataset) -> t.DatasetConfig:
    values = data.model_dump(exclude={"uri", "sources", "max_samples"})
    if data.sources is not None:
        sources = tuple(
            t.DataSource(uri=one.uri, weight=one.weight, max_samples=one.max_samples or data.max_samples)
            for one in data.sources
        )
    else:
        sources = (t.DataSource(uri=data.uri or "", max_samples=data.max_samples),)
    return t.DatasetConfig.model_validate({**values, "sources": sources})


def _layers(spec: FineTuneJobSpec) -> LayerSelection | None:
    return None if spec.layers is None else LayerSelection.model_validate(spec.layers.model_dump())


def _lora(spec: FineTuneJobSpec) -> t.LoraConfig | None:
    if not spec.method.uses_lora:
        return None
    lora = spec.lora or Lora()
    return t.LoraConfig.model_validate({**lora.model_dump(), "alpha": lora.alpha or 2 * lora.rank})


def _prompt(spec: FineTuneJobSpec) -> t.PromptConfig | None:
    if spec.method not in VIRTUAL_TOKENS:
        return None
    values = (spec.prompt or Prompt()).model_dump()
    return t.PromptConfig.model_validate(
        {**values, "virtual_tokens": values["virtual_tokens"] or VIRTUAL_TOKENS[spec.method]}
    )


def _quantization(attempt: Attempt) -> t.QuantizationConfig | None:
    if attempt.spec.method is not Method.QLORA:
        return None
    wanted = attempt.spec.quantization or Quantization()
    kept = wanted.keeps_transposed(recomputing=attempt.plan.gradient_checkpointing)
    return t.QuantizationConfig.model_validate({**wanted.model_dump(), "keep_transposed": kept})


def _training(attempt: Attempt) -> t.TrainingConfig:
    training, plan = attempt.spec.training, attempt.plan
    return t.TrainingConfig.model_validate(
        {
            **training.model_dump(),
            "scheduler_options": _scheduler_options(training),
            "preference": preference_of(attempt.spec),
            "learning_rate": learning_rate_of(attempt.spec),
            "micro_batch_size": plan.micro_batch_size,
            "gradient_accumulation": plan.gradient_accumulation,
            "gradient_checkpointing": plan.gradient_checkpointing,
            "recomputed_blocks": plan.recomputed_blocks,
            "offload_activations": plan.offload_activations,
        }
    )


def _scheduler_options(training: Training) -> t.SchedulerOptions:
    given = training.scheduler_options.model_dump(exclude_none=True)
    if training.scheduler is Scheduler.COSINE_WITH_MIN_LR:
        given = {"min_learning_rate_ratio": MIN_LEARNING_RATE_RATIO, **given}
    return t.SchedulerOptions.model_validate(given)


def _parallelism(attempt: Attempt) -> t.ParallelismConfig:
    wanted, plan = attempt.spec.parallelism, attempt.plan
    return t.ParallelismConfig(
        strategy=Strategy(plan.strategy),
        zero_stage=plan.zero_stage,
        offload=t.OffloadConfig(
            optimizer=OffloadTarget.CPU if plan.offload_optimizer else wanted.offload.optimizer,
            parameters=OffloadTarget.CPU if plan.offload_parameters else wanted.offload.parameters,
        ),
        deepspeed=wanted.deepspeed,
    )
