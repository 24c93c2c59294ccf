"""Low-rank adapters through PEFT, with exact module names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from finetune_trainer.contract import AdapterShape, ModelLayout, ParameterKind, Selection, TrainerConfig
from finetune_trainer.contract.config import LoraConfig
from finetune_trainer.contract.vocabulary import LoraBias, LoraVariant
from finetune_trainer.errors import InternalError
from finetune_trainer.layers import apply_selection, assert_trainable_is

ADAPTER = "default"
"""PEFT's name of the adapter; it does not appear in what is exported."""
PREFIX = "base_model.model."
"""What PEFT puts before the base model's names."""
RESIDUAL_VARIANTS = frozenset({LoraVariant.PISSA, LoraVariant.OLORA})
"""Variants whose initial adapter is subtracted from the base weights."""
BESIDE_THE_BASE = frozenset({LoraVariant.STANDARD, LoraVariant.DORA, LoraVariant.RSLORA, LoraVariant.LORA_PLUS})
"""Variants that leave the base weights as they are."""


def adapter_can_be_left_out(config: TrainerConfig) -> bool:
    """Whether the model before tuning is the tuned one without its adapter. Otherwise base weights change: those that
    the method trains, biases beside the adapter, or those that a variant takes the adapter out of."""
    lora = config.lora
    return (
        config.method.uses_lora and lora is not None and lora.variant in BESIDE_THE_BASE and lora.bias is LoraBias.NONE
    )


def add_adapters(
    model: PreTrainedModel,
    layout: ModelLayout,
    selection: Selection,
    lora: LoraConfig,
    shapes: Mapping[str, AdapterShape],
) -> PeftModel:
    """Put adapters of these shapes on exactly their modules, and train exactly them and what stands beside them.

    Variants: DoRA (Liu et al. 2024, arXiv:2402.09353), rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), PiSSA (Meng et
    al. 2024, arXiv:2404.02948), OLoRA (Büyükakyüz 2024, arXiv:2406.01775). LoRA+ (Hayou et al. 2024,
    arXiv:2402.12354) differs in its learning rates only; EVA and LoftQ begin as the standard one and are then given
    other weights (`methods.eva`, `methods.loftq`). Fused experts have a pair of matrices for each expert.
    """
    variant = lora.variant
    initial: dict[LoraVariant, Literal["pissa", "olora"]] = {LoraVariant.PISSA: "pissa", LoraVariant.OLORA: "olora"}
    shares_embeddings = layout.tied and layout.input_embeddings in selection.saved_modules
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias.value,
        use_rslora=variant is LoraVariant.RSLORA,
        use_dora=variant is LoraVariant.DORA,
        init_lora_weights=initial.get(variant, True),
        fan_in_fan_out=any(layout.by_path[f"{m}.weight"].kind is ParameterKind.CONV1D for m in selection.adapted),
        # Full names: a name is matched as a whole or after a dot, and none of these is the end of another.
        target_modules=[name for name in selection.adapted if name in shapes],
        target_parameters=list(selection.adapted_experts) or None,
        rank_pattern={name: shape.rank for name, shape in shapes.items() if shape.rank != lora.rank},
        alpha_pattern={name: shape.alpha for name, shape in shapes.items() if shape.alpha != lora.alpha},
        modules_to_save=list(selection.saved_modules) or None,
        ensure_weight_tying=shares_embeddings,
    )
    with quiet_peft():
        tuned = get_peft_model(model, config, adapter_name=ADAPTER)
    assert isinstance(tuned, PeftModel)
    found = {name: AdapterShape(layer.r[ADAPTER], layer.lora_alpha[ADAPTER]) for name, layer in adapters(tuned).items()}
    if found != dict(shapes):
        wrong = [name for name in {**found, **shapes} if found.get(name) != shapes.get(name)]
        raise InternalError(f"the adapters are not exactly the selected ones; they differ in: {', '.join(wrong[:5])}")
    expected = trained_names(selection, variant, shapes)
    apply_selection(tuned, expected)
    assert_trainable_is(tuned, expected)
    return tuned


