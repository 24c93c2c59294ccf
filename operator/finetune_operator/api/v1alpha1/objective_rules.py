"""Rules about preference objectives and method head; `rules.RULES` has them with all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_operator.api.v1alpha1.rule import Rule

if TYPE_CHECKING:
    from finetune_operator.api.v1alpha1.job import FineTuneJobSpec

_TUNABLE = ("full", "freeze", "lora", "qlora", "bitfit")
_JUDGED = ("preference", "unpaired")
_GENERATED = {"bleu", "rouge", "exactMatch"}
_OF_REGRESSION = {"mse", "pearson", "spearman"}


def _listed(words: tuple[str, ...]) -> str:
    return ", ".join(f"'{word}'" for word in words)


def _is_plain(spec: FineTuneJobSpec) -> bool:
    """Whether a job learns given answers or text."""
    return spec.training.objective == "sft" and spec.method != "head"


def _format_fits(spec: FineTuneJobSpec) -> bool:
    wanted, objective = spec.dataset.format, spec.training.objective
    if wanted == "auto":
        return True
    if spec.method == "head":
        return wanted == "labeled"
    if objective == "sft":
        return wanted not in (*_JUDGED, "labeled")
    return wanted in (_JUDGED if objective == "kto" else ("preference",))


def _predicts(spec: FineTuneJobSpec, task: str) -> bool:
    return spec.method == "head" and (spec.head.task if spec.head is not None else "classification") == task


_PLAIN = "(self.training.objective == 'sft' && self.method != 'head')"
_REGRESSION = "(self.method == 'head' && has(self.head) && self.head.task == 'regression')"
_CLASSIFICATION = "(self.method == 'head' && (!has(self.head) || self.head.task == 'classification'))"

OBJECTIVE_RULES: tuple[Rule, ...] = (
    Rule(
        "training.preference",
        "!has(self.training.preference) || self.training.objective != 'sft'",
        lambda s: s.training.preference is None or s.training.objective != "sft",
        "preference is for objective dpo, kto, orpo and simpo; remove it, or change objective {training.objective}",
    ),
    Rule(
        "training.objective",
        f"self.training.objective == 'sft' || self.method in [{_listed(_TUNABLE)}]",
        lambda s: s.training.objective == "sft" or s.method in _TUNABLE,
        "objective {training.objective} is for method full, freeze, lora, qlora and bitfit; change method {method}",
    ),
    Rule(
        "layers.unfreeze",
        "self.training.objective == 'sft' || !has(self.layers) || !has(self.layers.unfreeze)",
        lambda s: s.training.objective == "sft" or s.layers is None or s.layers.unfreeze is None,
        "progressive unfreezing is for objective sft; remove unfreeze",
    ),
    Rule(
        "parallelism.strategy",
        f"{_PLAIN} || self.parallelism.strategy in ['auto', 'ddp']",
        lambda s: _is_plain(s) or s.parallelism.strategy in ("auto", "ddp"),
        "preference objectives and method head train whole on each GPU; use auto or ddp, not {parallelism.strategy}",
    ),
    Rule(
        "dataset.packing",
        f"{_PLAIN} || !self.dataset.packing",
        lambda s: _is_plain(s) or not s.dataset.packing,
        "preference objectives and method head look at each sample as a whole; set packing: false",
    ),
    Rule(
        "dataset.trainOnPrompt",
        f"{_PLAIN} || !self.dataset.trainOnPrompt",
        lambda s: _is_plain(s) or not s.dataset.train_on_prompt,
        "preference objectives and method head learn nothing from prompts; set trainOnPrompt: false",
    ),
    Rule(
        "dataset.format",
        "self.dataset.format == 'auto' || (self.method == 'head' ? self.dataset.format == 'labeled' : "
        "(self.training.objective == 'sft' ? !(self.dataset.format in ['preference', 'unpaired', 'labeled']) : "
        "(self.dataset.format == 'preference' || (self.training.objective == 'kto' && "
        "self.dataset.format == 'unpaired'))))",
        _format_fits,
        "format {dataset.format} does not serve objective {training.objective} with method {method}: dpo, orpo and "
        "simpo take preference, kto that or unpaired, method head labeled, and sft none of these",
    ),
    Rule(
        "head",
        "!has(self.head) || self.method == 'head'",
        lambda s: s.head is None or s.method == "head",
        "head is for method head; remove it, or change method {method}",
    ),
    Rule(
        "head.labels",
        "!has(self.head) || !has(self.head.labels) || self.head.task == 'classification'",
        lambda s: s.head is None or s.head.labels is None or s.head.task == "classification",
        "labels are names of classes; remove them, or set task: classification",
    ),
    Rule(
        "layers.modules",
        "self.method != 'head' || !has(self.layers) || !has(self.layers.modules) || self.layers.modules.size() == 0 || "
        "has(self.layers.last) || has(self.layers.first) || has(self.layers.ids) || has(self.layers.ranges) || "
        "has(self.layers.every) || has(self.layers.all)",
        lambda s: (
            s.method != "head"
            or s.layers is None
            or not s.layers.modules
            or any((s.layers.last, s.layers.first, s.layers.ids, s.layers.ranges, s.layers.every, s.layers.all))
        ),
        "method head trains no block unless told to; set one of last, first, ids, ranges, every, all as well",
    ),
    Rule(
        "evaluation.metrics",
        "self.training.objective != 'sft' || !self.evaluation.metrics.exists(m, m in ['rewardAccuracy', "
        "'rewardMargin'])",
        lambda s: (
            s.training.objective != "sft" or not {"rewardAccuracy", "rewardMargin"}.intersection(s.evaluation.metrics)
        ),
        "rewardAccuracy and rewardMargin are of preference objectives; remove them, or change objective "
        "{training.objective}",
    ),
    Rule(
        "evaluation.metrics",
        f"!{_PLAIN} || !self.evaluation.metrics.exists(m, m == 'loss')",
        lambda s: not _is_plain(s) or "loss" not in s.evaluation.metrics,
        "loss is a metric of preference objectives and method head; use perplexity, which is its exponential",
    ),
    Rule(
        "evaluation.metrics",
        f"{_CLASSIFICATION} || !self.evaluation.metrics.exists(m, m == 'macroF1')",
        lambda s: _predicts(s, "classification") or "macroF1" not in s.evaluation.metrics,
        "macroF1 is of method head with task classification; remove it",
    ),
    Rule(
        "evaluation.metrics",
        f"{_REGRESSION} || !self.evaluation.metrics.exists(m, m in ['mse', 'pearson', 'spearman'])",
        lambda s: _predicts(s, "regression") or not _OF_REGRESSION.intersection(s.evaluation.metrics),
        "mse, pearson and spearman are of method head with task regression; remove them",
    ),
    Rule(
        "evaluation.metrics",
        "self.method != 'head' || !self.evaluation.metrics.exists(m, m in ['bleu', 'rouge', 'exactMatch'])",
        lambda s: s.method != "head" or not _GENERATED.intersection(s.evaluation.metrics),
        "bleu, rouge and exactMatch are of generated text, and method head generates none; remove them",
    ),
    Rule(
        "evaluation.gates",
        "self.method != 'head' || !has(self.evaluation.gates) || !self.evaluation.gates.exists(g, g.metric == "
        "'perplexity')",
        lambda s: s.method != "head" or all(gate.metric != "perplexity" for gate in s.evaluation.gates),
        "method head has no perplexity; set the gate on accuracy, macroF1, mse, pearson, spearman or loss",
    ),
)
