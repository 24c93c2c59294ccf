"""Methods that train something small beside frozen weights, through PEFT: prefix tuning (Li and Liang 2021,
arXiv:2101.00190), prompt tuning (Lester et al. 2021, arXiv:2104.08691), LLaMA-Adapter (Zhang et al. 2023,
arXiv:2303.16199) and (IA)3 (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from peft import (
    AdaptionPromptConfig,
    IA3Config,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    get_peft_model,
)
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from transformers import PreTrainedModel

from finetune_trainer.contract import LayerSelection, ModelLayout, Selection, TrainerConfig
from finetune_trainer.contract.config import PromptConfig
from finetune_trainer.contract.vocabulary import Method, PromptInit
from finetune_trainer.errors import InternalError, UsageError
from finetune_trainer.layers import trained_parameters
from finetune_trainer.methods.lora import ADAPTER, quiet_peft

METHODS = frozenset({Method.PREFIX, Method.PROMPT, Method.ADAPTER, Method.IA3})
POSITIONS = METHODS - {Method.IA3}
"""Methods that train positions of their own."""
SELECTORS = ("last", "first", "ids", "ranges", "every", "modules")


def check(config: TrainerConfig, layout: ModelLayout, model_type: str) -> None:
    """Refuse what these methods cannot do.

    Raises UsageError that names the field and the remedy.
    """
    method, layers = config.method, config.layers
    if method in POSITIONS and config.prompt is None:
        raise UsageError(f"spec.prompt: method {method} needs it; set virtualTokens")
    chosen = [] if layers is None else [name for name in SELECTORS if getattr(layers, name) not in (None, ())]
    if layers is not None and layers.also:
        raise UsageError(
            f"spec.layers.also: method {method} trains no module in full; leave it out, or use method lora"
        )
    if method in (Method.PREFIX, Method.PROMPT) and chosen:
        raise UsageError(f"spec.layers.{chosen[0]}: method {method} acts on the whole model; leave spec.layers out")
    if method in (Method.PREFIX, Method.PROMPT, Method.ADAPTER) and config.dataset.packing:
        raise UsageError(
            f"spec.dataset.packing: method {method} needs its trained positions before every sample, and packed rows"
            " hold several; set it to false"
        )
    if not method.can_recompute and config.training.gradient_checkpointing:
        raise UsageError(
            f"spec.training.gradientCheckpointing: method {method} keeps trained states in the attention cache, which"
            " checkpointing discards; set it to never"
        )
    if method is Method.ADAPTER:
        if model_type not in TRANSFORMERS_MODEL_CONFIG:
            known = ", ".join(sorted(TRANSFORMERS_MODEL_CONFIG))
            raise UsageError(f"spec.method: adapter is known for {known}, not for {model_type}; use method lora")
        if any(name != "last" for name in chosen):
            raise UsageError("spec.layers: method adapter takes the last n blocks; use layers.last")
    if method is Method.IA3 and model_type not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        raise UsageError(f"spec.method: it is not known which layers of {model_type} ia3 scales; use method lora")


def add_prompts(model: PreTrainedModel, layout: ModelLayout, selection: Selection, config: TrainerConfig) -> PeftModel:
    """Put on what the method trains.

    Raises InternalError where a base weight would be trained.
    """
    base = {id(parameter) for parameter in model.parameters()}
    with quiet_peft():
        tuned = get_peft_model(model, _peft_config(model, layout, selection, config), adapter_name=ADAPTER)
    assert isinstance(tuned, PeftModel)
    touched = [name for name, parameter in trained_parameters(tuned).items() if id(parameter) in base]
    if touched:
        raise InternalError(f"method {config.method} would train the base weight {touched[0]}")
    return tuned


def _peft_config(
    model: PreTrainedModel, layout: ModelLayout, selection: Selection, config: TrainerConfig
) -> PeftConfig:
    if config.prompt is not None:
        return _positions(config.method, config.prompt, selection)
    model_type = str(model.config.model_type)
    targets = _ia3_modules(
        layout, selection, config.layers, TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[model_type]
    )
    forward = _ia3_modules(
        layout, selection, config.layers, TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[model_type]
    )
    if not targets:
        raise UsageError("spec.layers.modules: ia3 scales keys, values and feed-forward outputs; none is selected")
    return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=forward)


def _positions(method: Method, prompt: PromptConfig, selection: Selection) -> PeftConfig:
    if method is Method.PREFIX:
        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=prompt.virtual_tokens,
            prefix_projection=prompt.projection,
            # PEFT takes None, whatever its annotation says, for the model's width.
            encoder_hidden_size=prompt.projection_size,  # type: ignore[arg-type]
        )
    if method is Method.PROMPT:
        sampled = prompt.initialization is PromptInit.VOCABULARY
        return PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=prompt.virtual_tokens,
            prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB if sampled else PromptTuningInit.RANDOM,
        )
    return AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=prompt.virtual_tokens, adapter_layers=len(selection.blocks)
    )


def _ia3_modules(
    layout: ModelLayout, selection: Selection, layers: LayerSelection | None, names: list[str]
) -> list[str]:
    """Full names of the modules in the selected blocks whose path ends with one of the names."""
    wanted = [tuple(name.split(".")) for name in names]
    words = [tuple(word.split(".")) for word in (layers.modules if layers else ())]
    found = []
    for parameter in layout.parameters:
        if not parameter.path.endswith(".weight") or layout.block_of(parameter.path) not in selection.blocks:
            continue
        segments = tuple(layout.within_block(parameter.module).split("."))
        if any(segments[-len(name) :] == name for name in wanted) and (
            not words or any(_within(segments, word) for word in words)
        ):
            found.append(parameter.module)
    return found


def _within(segments: tuple[str, ...], word: tuple[str, ...]) -> bool:
    return any(segments[i : i + len(word)] == word for i in range(len(segments) - len(word) + 1))
