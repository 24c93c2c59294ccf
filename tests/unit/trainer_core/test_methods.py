"""What the methods refuse, and the details of their adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.contract import select
from finetune_trainer.contract.vocabulary import Method
from finetune_trainer.errors import InternalError, UsageError
from finetune_trainer.layers import layout_of
from finetune_trainer.methods import apply_method, check_method
from finetune_trainer.methods.lora import as_plain_adapter, initial_adapter, restore_residual
from tests.tiny_models import meta_model, tiny_model
from tests.trainer_jobs import fit, snapshot, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder
from tests.unit.trainer_core.test_exactness import quick

UNFREEZE = {"every": 1, "unit": "step", "order": "top-down"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "lora", "lora": None}, r"spec\.lora: method lora needs it"),
        ({"method": "qlora", "quantization": None}, r"spec\.quantization: method qlora needs it"),
        (
            {"method": "qlora", "lora": {"rank": 2, "alpha": 2, "dropout": 0, "variant": "pissa", "bias": "none"}},
            r"spec\.lora\.variant: pissa takes its adapters out of the base weights",
        ),
        ({"method": "lora", "layers": {"last": 2, "unfreeze": UNFREEZE}}, r"spec\.layers\.unfreeze: method lora"),
        (
            {
                "method": "freeze",
                "layers": {"last": 2, "unfreeze": UNFREEZE},
                "parallelism": {"strategy": "deepspeed"},
            },
            r"spec\.layers\.unfreeze: deepspeed fixes",
        ),
        ({"method": "prompt", "layers": {"last": 1}}, r"spec\.layers\.last: method prompt acts on the whole model"),
        ({"method": "ia3", "layers": {"also": ["norm"]}}, r"spec\.layers\.also: method ia3 trains no module in full"),
        ({"method": "adapter", "layers": {"ids": [1]}}, r"spec\.layers: method adapter takes the last n blocks"),
        ({"method": "prefix", "training": {"gradient_checkpointing": True}}, r"spec\.training\.gradientCheckpointing"),
        ({"method": "adapter", "dataset": {"packing": True}}, r"spec\.dataset\.packing: method adapter"),
    ],
)
def test_refusals(changes: dict[str, Any], says: str) -> None:
    config = trainer_config(Path("m"), Path("d"), **{key: value for key, value in changes.items() if value is not None})
    config = config.model_copy(update={key: None for key, value in changes.items() if value is None})
    with pytest.raises(UsageError, match=says):
        check_method(config, layout_of(meta_model()), "llama")


def test_olora_of_transposed_layers_is_refused() -> None:
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "variant": "olora", "bias": "none"}
    config = trainer_config(Path("m"), Path("d"), lora=lora)
    with pytest.raises(UsageError, match=r"spec\.lora\.variant: olora cannot decompose the transposed layers of gpt2"):
        check_method(config, layout_of(meta_model("gpt2")), "gpt2")


@pytest.mark.parametrize(("method", "model_type"), [("adapter", "qwen2"), ("ia3", "unknown")])
def test_methods_that_know_some_architectures_only(method: str, model_type: str) -> None:
    config = trainer_config(Path("m"), Path("d"), method=method)
    with pytest.raises(UsageError, match=f"{model_type}.*use method lora"):
        check_method(config, layout_of(meta_model()), model_type)


def test_a_layer_that_cannot_be_quantized_is_named(model_folder: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot quantize transformer\.h\.0\..*FalconLinear; use method lora"):
        fit(model_folder("falcon"), quick("qlora", None), tmp_path)


@pytest.mark.parametrize("name", ["prefix", "prompt", "adapter", "ia3"])
def test_prompt_methods_leave_the_base_alone(name: str, model_folder: ModelFolder) -> None:
    model = tiny_model()
    layout = layout_of(model)
    base = {id(p) for p in model.parameters()}
    config = trainer_config(Path("m"), Path("d"), method=name)
    tuned = apply_method(model, layout, select(layout, Method(name), None), config)
    trained = [p for p in tuned.model.parameters() if p.requires_grad]
    assert trained and not base & {id(p) for p in trained}
    assert tuned.trainable == sum(p.numel() for p in trained) < layout.total


def test_ia3_scales_only_the_selected_blocks() -> None:
    model = tiny_model()
    layout = layout_of(model)
    config = trainer_config(Path("m"), Path("d"), method="ia3", layers={"ids": [1], "modules": ["self_attn"]})
    tuned = apply_method(model, layout, select(layout, Method.IA3, config.layers), config)
    scaled = {name for name, p in tuned.model.named_parameters() if p.requires_grad}
    assert scaled == {f"base_model.model.model.layers.1.self_attn.{x}_proj.ia3_l.default" for x in "kv"}


def test_lora_plus_gives_b_its_own_learning_rate(model_folder: ModelFolder, tmp_path: Path) -> None:
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0, "variant": "lora+", "bias": "none", "learning_rate_ratio": 8.0}
    fitted = fit(model_folder(), quick("lora", {"last": 1}, lora=lora), tmp_path)
    assert fitted.trainer.optimizer is not None
    rates = {id(p): group["lr"] for group in fitted.trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in fitted.tuned.model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(8e-3 if ".lora_B." in name else 1e-3)


@pytest.mark.parametrize(
    ("variant", "architecture", "module"),
    [
        ("pissa", "llama", "model.layers.1.mlp.up_proj"),
        ("pissa", "gpt2", "transformer.h.1.mlp.c_fc"),
        ("olora", "llama", "model.layers.1.mlp.up_proj"),
    ],
)
def test_residual_variants_start_as_the_base_and_end_as_a_plain_adapter(
    variant: str, architecture: str, module: str
) -> None:
    base = tiny_model(architecture).eval()
    ids = torch.arange(3, 15)[None]
    expected = base(input_ids=ids).logits
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "variant": variant, "bias": "none"}
    config = trainer_config(Path("m"), Path("d"), lora=lora)
    layout = layout_of(base)
    original = snapshot(base)
    tuned = apply_method(base, layout, select(layout, Method.LORA, None), config)
    tuned.model.eval()
    torch.testing.assert_close(tuned.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)

    first = tuned.initial_adapter
    assert first == {} or set(first) == set(initial_adapter(tuned.model, config.lora.variant))  # type: ignore[union-attr]
    moved = {name.replace(".default.", "."): tensor + 0.01 for name, tensor in first.items()}
    plain = as_plain_adapter(moved, first)
    name = f"base_model.model.{module}"
    a, b = (plain[f"{name}.lora_{side}.weight"] for side in "AB")
    assert a.shape[0] == b.shape[1] == 8
    difference = moved[f"{name}.lora_B.weight"] @ moved[f"{name}.lora_A.weight"]
    difference -= first[f"{name}.lora_B.default.weight"] @ first[f"{name}.lora_A.default.weight"]
    torch.testing.assert_close(b @ a, difference, rtol=1e-4, atol=1e-5)

    # A checkpoint of a machine whose decomposition came out otherwise: the base has to follow it.
    saved = {key: tensor * 1.25 for key, tensor in first.items()}
    restore_residual(tuned.model, first, saved)
    weight = dict(tuned.model.named_parameters())[f"{name}.base_layer.weight"]
    whole = original[f"{module}.weight"]
    product = 2.0 * saved[f"{name}.lora_B.default.weight"] @ saved[f"{name}.lora_A.default.weight"]
    torch.testing.assert_close(weight, whole - (product.T if architecture == "gpt2" else product), rtol=1e-4, atol=1e-4)


def test_a_method_that_trains_something_else_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    layout = layout_of(model)
    selection = select(layout, Method.LORA, None)
    config = trainer_config(Path("m"), Path("d"))
    monkeypatch.setattr("finetune_trainer.methods.apply.count_trainable", lambda *_args, **_options: 1)
    with pytest.raises(InternalError, match="but the selection has 1"):
        apply_method(model, layout, selection, config)


# ---- progressive unfreezing ----


@pytest.mark.parametrize(("order", "joins"), [("top-down", {3: 0, 2: 2, 1: 4}), ("bottom-up", {1: 0, 2: 2, 3: 4})])
def test_blocks_join_one_by_one(order: str, joins: dict[int, int], model_folder: ModelFolder, tmp_path: Path) -> None:
    layers = {"last": 3, "also": ["norm"], "unfreeze": {"every": 2, "unit": "step", "order": order}}
    fitted = fit(model_folder(), quick("freeze", layers, training={"max_steps": 5}), tmp_path)
    seen: dict[str, int] = {}
    for entry in fitted.trainer.state.log_history:
        for key in entry:
            if key.startswith("grad_norm/"):
                seen.setdefault(key.removeprefix("grad_norm/"), entry["step"] - 1)
    assert seen == {"norm": 0, **{f"block {block}": step for block, step in joins.items()}}
    assert fitted.changed() == set(fitted.selection.parameters)
    assert all(p.requires_grad for n, p in fitted.tuned.model.named_parameters() if n in fitted.selection.parameters)


def test_an_unfreezing_that_never_ends_is_refused(model_folder: ModelFolder, tmp_path: Path) -> None:
    layers = {"last": 3, "unfreeze": {"every": 2, "unit": "step", "order": "top-down"}}
    with pytest.raises(UsageError, match=r"the last of 3 blocks would join after 4 steps, but the run has 4"):
        fit(model_folder(), quick("freeze", layers, training={"max_steps": 4}), tmp_path)
