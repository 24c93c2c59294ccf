"""The trainer's configuration: every default is resolved here, nothing is left to guess in the pod."""

from __future__ import annotations

from finetune_operator.api.v1alpha1 import Dataset, FineTuneJobSpec, Lora, Quantization
from finetune_operator.render.attempt import Attempt
from finetune_trainer.contract import LayerSelection, TrainerConfig
from finetune_trainer.contract import config as t
from finetune_trainer.contract.vocabulary import Method, Strategy

ADAPTER_LEARNING_RATE = 2e-4
"""Hu et al. 2021 (arXiv:2106.09685, appendix D) and Dettmers et al. 2023 (arXiv:2305.14314, appendix B)."""
FULL_LEARNING_RATE = 1e-5


def trainer_config(attempt: Attempt) -> TrainerConfig:
    """The configuration of one attempt."""
    spec = attempt.spec
    s3 = spec.output.s3
    return TrainerConfig(
        job=t.JobIdentity(
            name=attempt.job.name, namespace=attempt.job.namespace, uid=attempt.uid, attempt=attempt.number
        ),
        model=t.ModelConfig(
            uri=spec.model.uri, revision=spec.model.revision, trust_remote_code=spec.model.trust_remote_code
        ),
        dataset=_dataset(spec.dataset),
        method=spec.method,
        layers=_layers(spec),
        lora=_lora(spec),
        quantization=_quantization(spec),
        training=_training(attempt),
        parallelism=_parallelism(attempt),
        s3=t.S3Config(
            endpoint=s3.endpoint or attempt.defaults.s3_endpoint, region=s3.region or attempt.defaults.s3_region
        ),
        output=t.OutputConfig(uri=spec.output.uri, merge=spec.output.merge),
        evaluation=t.EvaluationConfig.model_validate(spec.evaluation.model_dump()),
        checkpoints=t.CheckpointConfig.model_validate(spec.checkpoints.model_dump()),
    )


def _dataset(data: Dataset) -> t.DatasetConfig:
    values = data.model_dump(exclude={"uri", "sources"})
    if data.sources is not None:
        sources = tuple(t.DataSource(uri=one.uri, weight=one.weight) for one in data.sources)
    else:
        sources = (t.DataSource(uri=data.uri or ""),)
    return t.DatasetConfig.model_validate({**values, "sources": sources})


def _layers(spec: FineTuneJobSpec) -> LayerSelection | None:
    return None if spec.layers is None else LayerSelection.model_validate(spec.layers.model_dump())


def _lora(spec: FineTuneJobSpec) -> t.LoraConfig | None:
    if not spec.method.uses_lora:
        return None
    lora = spec.lora or Lora()
    return t.LoraConfig.model_validate({**lora.model_dump(), "alpha": lora.alpha or 2 * lora.rank})


def _quantization(spec: FineTuneJobSpec) -> t.QuantizationConfig | None:
    if spec.method is not Method.QLORA:
        return None
    return t.QuantizationConfig.model_validate((spec.quantization or Quantization()).model_dump())


def _training(attempt: Attempt) -> t.TrainingConfig:
    training, plan = attempt.spec.training, attempt.plan
    rate = FULL_LEARNING_RATE if attempt.spec.method.trains_base_weights else ADAPTER_LEARNING_RATE
    return t.TrainingConfig.model_validate(
        {
            **training.model_dump(),
            "learning_rate": rate if training.learning_rate is None else training.learning_rate,
            "micro_batch_size": plan.micro_batch_size,
            "gradient_accumulation": plan.gradient_accumulation,
            "gradient_checkpointing": plan.gradient_checkpointing,
        }
    )


def _parallelism(attempt: Attempt) -> t.ParallelismConfig:
    wanted, plan = attempt.spec.parallelism, attempt.plan
    return t.ParallelismConfig(
        strategy=Strategy(plan.strategy),
        zero_stage=plan.zero_stage,
        offload=t.OffloadConfig(optimizer=wanted.offload.optimizer, parameters=wanted.offload.parameters),
        deepspeed=wanted.deepspeed,
    )
