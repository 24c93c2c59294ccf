"""What is learnt, and the optimization."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune_operator.convert.draft import Draft, flag, number, text, whole
from finetune_trainer.contract import vocabulary as v

_OBJECTIVES = {"pt": "sft", "sft": "sft", "dpo": "dpo", "kto": "kto"}
_OWN_OBJECTIVES = ("orpo", "simpo")
_OPTIMIZERS = {
    "adamw_hf": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_apex_fused": "adamw",
    "adamw_anyprecision": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
}
_LIGHT = {
    "use_galore": "GaLore",
    "use_apollo": "APOLLO",
    "use_badam": "BAdam",
    "use_adam_mini": "Adam-mini",
    "use_muon": "Muon",
}
_SIMPLE = (
    ("weight_decay", "training.weightDecay"),
    ("adam_beta1", "training.adamBeta1"),
    ("adam_beta2", "training.adamBeta2"),
    ("adam_epsilon", "training.adamEpsilon"),
    ("max_grad_norm", "training.maxGradNorm"),
)
_WEIGHTS = (
    ("pref_ftx", "sftWeight", ("dpo", "orpo", "simpo", "kto")),
    ("dpo_label_smoothing", "labelSmoothing", ("dpo",)),
    ("simpo_gamma", "simpoGamma", ("simpo",)),
    ("kto_chosen_weight", "chosenWeight", ("kto",)),
    ("kto_rejected_weight", "rejectedWeight", ("kto",)),
)


def carry_objective(draft: Draft) -> str:
    """The stage; the objective's name."""
    stage = draft.read("stage", text) or "sft"
    loss = draft.read("pref_loss", text) or "sigmoid"
    objective = loss if stage == "dpo" and loss in _OWN_OBJECTIVES else _OBJECTIVES.get(stage, stage)
    draft.put("training.objective", objective)
    if stage not in _OBJECTIVES:
        draft.hand(
            "stage",
            "no reward models and no PPO here; dpo, kto, orpo and simpo learn from the same preferences without one",
            "training.objective",
        )
    elif "stage" in draft.options:
        draft.carry("stage", "training.objective", objective)
    if objective in ("dpo", "kto", "orpo", "simpo"):
        _preference(draft, objective, loss)
    return objective


def _preference(draft: Draft, objective: str, loss: str) -> None:
    beta = draft.read("pref_beta", number)
    if beta is not None:
        draft.carry("pref_beta", "training.preference.beta", beta)
    elif objective == "simpo":
        draft.assume("pref_beta", "training.preference.beta", 0.1)
    if "pref_loss" in draft.options and objective in _OWN_OBJECTIVES:
        draft.carry("pref_loss", "training.objective", objective)
    elif "pref_loss" in draft.options and objective == "dpo":
        draft.carry("pref_loss", "training.preference.loss", loss)
        if loss not in tuple(v.PreferenceLoss):
            draft.hand("pref_loss", "not here; choose sigmoid, hinge or ipo", "training.preference.loss")
    for option, name, objectives in _WEIGHTS:
        value = draft.read(option, number)
        if value is not None and objective in objectives:
            draft.carry(option, f"training.preference.{name}", value)


def carry_precision(draft: Draft) -> None:
    """bf16, fp16, or, where neither is set, fp32."""
    asked = [option for option in ("bf16", "pure_bf16", "fp16") if draft.is_on(option)]
    precision = "fp32" if not asked else "fp16" if asked == ["fp16"] else "bf16"
    draft.put("training.precision", precision)
    for option in ("bf16", "fp16"):
        if option in asked and option == precision:
            draft.carry(option, "training.precision", option)
        elif option in draft.options:
            draft.ours(option, f"precision is {precision}")
    if "pure_bf16" in asked:
        draft.carry(
            "pure_bf16", "training.precision", "bf16", "trained tensors are held in fp32 here, which takes more"
        )
    elif "pure_bf16" in draft.options:
        draft.ours("pure_bf16", "off")
    if not asked:
        draft.assume("bf16", "training.precision", "fp32")


def carry_course(draft: Draft) -> None:
    """Length, learning rate, optimizer, seed."""
    draft.carry_given("num_train_epochs", "training.epochs", number)
    steps = draft.read("max_steps", whole)
    if steps is not None and steps > 0:
        draft.carry("max_steps", "training.maxSteps", steps)
    elif steps is not None:
        draft.ours("max_steps", "epochs decide")
    rate = draft.carry_or_assume("learning_rate", "training.learningRate", number, 5e-5)
    _scheduler(draft, rate)
    _warmup(draft)
    _optimizer(draft)
    for option, path in _SIMPLE:
        draft.carry_given(option, path, number)
    noise = draft.read("neftune_noise_alpha", number)
    if noise:
        draft.carry("neftune_noise_alpha", "training.neftuneAlpha", noise)
    draft.carry_given("seed", "training.seed", whole)


