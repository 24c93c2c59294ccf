"""Rules about variants of adapters, prompts and schedulers; `rules.RULES` has them with all others."""

from __future__ import annotations

from finetune_operator.api.v1alpha1.rule import Rule


def _scheduler_takes(option: str, schedulers: tuple[str, ...]) -> Rule:
    """An option of the learning rate's course is for some courses only."""
    field = "".join(part.title() if index else part for index, part in enumerate(option.split("_")))
    listed = ", ".join(f"'{name}'" for name in schedulers)
    return Rule(
        f"training.schedulerOptions.{field}",
        f"!has(self.training.schedulerOptions.{field}) || self.training.scheduler in [{listed}]",
        lambda s: getattr(s.training.scheduler_options, option) is None or s.training.scheduler in schedulers,
        f"{field} is for scheduler {' and '.join(schedulers)}; remove it, or change scheduler {{training.scheduler}}",
    )


TUNING_RULES: tuple[Rule, ...] = (
    Rule(
        "adapters",
        "!has(self.adapters) || (self.method in ['lora', 'qlora'] && self.training.objective == 'sft')",
        lambda s: s.adapters is None or (s.method in ("lora", "qlora") and s.training.objective == "sft"),
        "several adapters are for method lora and qlora with objective sft; remove adapters, or change method "
        "{method}, objective {training.objective}",
    ),
    Rule(
        "adapters",
        "!has(self.adapters) || self.parallelism.strategy in ['auto', 'ddp']",
        lambda s: s.adapters is None or s.parallelism.strategy in ("auto", "ddp"),
        "several adapters share a base that every GPU holds; use strategy auto or ddp, not {parallelism.strategy}",
    ),
    Rule(
        "adapters",
        "!has(self.adapters) || self.adapters.all(a, self.adapters.exists_one(b, b.name == a.name))",
        lambda s: len({one.name for one in s.adapters or ()}) == len(s.adapters or ()),
        "two adapters have the same name; name each differently",
    ),
    Rule(
        "lora.variant",
        "!has(self.lora) || self.lora.variant != 'loftq' || (self.method == 'qlora' && (!has(self.quantization) || "
        "self.quantization.type in ['nf4', 'fp4']))",
        lambda s: (
            s.lora is None
            or s.lora.variant != "loftq"
            or (s.method == "qlora" and (s.quantization is None or s.quantization.type in ("nf4", "fp4")))
        ),
        "loftq makes up for the rounding of a 4-bit base; use it with method qlora and quantization.type nf4 or fp4",
    ),
    Rule(
        "prompt",
        "!has(self.prompt) || self.method in ['prefix', 'prompt', 'adapter']",
        lambda s: s.prompt is None or s.method in ("prefix", "prompt", "adapter"),
        "prompt is for method prefix, prompt and adapter; remove it, or change method {method}",
    ),
    Rule(
        "prompt.initialization",
        "!has(self.prompt) || self.prompt.initialization == 'random' || self.method == 'prompt'",
        lambda s: s.prompt is None or s.prompt.initialization == "random" or s.method == "prompt",
        "starting from the vocabulary is for method prompt; use random with method {method}",
    ),
    Rule(
        "prompt.projection",
        "!has(self.prompt) || !self.prompt.projection || self.method == 'prefix'",
        lambda s: s.prompt is None or not s.prompt.projection or s.method == "prefix",
        "a projection is for method prefix; remove it, or change method {method}",
    ),
    Rule(
        "prompt.projectionSize",
        "!has(self.prompt) || !has(self.prompt.projectionSize) || self.prompt.projection",
        lambda s: s.prompt is None or s.prompt.projection_size is None or s.prompt.projection,
        "there is no projection; set prompt.projection, or remove projectionSize",
    ),
    _scheduler_takes("min_learning_rate_ratio", ("cosine_with_min_lr", "polynomial", "warmup_stable_decay")),
    _scheduler_takes("cycles", ("cosine_with_restarts",)),
    _scheduler_takes("power", ("polynomial",)),
    _scheduler_takes("decay_ratio", ("warmup_stable_decay",)),
    _scheduler_takes("decay_type", ("warmup_stable_decay",)),
    Rule(
        "output.merge",
        "self.output.merge != 'base16' || !has(self.lora) || self.lora.variant != 'loftq'",
        lambda s: s.output.merge != "base16" or s.lora is None or s.lora.variant != "loftq",
        "a loftq adapter makes up for the rounding of the 4-bit base, which the 16-bit base does not have; use merge: "
        "dequantized",
    ),
)
