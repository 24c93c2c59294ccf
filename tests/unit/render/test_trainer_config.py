"""Spec and plan to the trainer's configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from finetune_operator.render import config_map, trainer_config
from finetune_operator.render.volumes import volumes
from finetune_operator.settings import TrainerDefaults
from finetune_trainer.contract import TrainerConfig
from tests.builders import UID, plan
from tests.unit.render.cases import GOLDEN, make


@pytest.mark.parametrize(
    ("method", "rate"),
    [("lora", 2e-4), ("qlora", 2e-4), ("full", 1e-5), ("freeze", 1e-5), ("bitfit", 1e-5), ("ia3", 2e-4)],
)
def test_the_learning_rate_follows_the_method(method: str, rate: float) -> None:
    layers: dict[str, Any] = {"layers": {"last": 1}} if method == "freeze" else {}
    assert trainer_config(make(method=method, **layers)).training.learning_rate == rate
    assert trainer_config(make(method=method, training={"learningRate": 0.5}, **layers)).training.learning_rate == 0.5


@pytest.mark.parametrize(("lora", "alpha"), [(None, 32), ({"rank": 4}, 8), ({"rank": 4, "alpha": 5}, 5)])
def test_alpha_is_twice_the_rank(lora: dict[str, Any] | None, alpha: int) -> None:
    config = trainer_config(make(lora=lora))
    assert config.lora is not None
    assert config.lora.alpha == alpha


@pytest.mark.parametrize(("method", "lora", "quantization"), [("lora", True, False), ("qlora", True, True)])
def test_blocks_are_there_when_the_method_needs_them(method: str, lora: bool, quantization: bool) -> None:
    config = trainer_config(make(method=method))
    assert ((config.lora is not None), (config.quantization is not None)) == (lora, quantization)
    full = trainer_config(make(method="full"))
    assert full.lora is None
    assert full.quantization is None


@pytest.mark.parametrize(
    ("quantization", "recomputing", "kept"),
    [
        ({"type": "fp8"}, False, True),
        ({"type": "fp8"}, True, False),
        ({"type": "fp8", "keepTransposed": "always"}, True, True),
        ({"type": "fp8", "keepTransposed": "never"}, False, False),
        ({"type": "nf4"}, False, False),
    ],
)
def test_whether_fp8_weights_are_kept_twice_follows_the_plan(
    quantization: dict[str, Any], recomputing: bool, kept: bool
) -> None:
    attempt = make(method="qlora", quantization=quantization)
    planned = attempt.plan.model_copy(update={"gradient_checkpointing": recomputing})
    config = trainer_config(replace(attempt, plan=planned))
    assert config.quantization is not None
    assert config.quantization.keep_transposed is kept


@pytest.mark.parametrize(
    ("method", "prompt", "expected"),
    [
        ("prefix", None, {"virtualTokens": 20, "initialization": "random", "projection": False}),
        ("prompt", {"initialization": "vocabulary"}, {"virtualTokens": 20, "initialization": "vocabulary"}),
        ("adapter", None, {"virtualTokens": 10}),
        ("adapter", {"virtualTokens": 3}, {"virtualTokens": 3}),
        ("prefix", {"projection": True, "projectionSize": 9}, {"projection": True, "projectionSize": 9}),
    ],
)
def test_trained_positions_depend_on_the_method(
    method: str, prompt: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    config = json.loads(trainer_config(make(method=method, prompt=prompt)).to_json())
    assert {name: config["prompt"][name] for name in expected} == expected
    assert trainer_config(make(method="ia3")).prompt is None


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, (0.0, 1, 1.0, 0.1, "linear")),
        ({"scheduler": "cosine_with_min_lr"}, (0.1, 1, 1.0, 0.1, "linear")),
        (
            {"scheduler": "cosine_with_min_lr", "schedulerOptions": {"minLearningRateRatio": 0.0}},
            (0.0, 1, 1.0, 0.1, "linear"),
        ),
        (
            {"scheduler": "polynomial", "schedulerOptions": {"minLearningRateRatio": 0.3, "power": 2.0}},
            (0.3, 1, 2.0, 0.1, "linear"),
        ),
        ({"scheduler": "cosine_with_restarts", "schedulerOptions": {"cycles": 3}}, (0.0, 3, 1.0, 0.1, "linear")),
        (
            {"scheduler": "warmup_stable_decay", "schedulerOptions": {"decayRatio": 0.5, "decayType": "cosine"}},
            (0.0, 1, 1.0, 0.5, "cosine"),
        ),
    ],
)
def test_options_of_the_scheduler_are_resolved(training: dict[str, Any], expected: tuple[Any, ...]) -> None:
    options = trainer_config(make(training=training)).training.scheduler_options
    assert tuple(options.model_dump().values()) == expected


def test_each_of_several_adapters_is_resolved_on_its_own() -> None:
    adapters: list[dict[str, Any]] = [
        {"name": "a"},
        {"name": "b", "lora": {"rank": 3}, "layers": {"last": 2}, "dataset": {"uri": "pvc://claim/b.jsonl"}},
        {"name": "c", "training": {"learningRate": 0.5, "scheduler": "cosine_with_min_lr", "maxSteps": 9}},
    ]
    attempt = make(adapters=adapters, lora={"rank": 8}, layers={"first": 1}, training={"epochs": 7})
    config = trainer_config(attempt)
    a, b, c = config.adapters
    assert (a.name, a.lora.rank, a.lora.alpha, a.layers, a.training) == (
        "a",
        8,
        16,
        config.layers,
        config.training,
    )
    assert (b.lora.rank, b.lora.alpha, b.layers and b.layers.last) == (3, 6, 2)
    assert [source.uri for source in b.dataset.sources] == ["pvc://claim/b.jsonl"]
    assert a.dataset == c.dataset == config.dataset
    assert (c.training.learning_rate, c.training.max_steps, c.training.epochs) == (0.5, 9, 7)
    assert c.training.scheduler_options.min_learning_rate_ratio == 0.1
    assert c.training.micro_batch_size == config.training.micro_batch_size
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in volumes(attempt) if "persistentVolumeClaim" in volume
    ]
    assert claims == ["claim"]
    stages = config.stages()
    assert [stage.run_uri for stage in stages] == [f"{config.run_uri}/adapters/{name}" for name in "abc"]
    assert len({stage.resume_digest() for stage in stages}) == 3
    assert config.model_copy(update={"adapters": ()}).stages()[0].run_uri == config.run_uri


def test_layers_are_normalised() -> None:
    config = trainer_config(make(layers={"ids": [9, 1, 9], "modules": ["mlp"], "also": ["norm"]}))
    assert config.layers is not None
    assert (config.layers.ids, config.layers.modules, config.layers.also) == ((1, 9), ("mlp",), ("norm",))
    assert trainer_config(make()).layers is None


def test_unfreezing_is_carried() -> None:
    layers = {"last": 3, "unfreeze": {"every": 5, "unit": "epoch", "order": "bottom-up"}}
    config = trainer_config(make(method="freeze", layers=layers))
    assert config.layers is not None
    assert config.layers.unfreeze is not None
    assert config.layers.unfreeze.to_json() == '{"every":5,"unit":"epoch","order":"bottom-up"}'


def test_the_plan_decides_the_batch_and_the_strategy() -> None:
    planned = plan(
        nodes=2,
        gpus_per_node=4,
        strategy="deepspeed",
        zero_stage=3,
        micro_batch_size=2,
        gradient_accumulation=4,
        gradient_checkpointing=True,
        offload_activations=True,
    )
    config = trainer_config(
        make(
            planned=planned,
            training={"batchSize": 64, "gradientCheckpointing": "auto"},
            resources={"gpus": 8, "gpusPerNode": 4},
            parallelism={"strategy": "deepspeed", "offload": {"optimizer": "cpu"}, "deepspeed": {"x": 1}},
        )
    )
    training, parallelism = config.training, config.parallelism
    assert (training.batch_size, training.micro_batch_size, training.gradient_accumulation) == (64, 2, 4)
    assert (training.gradient_checkpointing, training.offload_activations) == (True, True)
    assert (parallelism.strategy, parallelism.zero_stage, parallelism.deepspeed) == ("deepspeed", 3, {"x": 1})
    assert (parallelism.offload.optimizer, parallelism.offload.parameters) == ("cpu", "none")


CARRIED = [
    ("training", {"epochs": 1.5, "maxSteps": 7, "scheduler": "linear", "warmupRatio": 0.5, "weightDecay": 0.1}),
    ("training", {"optimizer": "sgd", "precision": "fp32", "maxGradNorm": 2.0, "neftuneAlpha": 5.0}),
    ("training", {"loggingSteps": 3, "seed": 1}),
    ("training", {"warmupSteps": 9, "adamBeta1": 0.5, "adamBeta2": 0.75, "adamEpsilon": 0.125}),
    ("lora", {"rankPattern": {"mlp": 4, "1-2.q_proj": 8}, "alphaPattern": {"mlp": 4}, "evaRho": 1.5}),
    ("dataset", {"format": "alpaca", "maxLength": 64, "overlong": "drop", "packing": False, "trainOnPrompt": True}),
    ("dataset", {"validation": {"fraction": 0.25}}),
    (
        "dataset",
        {
            "cleaning": {
                "deduplicate": False,
                "nearDuplicates": 0.7,
                "minCharacters": 9,
                "dropEmptyTurns": False,
                "dropMojibake": False,
                "dropInvalid": False,
                "maxInvalidShare": 0.5,
            }
        },
    ),
    ("dataset", {"maskHistory": True, "template": "chatml", "validation": {"count": 5}}),
    ("model", {"revision": "abc", "trustRemoteCode": True}),
    ("output", {"uri": "s3://else/where", "merge": "base16"}),
    ("checkpoints", {"every": 5, "unit": "epoch", "keep": 9, "resume": "never"}),
    ("evaluation", {"metrics": ["perplexity"], "compareWithBase": False, "maxSamples": 3, "generations": 0}),
    ("lora", {"rank": 3, "dropout": 0.5, "variant": "lora+", "bias": "all", "learningRateRatio": 4.0}),
]


def test_names_of_columns_and_tags_arrive() -> None:
    config = trainer_config(make(dataset={"columns": {"prompt": "ask"}, "tags": {"roleTag": "role"}}))
    assert config.dataset.columns is not None
    assert config.dataset.tags is not None
    assert config.dataset.columns.model_dump(exclude_none=True) == {"prompt": "ask"}
    assert (config.dataset.tags.role_tag, config.dataset.tags.content_tag) == ("role", "value")


SOURCES: list[tuple[dict[str, Any], list[tuple[float, int | None]]]] = [
    ({}, [(1.0, None)]),
    ({"maxSamples": 7}, [(1.0, 7)]),
    ({"uri": None, "sources": [{"uri": "s3://b/a", "maxSamples": 3}, {"uri": "s3://b/c"}]}, [(1.0, 3), (1.0, None)]),
    (
        {
            "uri": None,
            "maxSamples": 7,
            "sources": [{"uri": "s3://b/a", "weight": 2, "maxSamples": 3}, {"uri": "s3://b/c"}],
        },
        [(2.0, 3), (1.0, 7)],
    ),
]


@pytest.mark.parametrize(("dataset", "expected"), SOURCES)
def test_sources_take_what_is_said_of_all_where_they_say_nothing(
    dataset: dict[str, Any], expected: list[tuple[float, int | None]]
) -> None:
    sources = trainer_config(make(dataset=dataset)).dataset.sources
    assert [(source.weight, source.max_samples) for source in sources] == expected


@pytest.mark.parametrize(("block", "values"), CARRIED)
def test_what_the_user_wrote_arrives(block: str, values: dict[str, Any]) -> None:
    changes: dict[str, Any] = {block: values}
    wire = json.loads(trainer_config(make(**changes)).to_json())[block]
    assert {name: wire[name] for name in values} == values


def test_gates_arrive() -> None:
    gates = [{"metric": "perplexity", "max": 12.0}]
    config = trainer_config(make(dataset={"validation": {"fraction": 0.1}}, evaluation={"gates": gates}))
    assert json.loads(config.to_json())["evaluation"]["gates"] == gates


def test_the_store_is_the_jobs_or_the_clusters() -> None:
    defaults = TrainerDefaults(s3_endpoint="http://cluster", s3_region="here")
    config = trainer_config(make(defaults=defaults))
    assert (config.s3.endpoint, config.s3.region) == ("http://cluster", "here")
    own = trainer_config(make(defaults=defaults, output={"s3": {"endpoint": "http://own"}}))
    assert (own.s3.endpoint, own.s3.region) == ("http://own", "here")


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.__name__)
def test_the_config_map_is_read_back_whole(case: Any) -> None:
    attempt = case()
    manifest = config_map(attempt)
    config = TrainerConfig.model_validate_json(manifest["data"]["config.json"])
    assert config == trainer_config(attempt)
    assert (config.job.uid, config.job.attempt) == (UID, attempt.number)
    assert manifest["metadata"]["annotations"]["finetune.dev/config-sha256"] == config.digest()
    assert manifest["immutable"] is True