def _scheduler(draft: Draft, rate: float) -> None:
    name = draft.carry_or_assume("lr_scheduler_type", "training.scheduler", text, "linear")
    if name not in tuple(v.Scheduler):
        draft.hand("lr_scheduler_type", "not here; choose another", "training.scheduler")
        return
    given = draft.options.get("lr_scheduler_kwargs")
    if given is None:
        return
    options = _map_of(given)
    if options is None:
        draft.hand("lr_scheduler_kwargs", "is not a map; set schedulerOptions", "training.scheduler")
        return
    found, unknown = _scheduler_options(options, rate)
    if found:
        draft.carry("lr_scheduler_kwargs", "training.schedulerOptions", found)
    elif not unknown:
        draft.ours("lr_scheduler_kwargs", "empty")
    if unknown:
        draft.hand("lr_scheduler_kwargs", f"not carried: {', '.join(unknown)}", "training.scheduler")


def _map_of(given: Any) -> Mapping[str, Any] | None:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return None
    return given if isinstance(given, Mapping) else None


def _scheduler_options(options: Mapping[str, Any], rate: float) -> tuple[dict[str, Any], list[str]]:
    """schedulerOptions, and the names that have no place there."""
    found: dict[str, Any] = {}
    unknown = []
    for name, value in options.items():
        try:
            if name in ("min_lr", "lr_end"):
                found["minLearningRateRatio"] = float(f"{number(value) / rate:.6g}")
            elif name in ("min_lr_rate", "min_lr_ratio"):
                found["minLearningRateRatio"] = number(value)
            elif name == "num_cycles":
                found["cycles"] = whole(value)
            elif name == "power":
                found["power"] = number(value)
            elif name == "decay_type":
                found["decayType"] = text(value)
            else:
                unknown.append(name)
        except (ValueError, ZeroDivisionError, OverflowError):
            unknown.append(name)
    return found, unknown


def _warmup(draft: Draft) -> None:
    steps, ratio = draft.read("warmup_steps", number), draft.read("warmup_ratio", number)
    if steps and steps >= 1:
        draft.carry("warmup_steps", "training.warmupSteps", round(steps))
        if ratio is not None:
            draft.drop("warmup_ratio", "warmup_steps is set, which wins there too")
        return
    if steps:
        draft.carry("warmup_steps", "training.warmupRatio", steps, "below 1 it is a share")
    elif ratio is None:
        draft.assume("warmup_ratio", "training.warmupRatio", 0.0)
    if steps is not None and not steps:
        draft.ours("warmup_steps", "0: warmupRatio counts")
    if ratio is not None and not steps:
        draft.carry("warmup_ratio", "training.warmupRatio", ratio)


def _optimizer(draft: Draft) -> None:
    name = draft.read("optim", text)
    if name is not None:
        own = _OPTIMIZERS.get(name, name)
        draft.carry("optim", "training.optimizer", own)
        if own not in tuple(v.Optimizer):
            draft.hand("optim", "not here; choose another", "training.optimizer")
    for option, title in _LIGHT.items():
        if draft.read(option, flag):
            draft.hand(
                option,
                f"{title} is not here; {own if name else 'adamw'} is used. Look whether it fits (`finetune plan`), and "
                "at the learning rate; adamw_8bit or adafactor take less memory",
                "training.optimizer" if name else "training",
            )
        elif option in draft.options:
            draft.ours(option, "off")


def _carry_recomputation(draft: Draft) -> None:
    never = draft.is_on("disable_gradient_checkpointing")
    # Unsloth's checkpointing keeps the inputs of blocks in host memory.
    offload = draft.is_on("use_unsloth_gc") and not never and draft.gpus > 0
    if never:
        draft.carry("disable_gradient_checkpointing", "training.gradientCheckpointing", "never")
    elif "disable_gradient_checkpointing" in draft.options:
        draft.ours("disable_gradient_checkpointing", "as few blocks are recomputed as memory asks for")
    if offload:
        draft.carry("use_unsloth_gc", "training.gradientCheckpointing", "offload")
    elif "use_unsloth_gc" in draft.options:
        draft.ours("use_unsloth_gc", "nothing is recomputed" if never else "as few blocks are as memory asks for")


def carry_speed(draft: Draft) -> None:
    """Recomputation, attention."""
    _carry_recomputation(draft)
    attention = draft.read("flash_attn", text)
    if attention == "sdpa":
        draft.carry("flash_attn", "training.flashAttn", "sdpa")
    elif attention in ("auto", "fa2", "fa3", "flash_attention_2"):
        draft.ours("flash_attn", "flashAttn: auto takes a kernel without a mask where GPU and model allow it")
    elif attention is not None:
        draft.hand("flash_attn", "not here; flashAttn: auto is used, both kinds give the same result", "training")


def carry_compilation(draft: Draft, objective: str) -> None:
    """Once it is known how the model is spread: a job that insists on what is not there would be refused."""
    strategy = draft.spec.get("parallelism", {}).get("strategy")
    cannot = {
        f"objective {objective}": objective != "sft",
        f"strategy {strategy}": strategy in ("deepspeed", "fsdp"),
        "an int8 base": draft.spec.get("quantization", {}).get("type") == "int8",
    }
    what = next((what for what, holds in cannot.items() if holds), None)
    if what is not None and draft.is_on("torch_compile"):
        draft.drop("torch_compile", f"{what} trains uncompiled here")
    elif draft.is_on("torch_compile"):
        draft.carry("torch_compile", "training.torchCompile", "always")
    elif "torch_compile" in draft.options:
        draft.carry("torch_compile", "training.torchCompile", "never")
