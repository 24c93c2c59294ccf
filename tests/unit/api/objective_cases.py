"""Broken rules about preference objectives and method head, and what is accepted of them."""

from __future__ import annotations

from typing import Any

UNPACKED: dict[str, Any] = {"dataset": {"packing": False}}
DPO: dict[str, Any] = {**UNPACKED, "training": {"objective": "dpo"}}
HEAD: dict[str, Any] = {**UNPACKED, "method": "head"}
REGRESSION: dict[str, Any] = {**HEAD, "head": {"task": "regression"}}

_PREFERENCE = "preference is for objective dpo, kto, orpo and simpo; remove it, or change objective sft"
_METHOD = "objective {} is for method full, freeze, lora, qlora and bitfit; change method {}"
_WHOLE = "preference objectives and method head look at each sample as a whole; set packing: false"
_STRATEGY = "preference objectives and method head train whole on each GPU; use auto or ddp, not {}"
_FORMAT = (
    "format {} does not serve objective {} with method {}: dpo, orpo and simpo take preference, kto that or unpaired, "
    "method head labeled, and sft none of these"
)
_REWARDS = "rewardAccuracy and rewardMargin are of preference objectives; remove them, or change objective sft"
_NUMBERS = "mse, pearson and spearman are of method head with task regression; remove them"
_F1 = "macroF1 is of method head with task classification; remove it"


def _with_format(base: dict[str, Any], wanted: str, **changes: Any) -> dict[str, Any]:
    return {**base, "dataset": {"packing": False, "format": wanted}, **changes}


def _with_metric(base: dict[str, Any], metric: str) -> dict[str, Any]:
    return {**base, "evaluation": {"metrics": [metric]}}


OBJECTIVE_CASES: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("preference-sft", {"training": {"preference": {}}}, "spec.training.preference", _PREFERENCE),
    ("dpo-ia3", {**DPO, "method": "ia3"}, "spec.training.objective", _METHOD.format("dpo", "ia3")),
    (
        "head-kto",
        {**HEAD, "training": {"objective": "kto"}},
        "spec.training.objective",
        _METHOD.format("kto", "head"),
    ),
    (
        "dpo-unfreeze",
        {**DPO, "method": "freeze", "layers": {"last": 2, "unfreeze": {"every": 1}}},
        "spec.layers.unfreeze",
        "progressive unfreezing is for objective sft; remove unfreeze",
    ),
    ("dpo-fsdp", {**DPO, "parallelism": {"strategy": "fsdp"}}, "spec.parallelism.strategy", _STRATEGY.format("fsdp")),
    (
        "head-deepspeed",
        {**HEAD, "parallelism": {"strategy": "deepspeed"}},
        "spec.parallelism.strategy",
        _STRATEGY.format("deepspeed"),
    ),
    ("dpo-packing", {"training": {"objective": "dpo"}}, "spec.dataset.packing", _WHOLE),
    ("head-packing", {"method": "head"}, "spec.dataset.packing", _WHOLE),
    (
        "orpo-prompts",
        {"dataset": {"packing": False, "trainOnPrompt": True}, "training": {"objective": "orpo"}},
        "spec.dataset.trainOnPrompt",
        "preference objectives and method head learn nothing from prompts; set trainOnPrompt: false",
    ),
    ("dpo-messages", _with_format(DPO, "messages"), "spec.dataset.format", _FORMAT.format("messages", "dpo", "lora")),
    ("dpo-unpaired", _with_format(DPO, "unpaired"), "spec.dataset.format", _FORMAT.format("unpaired", "dpo", "lora")),
    (
        "kto-text",
        _with_format(DPO, "text", training={"objective": "kto"}),
        "spec.dataset.format",
        _FORMAT.format("text", "kto", "lora"),
    ),
    ("head-text", _with_format(HEAD, "text"), "spec.dataset.format", _FORMAT.format("text", "sft", "head")),
    (
        "sft-pairs",
        {"dataset": {"format": "preference"}},
        "spec.dataset.format",
        _FORMAT.format("preference", "sft", "lora"),
    ),
    ("head-lora", {"head": {}}, "spec.head", "head is for method head; remove it, or change method lora"),
    (
        "labels-regression",
        {**HEAD, "head": {"task": "regression", "labels": ["a", "b"]}},
        "spec.head.labels",
        "labels are names of classes; remove them, or set task: classification",
    ),
    (
        "head-modules",
        {**HEAD, "layers": {"modules": ["mlp"]}},
        "spec.layers.modules",
        "method head trains no block unless told to; set one of last, first, ids, ranges, every, all as well",
    ),
    ("rewards-sft", _with_metric({}, "rewardMargin"), "spec.evaluation.metrics", _REWARDS),
    (
        "loss-sft",
        _with_metric({}, "loss"),
        "spec.evaluation.metrics",
        "loss is a metric of preference objectives and method head; use perplexity, which is its exponential",
    ),
    ("f1-regression", _with_metric(REGRESSION, "macroF1"), "spec.evaluation.metrics", _F1),
    ("f1-lora", _with_metric({}, "macroF1"), "spec.evaluation.metrics", _F1),
    ("mse-classification", _with_metric(HEAD, "mse"), "spec.evaluation.metrics", _NUMBERS),
    ("pearson-lora", _with_metric({}, "pearson"), "spec.evaluation.metrics", _NUMBERS),
    (
        "bleu-head",
        {**HEAD, "dataset": {"packing": False, "validation": {"fraction": 0.1}}, "evaluation": {"metrics": ["bleu"]}},
        "spec.evaluation.metrics",
        "bleu, rouge and exactMatch are of generated text, and method head generates none; remove them",
    ),
    (
        "perplexity-head",
        {**HEAD, "evaluation": {"gates": [{"metric": "perplexity", "max": 2}]}},
        "spec.evaluation.gates",
        "method head has no perplexity; set the gate on accuracy, macroF1, mse, pearson, spearman or loss",
    ),
)
"""Name, what is laid over the smallest spec, the field to blame, and what is said of it."""

OBJECTIVES_ACCEPTED: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "dpo",
        {**_with_format(DPO, "preference"), "evaluation": {"metrics": ["rewardAccuracy", "rewardMargin", "loss"]}},
    ),
    ("kto-unpaired", _with_format(DPO, "unpaired", training={"objective": "kto", "preference": {"chosenWeight": 2}})),
    ("kto-pairs", _with_format(DPO, "preference", training={"objective": "kto"})),
    ("simpo-qlora", {**DPO, "method": "qlora", "training": {"objective": "simpo", "preference": {"beta": 2.5}}}),
    ("orpo-full", {**DPO, "method": "full", "training": {"objective": "orpo"}}),
    ("head", _with_metric(_with_format(HEAD, "labeled", layers={"last": 2, "modules": ["mlp"]}), "macroF1")),
    ("head-named", {**HEAD, "head": {"labels": ["a", "b"], "dense": [64], "dropout": 0.1}}),
    ("head-numbers", _with_metric(REGRESSION, "spearman")),
)
