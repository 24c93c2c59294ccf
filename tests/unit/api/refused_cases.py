"""Broken rules between fields, in the words of both sides."""

from __future__ import annotations

from tests.unit.api.manifests import GATE, HELD_OUT, Refused
from tests.unit.api.objective_cases import OBJECTIVE_CASES

ONE_SELECTOR = "more than one selector; set exactly one of last, first, ids, ranges, every, all"
NO_SELECTOR = "freeze has to know which blocks stay trainable; set one of last, first, ids, ranges, every, all"
NAME_FORM = (
    "its pods cannot be named after it; use lower-case letters, digits and '-', starting with a letter and ending with "
    "a letter or digit"
)
UNEVEN = (
    "gpus {} cannot be spread evenly over pods of gpusPerNode GPUs (8 where it is not set); choose a gpusPerNode that "
    "divides it"
)
UNFREEZE = (
    "progressive unfreezing works with method full, freeze or bitfit and strategy auto or ddp (sharded optimizers fix "
    "their parameters at the start); remove unfreeze or change method {}, strategy {}"
)
LOFTQ = "loftq makes up for the rounding of a 4-bit base; use it with method qlora and quantization.type nf4 or fp4"

BROKEN_RULES = (
    *(Refused(*case) for case in OBJECTIVE_CASES),
    Refused("two-selectors", {"layers": {"last": 2, "ids": [1]}}, "spec.layers", ONE_SELECTOR),
    Refused("ranges-and-every", {"layers": {"ranges": ["1-2"], "every": 2}}, "spec.layers", ONE_SELECTOR),
    Refused("first-and-all", {"layers": {"first": 1, "all": True}}, "spec.layers", ONE_SELECTOR),
    Refused("freeze-alone", {"method": "freeze"}, "spec.layers", NO_SELECTOR),
    Refused("freeze-modules", {"method": "freeze", "layers": {"modules": ["mlp"]}}, "spec.layers", NO_SELECTOR),
    Refused(
        "prompt-layers",
        {"method": "prompt", "layers": {"last": 1}},
        "spec.layers",
        "method prompt has no choice of layers; remove layers",
    ),
    Refused(
        "prefix-layers",
        {"method": "prefix", "layers": {"all": True}},
        "spec.layers",
        "method prefix has no choice of layers; remove layers",
    ),
    Refused(
        "unfreeze-lora",
        {"method": "lora", "layers": {"last": 2, "unfreeze": {"every": 10}}},
        "spec.layers.unfreeze",
        UNFREEZE.format("lora", "auto"),
    ),
    Refused(
        "unfreeze-deepspeed",
        {
            "method": "freeze",
            "layers": {"last": 2, "unfreeze": {"every": 10}},
            "parallelism": {"strategy": "deepspeed"},
        },
        "spec.layers.unfreeze",
        UNFREEZE.format("freeze", "deepspeed"),
    ),
    Refused(
        "lora-full",
        {"method": "full", "lora": {"rank": 8}},
        "spec.lora",
        "lora is for method lora and qlora; remove it, or change method full",
    ),
    Refused(
        "quantization-lora",
        {"quantization": {"type": "nf4"}},
        "spec.quantization",
        "quantization is for method qlora; remove it, or change method lora",
    ),
    Refused(
        "adapters-full",
        {"method": "full", "adapters": [{"name": "a"}]},
        "spec.adapters",
        "several adapters are for method lora and qlora with objective sft; remove adapters, or change method full, "
        "objective sft",
    ),
    Refused(
        "adapters-sharded",
        {"adapters": [{"name": "a"}], "parallelism": {"strategy": "fsdp"}},
        "spec.adapters",
        "several adapters share a base that every GPU holds; use strategy auto or ddp, not fsdp",
    ),
    Refused(
        "adapters-of-one-name",
        {"adapters": [{"name": "a"}, {"name": "b"}, {"name": "a"}]},
        "spec.adapters",
        "two adapters have the same name; name each differently",
    ),
    Refused("loftq-lora", {"lora": {"variant": "loftq"}}, "spec.lora.variant", LOFTQ),
    Refused(
        "loftq-int8",
        {"method": "qlora", "lora": {"variant": "loftq"}, "quantization": {"type": "int8"}},
        "spec.lora.variant",
        LOFTQ,
    ),
    Refused(
        "loftq-fp8",
        {"method": "qlora", "lora": {"variant": "loftq"}, "quantization": {"type": "fp8"}},
        "spec.lora.variant",
        LOFTQ,
    ),
    Refused(
        "transposed-nf4",
        {"method": "qlora", "quantization": {"keepTransposed": "never"}},
        "spec.quantization.keepTransposed",
        "keepTransposed is for type fp8; remove it, or use type fp8 instead of nf4",
    ),
    Refused(
        "loftq-merge",
        {"method": "qlora", "lora": {"variant": "loftq"}, "output": {"merge": "base16"}},
        "spec.output.merge",
        "a loftq adapter makes up for the rounding of the 4-bit base, which the 16-bit base does not have; use merge: "
        "dequantized",
    ),
    Refused(
        "prompt-ia3",
        {"method": "ia3", "prompt": {"virtualTokens": 4}},
        "spec.prompt",
        "prompt is for method prefix, prompt and adapter; remove it, or change method ia3",
    ),
    Refused(
        "prefix-vocabulary",
        {"method": "prefix", "prompt": {"initialization": "vocabulary"}},
        "spec.prompt.initialization",
        "starting from the vocabulary is for method prompt; use random with method prefix",
    ),
    Refused(
        "adapter-projection",
        {"method": "adapter", "prompt": {"projection": True}},
        "spec.prompt.projection",
        "a projection is for method prefix; remove it, or change method adapter",
    ),
    Refused(
        "projection-size",
        {"method": "prefix", "prompt": {"projectionSize": 8}},
        "spec.prompt.projectionSize",
        "there is no projection; set prompt.projection, or remove projectionSize",
    ),
    *(
        Refused(
            f"scheduler-{option}",
            {"training": {"scheduler": "linear", "schedulerOptions": {option: value}}},
            f"spec.training.schedulerOptions.{option}",
            f"{option} is for scheduler {schedulers}; remove it, or change scheduler linear",
        )
        for option, value, schedulers in (
            ("minLearningRateRatio", 0.1, "cosine_with_min_lr and polynomial and warmup_stable_decay"),
            ("cycles", 2, "cosine_with_restarts"),
            ("power", 2.0, "polynomial"),
            ("decayRatio", 0.5, "warmup_stable_decay"),
            ("decayType", "linear", "warmup_stable_decay"),
        )
    ),
    Refused("no-data", {"dataset": {"uri": ...}}, "spec.dataset", "set exactly one of uri and sources"),
    Refused(
        "data-twice",
        {"dataset": {"sources": [{"uri": "s3://b/a"}]}},
        "spec.dataset",
        "set exactly one of uri and sources",
    ),
    Refused(
        "validation-empty",
        {"dataset": {"validation": {}}},
        "spec.dataset.validation",
        "set exactly one of fraction, count and uri",
    ),
    Refused(
        "validation-twice",
        {"dataset": {"validation": {"fraction": 0.1, "uri": "s3://b/a"}}},
        "spec.dataset.validation",
        "set exactly one of fraction, count and uri",
    ),
    Refused(
        "validation-count-and-fraction",
        {"dataset": {"validation": {"fraction": 0.1, "count": 5}}},
        "spec.dataset.validation",
        "set exactly one of fraction, count and uri",
    ),
    Refused(
        "mask-history-and-prompt",
        {"dataset": {"maskHistory": True, "trainOnPrompt": True}},
        "spec.dataset.maskHistory",
        "maskHistory takes the loss over the last answer alone, trainOnPrompt over everything; set one of them",
    ),
    Refused(
        "answers-without-questions",
        {"evaluation": {"metrics": ["perplexity", "rouge"]}},
        "spec.evaluation.metrics",
        "bleu, rouge and exactMatch compare answers to held-out questions; set dataset.validation",
    ),
    Refused(
        "gpus-uneven",
        {"resources": {"gpus": 6, "gpusPerNode": 4}, "training": {"batchSize": 12}},
        "spec.resources.gpusPerNode",
        UNEVEN.format(6),
    ),
    Refused(
        "gpus-beyond-a-node",
        {"resources": {"gpus": 12}, "training": {"batchSize": 12}},
        "spec.resources.gpusPerNode",
        UNEVEN.format(12),
    ),
    Refused(
        "more-per-node-than-gpus",
        {"resources": {"gpus": 2, "gpusPerNode": 4}},
        "spec.resources.gpusPerNode",
        UNEVEN.format(2),
    ),
    Refused(
        "batch-by-gpus",
        {"training": {"batchSize": 10}, "resources": {"gpus": 4}},
        "spec.training.batchSize",
        "batchSize 10 is not divisible by gpus 4; use a multiple",
    ),
    Refused(
        "micro-batch",
        {"training": {"batchSize": 16, "microBatchSize": 3}},
        "spec.training.microBatchSize",
        "batchSize 16 is not divisible by microBatchSize 3 times gpus 1; use a divisor, or auto",
    ),
    Refused(
        "micro-batch-by-gpus",
        {"training": {"batchSize": 16, "microBatchSize": 8}, "resources": {"gpus": 4}},
        "spec.training.microBatchSize",
        "batchSize 16 is not divisible by microBatchSize 8 times gpus 4; use a divisor, or auto",
    ),
    Refused(
        "micro-batch-on-cpu",
        {"training": {"batchSize": 16, "microBatchSize": 5}, "resources": {"gpus": 0}},
        "spec.training.microBatchSize",
        "batchSize 16 is not divisible by microBatchSize 5 times gpus 0; use a divisor, or auto",
    ),
    Refused(
        "zero-stage",
        {"parallelism": {"strategy": "ddp", "zeroStage": 2}},
        "spec.parallelism.zeroStage",
        "zeroStage needs strategy deepspeed, not ddp",
    ),
    Refused(
        "deepspeed-configuration",
        {"parallelism": {"deepspeed": {"a": 1}}},
        "spec.parallelism.deepspeed",
        "a DeepSpeed configuration needs strategy deepspeed, not auto",
    ),
    Refused(
        "offload",
        {"parallelism": {"offload": {"optimizer": "cpu"}}},
        "spec.parallelism.offload",
        "offload needs strategy deepspeed or fsdp, not auto",
    ),
    Refused(
        "offload-parameters",
        {"parallelism": {"strategy": "deepspeed", "zeroStage": 2, "offload": {"parameters": "cpu"}}},
        "spec.parallelism.offload.parameters",
        "parameters can be offloaded where they are sharded; use fsdp, or deepspeed with zeroStage 3",
    ),
    Refused(
        "revision",
        {"model": {"uri": "s3://b/model", "revision": "v1"}},
        "spec.model.revision",
        "revision is for hf:// models; remove it, or put the version in the path of s3://b/model",
    ),
    Refused(
        "token",
        {"model": {"uri": "pvc://claim/model", "tokenSecretRef": {"name": "hf"}}},
        "spec.model.tokenSecretRef",
        "tokenSecretRef is for hf:// models; for s3:// use output.s3.secretRef",
    ),
    Refused(
        "merge-full",
        {"method": "full", "output": {"merge": "base16"}},
        "spec.output.merge",
        "method full leaves nothing to merge; use merge: none",
    ),
    Refused(
        "merge-dequantized",
        {"output": {"merge": "dequantized"}},
        "spec.output.merge",
        "only qlora has a quantized base; use merge: base16 with method lora",
    ),
    Refused(
        "gate-not-computed",
        {"evaluation": {"metrics": ["accuracy"], "gates": [GATE]}, "dataset": HELD_OUT},
        "spec.evaluation.gates",
        "a gate is on a metric that is not computed; add it to evaluation.metrics",
    ),
    Refused(
        "gate-without-bound",
        {"evaluation": {"gates": [{"metric": "accuracy"}]}, "dataset": HELD_OUT},
        "spec.evaluation.gates",
        "a gate has neither max nor min; set one",
    ),
    Refused(
        "gate-without-data",
        {"evaluation": {"gates": [GATE]}},
        "spec.evaluation.gates",
        "gates need held-out data; set dataset.validation",
    ),
    Refused(
        "long-name",
        {},
        "metadata.name",
        "longer than 40 characters, which leaves no room for the names of its pods; use a shorter name",
        name="a" * 41,
    ),
    Refused("name-with-dot", {}, "metadata.name", NAME_FORM, name="medical.qa"),
    Refused("name-with-digit-first", {}, "metadata.name", NAME_FORM, name="7b"),
)
"""Rules between fields: both sides use the same words."""
