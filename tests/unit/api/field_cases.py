"""Fields that are wrong by themselves, for the unit tests and for tests/apiserver."""

from __future__ import annotations

from tests.unit.api.manifests import Refused

BROKEN_FIELDS = (
    Refused("no-model", {"model": ...}, "spec.model", "missing. The model to tune", "Required value"),
    Refused("no-output", {"output": ...}, "spec.output", "missing. Where results go", "Required value"),
    Refused(
        "unknown-method",
        {"method": "qlra"},
        "spec.method",
        "'qlra' is not one of full, freeze, lora, qlora, bitfit, prefix, prompt, adapter, ia3, head; did you mean "
        "qlora?",
        'Unsupported value: "qlra": supported values: "full", "freeze", "lora", "qlora"',
    ),
    Refused(
        "unknown-scheme",
        {"model": {"uri": "gs://bucket/model"}},
        "spec.model.uri",
        "'gs://bucket/model' does not have the form ^(hf|s3)://",
        "should match '^(hf|s3)://",
    ),
    Refused(
        "output-not-s3",
        {"output": {"uri": "file:///tmp/out"}},
        "spec.output.uri",
        "`s3://bucket/prefix`. Results lie below",
        "should match '^s3://",
    ),
    Refused(
        "source-scheme",
        {"dataset": {"uri": ..., "sources": [{"uri": "s3://b/a"}, {"uri": "http://x"}]}},
        "spec.dataset.sources[1].uri",
        "'http://x' does not have the form",
        "should match",
    ),
    Refused(
        "source-weight",
        {"dataset": {"uri": ..., "sources": [{"uri": "s3://b/a", "weight": 0}]}},
        "spec.dataset.sources[0].weight",
        "0 is too small; use more than 0",
        "should be greater than 0",
    ),
    Refused(
        "fraction-of-all",
        {"dataset": {"validation": {"fraction": 1.0}}},
        "spec.dataset.validation.fraction",
        "1.0 is too large; use less than 1",
        "should be less than 1",
    ),
    Refused(
        "unknown-template",
        {"dataset": {"template": "chatm"}},
        "spec.dataset.template",
        "'chatm' does not have the form",
        "should match",
    ),
    Refused(
        "nothing-resembles-so-little",
        {"dataset": {"cleaning": {"nearDuplicates": 0.1}}},
        "spec.dataset.cleaning.nearDuplicates",
        "0.1 is too small; use at least 0.5",
        "should be greater than or equal to 0.5",
    ),
    Refused(
        "negative-id",
        {"layers": {"ids": [3, -1]}},
        "spec.layers.ids[1]",
        "-1 is too small; use at least 0",
        "should be greater than or equal to 0",
    ),
    Refused(
        "no-ids",
        {"layers": {"ids": []}},
        "spec.layers.ids",
        "[] has 0 entries, too few; use at least 1 entry",
        "should have at least 1 items",
    ),
    Refused(
        "null-id", {"layers": {"ids": [None]}}, "spec.layers.ids[0]", "null is not a whole number", "must be of type"
    ),
    Refused(
        "one-id-without-list",
        {"layers": {"ids": 3}},
        "spec.layers.ids",
        "3 is not a list; write it as [3]",
        "must be of type array",
    ),
    Refused(
        "broken-range",
        {"layers": {"ranges": ["8-"]}},
        "spec.layers.ranges[0]",
        "'8-' does not have the form",
        "should match",
    ),
    Refused(
        "not-all",
        {"layers": {"all": False}},
        "spec.layers.all",
        "false is not one of true",
        'Unsupported value: false: supported values: "true"',
    ),
    Refused(
        "empty-module",
        {"layers": {"modules": [""]}},
        "spec.layers.modules[0]",
        "'' has 0 characters, too few; use at least 1 character",
        "should be at least 1 chars long",
    ),
    Refused(
        "rank-zero",
        {"lora": {"rank": 0}},
        "spec.lora.rank",
        "0 is too small; use at least 1",
        "should be greater than or equal to 1",
    ),
    Refused(
        "rank-fraction",
        {"lora": {"rank": 8.5}},
        "spec.lora.rank",
        "8.5 is not a whole number",
        "must be of type integer",
    ),
    Refused(
        "text-for-number",
        {"resources": {"gpus": "4"}},
        "spec.resources.gpus",
        "'4' is not a whole number; write it without quotes",
        "must be of type int",
    ),
    Refused(
        "true-for-number",
        {"resources": {"gpus": True}},
        "spec.resources.gpus",
        "true is not a whole number",
        "must be of type int",
    ),
    Refused(
        "number-for-text",
        {"model": {"revision": 1234567}},
        "spec.model.revision",
        "1234567 is not text; put it in quotes",
        "must be of type string",
    ),
    Refused(
        "true-for-a-word",
        {"training": {"gradientCheckpointing": True}},
        "spec.training.gradientCheckpointing",
        "true is not one of auto, always, never, offload",
        "must be of type string",
    ),
    Refused(
        "epochs-zero",
        {"training": {"epochs": 0}},
        "spec.training.epochs",
        "0 is too small; use more than 0",
        "should be greater than 0",
    ),
    Refused(
        "dropout-one",
        {"lora": {"dropout": 1}},
        "spec.lora.dropout",
        "1 is too large; use less than 1",
        "should be less than 1",
    ),
    Refused(
        "micro-batch-word",
        {"training": {"microBatchSize": "most"}},
        "spec.training.microBatchSize",
        "'most' is not 'auto' or a whole number",
        "use 'auto' or a number of at least 1",
    ),
    Refused(
        "micro-batch-zero",
        {"training": {"microBatchSize": 0}},
        "spec.training.microBatchSize",
        "0 is not 'auto' or a number of at least 1",
        "should be greater than or equal to 1",
    ),
    Refused(
        "micro-batch-huge",
        {"training": {"microBatchSize": 70_000, "batchSize": 70_000}},
        "spec.training.microBatchSize",
        "70000 is not 'auto' or a number of at most 65536",
        "should be less than or equal to 65536",
    ),
    Refused(
        "cpu-fraction",
        {"resources": {"cpu": 0.5}},
        "spec.resources.cpu",
        "0.5 is not text; put it in quotes",
        "must be of type integer,string",
    ),
    Refused(
        "cpu-negative",
        {"resources": {"cpu": -1}},
        "spec.resources.cpu",
        "'-1' does not have the form",
        "should be greater than or equal to 0",
    ),
    Refused(
        "memory-unit",
        {"resources": {"memory": "64 GB"}},
        "spec.resources.memory",
        "'64 GB' does not have the form",
        "should match",
    ),
    Refused(
        "zero-stage-four",
        {"parallelism": {"strategy": "deepspeed", "zeroStage": 4}},
        "spec.parallelism.zeroStage",
        "4 is not one of 1, 2, 3",
        'Unsupported value: 4: supported values: "1", "2", "3"',
    ),
    Refused(
        "long-label-key",
        {"scheduling": {"nodeSelector": {"k" * 318: "v"}}},
        "spec.scheduling.nodeSelector",
        "use at most 317 characters",
        "a key is longer than 317 characters",
    ),
)
"""Fields that are wrong by themselves: the API server has its own words for types and bounds."""

UNKNOWN_FIELDS = (
    Refused("trainning", {"trainning": {}}, "spec.trainning", "unknown field; did you mean training or trainer?"),
    Refused(
        "learning_rate", {"training": {"learning_rate": 1}}, "spec.training.learning_rate", "did you mean learningRate?"
    ),
    Refused(
        "far-off", {"output": {"zzz": 1}}, "spec.output.zzz", "unknown field; remove it. Known here: uri, s3, merge"
    ),
    Refused(
        "in-a-list",
        {"dataset": {"uri": ..., "sources": [{"uri": "s3://b/a", "wheight": 2}]}},
        "spec.dataset.sources[0].wheight",
        "unknown field; did you mean weight?",
    ),
)
"""The API server refuses these under `fieldValidation: Strict`, which kubectl asks for."""