def adapters(model: nn.Module) -> dict[str, LoraLayer]:
    """PEFT's layers by what they adapt: the path of a module, or of a tensor of fused experts."""
    found: dict[str, LoraLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            # PEFT wraps a module once for each of its adapted tensors.
            owner = name.removeprefix(PREFIX)
            while owner.endswith(".base_layer"):
                owner = owner.removesuffix(".base_layer")
            found[f"{owner}.{module.parameter_name}"] = module
        elif isinstance(module, LoraLayer):
            found[name.removeprefix(PREFIX)] = module
    return found


@torch.no_grad()
def set_weights(layer: LoraLayer, a: torch.Tensor, b: torch.Tensor | None = None) -> None:
    """Give an adapter its weights: A (rank, inputs), and B (outputs, rank) unless that one stays as it is."""
    for held, tensor in ((layer.lora_A, a), (layer.lora_B, b)):
        if tensor is not None:
            weight = held[ADAPTER].weight
            assert isinstance(weight, nn.Parameter)
            weight.copy_(tensor.to(weight))


def trained_names(
    selection: Selection, variant: LoraVariant, shapes: Mapping[str, AdapterShape] | None = None
) -> tuple[str, ...]:
    """Names in PEFT's model of what a selection trains: adapters (those in `shapes`, or all that are selected), and
    copies of the modules beside them."""
    names = []
    adapted = {module for module in selection.adapted if shapes is None or module in shapes}
    for module in selection.adapted:
        if module not in adapted:
            continue
        names += [f"{PREFIX}{module}.lora_{side}.{ADAPTER}.weight" for side in "AB"]
        if variant is LoraVariant.DORA:
            names.append(f"{PREFIX}{module}.lora_magnitude_vector.{ADAPTER}.weight")
    for index, path in enumerate(selection.adapted_experts):
        owner = path.rpartition(".")[0]
        around = sum(other.rpartition(".")[0] == owner for other in selection.adapted_experts[index + 1 :])
        names += [f"{PREFIX}{owner}{'.base_layer' * around}.lora_{side}.{ADAPTER}.weight" for side in "AB"]
    for path in selection.parameters:
        owner, _, leaf = path.rpartition(".")
        saved = next((m for m in selection.saved_modules if path.startswith(f"{m}.")), None)
        if saved is not None:
            names.append(f"{PREFIX}{saved}.modules_to_save.{ADAPTER}{path[len(saved) :]}")
        elif owner in adapted:
            names.append(f"{PREFIX}{owner}.base_layer.{leaf}")
        else:
            names.append(PREFIX + path)
    return tuple(names)


def initial_adapter(model: nn.Module, variant: LoraVariant) -> dict[str, torch.Tensor]:
    """Copies of the adapters at the start, for the variants that took them out of the base weights.

    Training continues from W - s B0 A0 + s B A, so W + s (B A - B0 A0) is what the tuned model is: both are needed to
    resume on another machine, where the decomposition may round differently, and to export an adapter of W itself.
    """
    if variant not in RESIDUAL_VARIANTS:
        return {}
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}


def restore_residual(model: nn.Module, initial: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    """Make the base weights those that belong to a saved initial adapter."""
    for name, module in model.named_modules():
        key_a, key_b = f"{name}.lora_A.{ADAPTER}.weight", f"{name}.lora_B.{ADAPTER}.weight"
        if key_a not in initial or (
            torch.equal(initial[key_a], saved[key_a]) and torch.equal(initial[key_b], saved[key_b])
        ):
            continue
        assert isinstance(module, LoraLayer)
        weight = module.get_base_layer().weight
        assert isinstance(weight, torch.Tensor)
        moved = module.scaling[ADAPTER] * (initial[key_b] @ initial[key_a] - saved[key_b] @ saved[key_a])
        moved = moved.T if getattr(module, "fan_in_fan_out", False) else moved
        # In place: layers that are computed together hold parts of one tensor.
        weight.data.copy_(weight.data.float() + moved.to(weight.device))


def as_plain_adapter(tensors: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter of the untouched base, of twice the rank: s (B A - B0 A0) = s [B, -B0] [A; A0] (PiSSA, appendix C).

    `tensors` are named as exported, `initial` as in the model.
    """
    plain = {}
    for name, tensor in tensors.items():
        first = initial.get(name.replace(".lora_A.", f".lora_A.{ADAPTER}.").replace(".lora_B.", f".lora_B.{ADAPTER}."))
        if first is None:
            plain[name] = tensor
        elif ".lora_A." in name:
            plain[name] = torch.cat([tensor, first.to(tensor)], dim=0)
        else:
            plain[name] = torch.cat([tensor, -first.to(tensor)], dim=1)
    return plain


def as_plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What changes in PEFT's `adapter_config.json` with `as_plain_adapter`: ranks are doubled, scales stay."""
    return {
        "init_lora_weights": True,
        "r": 2 * settings["r"],
        "lora_alpha": 2 * settings["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in settings["rank_pattern"].items()},
        "alpha_pattern": {name: 2 * alpha for name, alpha in settings["alpha_pattern"].items()},
    }


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warnings that PEFT 0.21 gives where nothing is wrong.

    It looks for patterns of ranks among modules alone and says that those of experts are ignored, which they are not;
    it asks transformers 5.23 for `is_gradient_checkpointing`, which says that it was renamed; and prompt tuning says of
    the positions that `generate` passes along that it counts its own.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")
        yield
