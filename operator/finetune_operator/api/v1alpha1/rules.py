"""Every rule between fields, once: as CEL for the API server and as Python for `finetune validate` and the operator.

A rule's message is a template: `{training.batchSize}` stands for that field's value, on both sides. Tests run every
rule against both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_operator.api.v1alpha1.objective_rules import OBJECTIVE_RULES
from finetune_operator.api.v1alpha1.rule import Rule
from finetune_operator.api.v1alpha1.tuning_rules import TUNING_RULES

if TYPE_CHECKING:
    from finetune_operator.api.v1alpha1.job import FineTuneJobSpec

IMMUTABLE = (
    "model",
    "dataset",
    "method",
    "layers",
    "lora",
    "prompt",
    "quantization",
    "head",
    "training",
    "parallelism",
    "resources",
    "scheduling",
    "output",
    "evaluation",
    "adapters",
    "checkpoints",
    "trainer",
)
"""Fields of spec that may not change after creation."""


def _selectors(spec: FineTuneJobSpec) -> int:
    layers = spec.layers
    if layers is None:
        return 0
    chosen = (layers.last, layers.first, layers.ids, layers.ranges, layers.every, layers.all)
    return sum(one is not None for one in chosen)


def _uses_offload(spec: FineTuneJobSpec) -> bool:
    offload = spec.parallelism.offload
    return offload.optimizer != "none" or offload.parameters != "none"


def _shards_parameters(spec: FineTuneJobSpec) -> bool:
    strategy = spec.parallelism.strategy
    return strategy == "fsdp" or (strategy == "deepspeed" and spec.parallelism.zero_stage == 3)


def _processes(spec: FineTuneJobSpec) -> int:
    return max(1, spec.resources.gpus)


def _micro_batch_divides(spec: FineTuneJobSpec) -> bool:
    micro = spec.training.micro_batch_size
    return micro == "auto" or spec.training.batch_size % (micro * _processes(spec)) == 0


def _validation_is_one(spec: FineTuneJobSpec) -> bool:
    validation = spec.dataset.validation
    if validation is None:
        return True
    return sum(one is not None for one in (validation.fraction, validation.count, validation.uri)) == 1


_PROCESSES = "(self.resources.gpus > 0 ? self.resources.gpus : 1)"

RULES: tuple[Rule, ...] = (
    Rule(
        "layers",
        "!has(self.layers) || [has(self.layers.last), has(self.layers.first), has(self.layers.ids), "
        "has(self.layers.ranges), has(self.layers.every), has(self.layers.all)].filter(x, x).size() <= 1",
        lambda s: _selectors(s) <= 1,
        "more than one selector; set exactly one of last, first, ids, ranges, every, all",
    ),
    Rule(
        "layers",
        "self.method != 'freeze' || (has(self.layers) && (has(self.layers.last) || has(self.layers.first) || "
        "has(self.layers.ids) || has(self.layers.ranges) || has(self.layers.every) || has(self.layers.all)))",
        lambda s: s.method != "freeze" or _selectors(s) > 0,
        "freeze has to know which blocks stay trainable; set one of last, first, ids, ranges, every, all",
    ),
    Rule(
        "layers",
        "!has(self.layers) || !(self.method in ['prefix', 'prompt'])",
        lambda s: s.layers is None or s.method not in ("prefix", "prompt"),
        "method {method} has no choice of layers; remove layers",
    ),
    Rule(
        "layers.unfreeze",
        "!has(self.layers) || !has(self.layers.unfreeze) || (self.method in ['full', 'freeze', 'bitfit'] && "
        "self.parallelism.strategy in ['auto', 'ddp'])",
        lambda s: (
            s.layers is None
            or s.layers.unfreeze is None
            or (s.method in ("full", "freeze", "bitfit") and s.parallelism.strategy in ("auto", "ddp"))
        ),
        "progressive unfreezing works with method full, freeze or bitfit and strategy auto or ddp (sharded optimizers "
        "fix their parameters at the start); remove unfreeze or change method {method}, strategy "
        "{parallelism.strategy}",
    ),
    Rule(
        "lora",
        "!has(self.lora) || self.method in ['lora', 'qlora']",
        lambda s: s.lora is None or s.method in ("lora", "qlora"),
        "lora is for method lora and qlora; remove it, or change method {method}",
    ),
    *TUNING_RULES,
    *OBJECTIVE_RULES,
    Rule(
        "quantization",
        "!has(self.quantization) || self.method == 'qlora'",
        lambda s: s.quantization is None or s.method == "qlora",
        "quantization is for method qlora; remove it, or change method {method}",
    ),
    Rule(
        "quantization.keepTransposed",
        "!has(self.quantization) || self.quantization.keepTransposed == 'auto' || self.quantization.type == 'fp8'",
        lambda s: s.quantization is None or s.quantization.keep_transposed == "auto" or s.quantization.type == "fp8",
        "keepTransposed is for type fp8; remove it, or use type fp8 instead of {quantization.type}",
    ),
    Rule(
        "dataset",
        "has(self.dataset.uri) != has(self.dataset.sources)",
        lambda s: (s.dataset.uri is None) != (s.dataset.sources is None),
        "set exactly one of uri and sources",
    ),
    Rule(
        "dataset.validation",
        "!has(self.dataset.validation) || [has(self.dataset.validation.fraction), has(self.dataset.validation.count), "
        "has(self.dataset.validation.uri)].filter(x, x).size() == 1",
        _validation_is_one,
        "set exactly one of fraction, count and uri",
    ),
    Rule(
        "dataset.maskHistory",
        "!self.dataset.maskHistory || !self.dataset.trainOnPrompt",
        lambda s: not (s.dataset.mask_history and s.dataset.train_on_prompt),
        "maskHistory takes the loss over the last answer alone, trainOnPrompt over everything; set one of them",
    ),
    Rule(
        "resources.gpusPerNode",
        "has(self.resources.gpusPerNode) ? self.resources.gpus % self.resources.gpusPerNode == 0 : "
        "(self.resources.gpus <= 8 || self.resources.gpus % 8 == 0)",
        lambda s: s.resources.gpus % (s.resources.gpus_per_node or min(8, max(1, s.resources.gpus))) == 0,
        "gpus {resources.gpus} cannot be spread evenly over pods of gpusPerNode GPUs (8 where it is not set); choose a "
        "gpusPerNode that divides it",
    ),
    Rule(
        "training.batchSize",
        f"self.training.batchSize % {_PROCESSES} == 0",
        lambda s: s.training.batch_size % _processes(s) == 0,
        "batchSize {training.batchSize} is not divisible by gpus {resources.gpus}; use a multiple",
    ),
    Rule(
        "training.microBatchSize",
        "type(self.training.microBatchSize) == int ? self.training.microBatchSize > 0 : "
        "self.training.microBatchSize == 'auto'",
        lambda s: True,  # the field's own type says so
        "use 'auto' or a number of at least 1",
    ),
    Rule(
        "training.microBatchSize",
        "type(self.training.microBatchSize) != int || self.training.microBatchSize < 1 || "
        f"self.training.batchSize % (self.training.microBatchSize * {_PROCESSES}) == 0",
        _micro_batch_divides,
        "batchSize {training.batchSize} is not divisible by microBatchSize {training.microBatchSize} times gpus "
        "{resources.gpus}; use a divisor, or auto",
    ),
    Rule(
        "parallelism.zeroStage",
        "!has(self.parallelism.zeroStage) || self.parallelism.strategy == 'deepspeed'",
        lambda s: s.parallelism.zero_stage is None or s.parallelism.strategy == "deepspeed",
        "zeroStage needs strategy deepspeed, not {parallelism.strategy}",
    ),
    Rule(
        "parallelism.deepspeed",
        "!has(self.parallelism.deepspeed) || self.parallelism.strategy == 'deepspeed'",
        lambda s: s.parallelism.deepspeed is None or s.parallelism.strategy == "deepspeed",
        "a DeepSpeed configuration needs strategy deepspeed, not {parallelism.strategy}",
    ),
    Rule(
        "parallelism.offload",
        "(self.parallelism.offload.optimizer == 'none' && self.parallelism.offload.parameters == 'none') || "
        "self.parallelism.strategy in ['deepspeed', 'fsdp']",
        lambda s: not _uses_offload(s) or s.parallelism.strategy in ("deepspeed", "fsdp"),
        "offload needs strategy deepspeed or fsdp, not {parallelism.strategy}",
    ),
    Rule(
        "parallelism.offload.parameters",
        "self.parallelism.offload.parameters == 'none' || self.parallelism.strategy == 'fsdp' || "
        "(has(self.parallelism.zeroStage) && self.parallelism.zeroStage == 3)",
        lambda s: s.parallelism.offload.parameters == "none" or _shards_parameters(s),
        "parameters can be offloaded where they are sharded; use fsdp, or deepspeed with zeroStage 3",
    ),
    Rule(
        "model.revision",
        "!has(self.model.revision) || self.model.uri.startsWith('hf://')",
        lambda s: s.model.revision is None or s.model.uri.startswith("hf://"),
        "revision is for hf:// models; remove it, or put the version in the path of {model.uri}",
    ),
    Rule(
        "model.tokenSecretRef",
        "!has(self.model.tokenSecretRef) || self.model.uri.startsWith('hf://')",
        lambda s: s.model.token_secret_ref is None or s.model.uri.startswith("hf://"),
        "tokenSecretRef is for hf:// models; for s3:// use output.s3.secretRef",
    ),
    Rule(
        "output.merge",
        "self.output.merge == 'none' || self.method in ['lora', 'qlora', 'freeze', 'bitfit', 'ia3']",
        lambda s: s.output.merge == "none" or s.method in ("lora", "qlora", "freeze", "bitfit", "ia3"),
        "method {method} leaves nothing to merge; use merge: none",
    ),
    Rule(
        "output.merge",
        "self.output.merge != 'dequantized' || self.method == 'qlora'",
        lambda s: s.output.merge != "dequantized" or s.method == "qlora",
        "only qlora has a quantized base; use merge: base16 with method {method}",
    ),
    Rule(
        "evaluation.gates",
        "!has(self.evaluation.gates) || self.evaluation.gates.all(g, g.metric in self.evaluation.metrics)",
        lambda s: all(gate.metric in s.evaluation.metrics for gate in s.evaluation.gates),
        "a gate is on a metric that is not computed; add it to evaluation.metrics",
    ),
    Rule(
        "evaluation.gates",
        "!has(self.evaluation.gates) || self.evaluation.gates.all(g, has(g.max) || has(g.min))",
        lambda s: all(gate.max is not None or gate.min is not None for gate in s.evaluation.gates),
        "a gate has neither max nor min; set one",
    ),
    Rule(
        "evaluation.gates",
        "!has(self.evaluation.gates) || self.evaluation.gates.size() == 0 || has(self.dataset.validation)",
        lambda s: not s.evaluation.gates or s.dataset.validation is not None,
        "gates need held-out data; set dataset.validation",
    ),
    Rule(
        "evaluation.metrics",
        "has(self.dataset.validation) || !self.evaluation.metrics.exists(m, m in ['bleu', 'rouge', 'exactMatch'])",
        lambda s: (
            s.dataset.validation is not None or not {"bleu", "rouge", "exactMatch"}.intersection(s.evaluation.metrics)
        ),
        "bleu, rouge and exactMatch compare answers to held-out questions; set dataset.validation",
    ),
)

IMMUTABLE_MESSAGE = "cannot change after creation (only runPolicy can); delete the job, or create one of another name"


def violations(spec: FineTuneJobSpec) -> list[str]:
    """`field: message` for every rule that a spec breaks, or one of its adapters with its own words."""
    broken = [rule for rule in RULES if not rule.kept(spec)]
    found = [f"spec.{rule.field}: {rule.explain(spec)}" for rule in broken]
    for number, (_, stage) in enumerate(spec.stages()):
        own = [rule for rule in RULES if rule not in broken and not rule.kept(stage)]
        found += [f"spec.adapters[{number}].{rule.field}: {rule.explain(stage)}" for rule in own]
    return found


def refused_changes(old: FineTuneJobSpec, new: FineTuneJobSpec) -> list[str]:
    """`field: message` for every immutable field that differs."""
    before, after = old.to_wire(), new.to_wire()
    return [f"spec.{name}: {IMMUTABLE_MESSAGE}" for name in IMMUTABLE if before.get(name) != after.get(name)]
