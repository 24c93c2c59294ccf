"""A frozen base in FP8: its products by hand and against autograd, and adapters that are trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from finetune_trainer.contract.config import QuantizationConfig
from finetune_trainer.contract.vocabulary import Merge
from finetune_trainer.errors import UsageError
from finetune_trainer.merging.merge import MergeSource, merge_model
from finetune_trainer.methods.qlora import check_device
from finetune_trainer.quantized import loading, rowwise
from finetune_trainer.quantized.linear import Fp8Linear, unrounded_activations
from finetune_trainer.quantized.loading import Fp8Config
from tests.trainer_jobs import Fitted, fit, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder

OUTPUTS, INPUTS = 32, 64
ROUNDING = 0.04
"""Relative, of a product of random numbers: three bits of mantissa, 2 ** -4 at most in each factor."""


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().float() - expected.detach().float()).norm() / expected.detach().float().norm())


def layer(*, keep_transposed: bool = False, bias: bool = False, dtype: torch.dtype = torch.float32) -> Fp8Linear:
    generator = torch.Generator().manual_seed(1)
    # Output channels of very different sizes, as trained models have them.
    sizes = torch.logspace(-3, 1, OUTPUTS)[:, None]
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator) * sizes
    added = nn.Parameter(torch.randn(OUTPUTS, generator=generator)) if bias else None
    return Fp8Linear(weight.to(dtype), added, dtype, keep_transposed=keep_transposed)


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, INPUTS, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def test_a_product_by_hand() -> None:
    codes, scale = rowwise.quantize_weight(torch.tensor([[0.5, 0.25, -1.0]]))
    # 1 / 448 is just above 2 ** -9.
    assert scale.tolist() == [[2.0**-8]]
    assert codes.view(rowwise.FP8).float().tolist() == [[128.0, 64.0, -256.0]]
    x = torch.tensor([[1.0, -2.0, 0.3]])
    rows, row_scale = rowwise.quantize_rows(x)
    # 0.3 * 224 = 67.2, and codes between 64 and 128 are 8 apart.
    assert rows.float().tolist() == [[224.0, -448.0, 64.0]]
    assert row_scale.item() == pytest.approx(2 / 448)
    product = rowwise.linear(x, codes, scale, None, torch.float32)
    assert product.item() == pytest.approx((224 * 128 - 448 * 64 - 64 * 256) * (2 / 448) / 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expanded_weight_is_exact_and_stays_what_it_is(dtype: torch.dtype) -> None:
    fp8 = layer(dtype=dtype)
    exact = fp8.codes.view(rowwise.FP8).double() * fp8.scale.double()
    assert fp8.weight.dtype == dtype
    assert torch.equal(fp8.weight.double(), exact)
    assert torch.equal(torch.frexp(fp8.scale).mantissa, torch.full_like(fp8.scale, 0.5))
    assert int(fp8.codes.view(rowwise.FP8).float().abs().amax(1).min()) >= rowwise.LARGEST / 2
    again = rowwise.quantize_weight(fp8.weight)
    assert torch.equal(rowwise.dequantize(*again, torch.float32), fp8.weight.float())


@pytest.mark.parametrize("fill", [0.0, 1e-20, 1e-38])
def test_rows_of_nothing_give_nothing(fill: float) -> None:
    x = torch.full((3, INPUTS), fill).requires_grad_()
    product = layer()(x)
    product.backward(torch.full_like(product, fill))
    assert x.grad is not None
    for found in (product.detach(), x.grad, *rowwise.quantize_weight(x.detach())):
        assert torch.isfinite(found.float()).all()
        assert float(found.float().abs().max()) < 1000
    assert float(product.detach().abs().max()) <= 1e5 * fill


def test_what_is_not_a_number_is_not_hidden() -> None:
    x = torch.ones(2, INPUTS)
    x[0, 3] = torch.inf
    product = layer()(x)
    assert torch.isnan(product[0]).all() and torch.isfinite(product[1]).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does, itself
def test_forward_and_backward_against_autograd_of_the_expanded_weight(
    backend: str | None, dtype: torch.dtype, bias: bool
) -> None:
    found = []
    gradient = torch.randn(2, 5, OUTPUTS, generator=torch.Generator().manual_seed(3)).to(dtype)
    for keep in (True, False):
        fp8 = layer(keep_transposed=keep, bias=bias, dtype=dtype)
        function: Any = fp8 if backend is None else torch.compile(fp8, backend=backend, fullgraph=True)
        x = inputs(dtype)
        product = function(x)
        product.backward(gradient)
        assert product.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
        found.append((product.detach(), x.grad))
    plain = inputs(dtype)
    expected = nn.functional.linear(plain, fp8.weight, None if fp8.bias is None else fp8.bias.to(dtype))
    expected.backward(gradient)
    assert plain.grad is not None
    (product, back), other = found
    assert torch.equal(product, other[0]) and torch.equal(back, other[1])
    assert 0 < difference(product, expected.detach()) < ROUNDING
    assert 0 < difference(back, plain.grad) < ROUNDING


def test_autocast_decides_what_comes_out() -> None:
    x = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = layer(bias=True)(x)
    assert product.dtype == torch.bfloat16
    assert difference(product, layer(bias=True)(x)) < 0.01


def test_activations_can_be_left_as_they_are() -> None:
    fp8, x = layer(bias=True), inputs()
    exact = nn.functional.linear(x, fp8.weight, fp8.bias)
    with unrounded_activations(nn.Sequential(fp8)):
        assert torch.equal(fp8(x), exact)
    assert not torch.equal(fp8(x), exact)


def test_a_device_without_fp8_is_refused_and_a_cpu_is_not() -> None:
    held = {"double_quant": True, "compute_dtype": "bfloat16"}
    fp8, nf4 = (QuantizationConfig.model_validate({"type": kind, **held}) for kind in ("fp8", "nf4"))
    nothing = torch.device("meta")
    check_device(fp8, torch.device("cpu"))
    check_device(nf4, nothing)
    with pytest.raises(UsageError, match=r"spec\.quantization\.type: .*use nf4 or int8, or method lora"):
        check_device(fp8, nothing)


def test_a_layer_whose_sides_do_not_fit_is_named(model_folder: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot quantize model\.layers\.0\.mlp\.gate_proj .*use method lora"):
        trained(model_folder("llama", intermediate_size=120), tmp_path)


def trained(base: Path, output: Path, **changes: Any) -> Fitted:
    changes["quantization"] = {"type": "fp8", **changes.get("quantization", {})}
    return fit(base, trainer_config(base, base, **{"method": "qlora", **changes}), output)


@pytest.mark.parametrize("variant", ["standard", "dora"])
def test_adapters_learn_on_it_and_nothing_else_does(variant: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    base = model_folder()
    lora = {"variant": variant}
    fitted = trained(base, tmp_path / "fp8", lora=lora, training={"max_steps": 6, "learning_rate": 1e-2})
    assert fitted.changed() and all(".lora_" in name for name in fitted.changed())
    plain = fit(
        base,
        trainer_config(base, base, lora=lora, training={"max_steps": 6, "learning_rate": 1e-2}),
        tmp_path / "plain",
    )
    assert fitted.losses != plain.losses
    assert fitted.losses == pytest.approx(plain.losses, rel=0.01)
    model = fitted.tuned.model.get_base_model()  # type: ignore[operator]
    quantized = {name.split(".")[-2] for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert quantized == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert type(model.lm_head) is nn.Linear


def test_a_second_copy_changes_no_bit_and_what_is_trained_beside_stays_wide(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    base, layers = model_folder(), {"last": 2, "also": ["lm_head"]}
    once, twice = (
        trained(base, tmp_path / str(keep), layers=layers, quantization={"keep_transposed": keep})
        for keep in (False, True)
    )
    assert once.losses == twice.losses
    copies = [
        sum(p.numel() for p in fitted.tuned.model.parameters() if p.dtype is torch.uint8) for fitted in (once, twice)
    ]
    assert copies[1] == 2 * copies[0] > 0
    assert {name for name in once.changed() if "lora" not in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }


@pytest.mark.parametrize("into", [Merge.DEQUANTIZED, Merge.BASE16])
def test_merging_into_what_it_expands_to_and_into_the_original(
    into: Merge, model_folder: ModelFolder, tmp_path: Path
) -> None:
    base = model_folder("llama-biased", tie_word_embeddings=True)
    fitted = trained(base, tmp_path / "run", training={"learning_rate": 1e-2})
    fitted.tuned.model.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    held = fitted.tuned.model.get_base_model().config.quantization_config  # type: ignore[operator]
    merged = merge_model(MergeSource(base, tmp_path / "adapter", "adapter", into, held), lambda _: None)
    assert not hasattr(merged.model.config, "quantization_config")
    published = AutoModelForCausalLM.from_pretrained(base).get_parameter("model.layers.1.mlp.up_proj.weight")
    codes = rowwise.quantize_weight(published)
    start = rowwise.dequantize(*codes, torch.float32) if into is Merge.DEQUANTIZED else published
    adapted: Any = fitted.tuned.model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    expected = start + adapted.get_delta_weight("default")
    assert torch.allclose(merged.model.get_parameter("model.layers.1.mlp.up_proj.weight"), expected, atol=1e-6)
    # What is left is the rounding of activations, and of weights with `base16`.
    assert 0 < merged.report.largest_logit_difference < 0.05 * merged.report.largest_logit


def test_a_base_is_merged_as_it_was_quantized(model_folder: ModelFolder, tmp_path: Path) -> None:
    """Published in fp32 and read in bf16: what the published weights would be quantized to was not trained on."""
    base = model_folder("llama")
    fitted = trained(base, tmp_path / "run", training={"precision": "bf16", "learning_rate": 1e-2})
    fitted.tuned.model.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    held = fitted.tuned.model.get_base_model().config.quantization_config  # type: ignore[operator]
    source = MergeSource(base, tmp_path / "adapter", "adapter", Merge.DEQUANTIZED, held, dtype=torch.bfloat16)
    merged = merge_model(source, lambda _: None)
    name = "model.layers.1.mlp.up_proj.weight"
    published = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).get_parameter(name)
    start = rowwise.dequantize(*rowwise.quantize_weight(published.bfloat16()), torch.bfloat16)
    adapted: Any = fitted.tuned.model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    expected = start.float() + adapted.get_delta_weight("default").float()
    assert torch.allclose(merged.model.get_parameter(name).float(), expected, rtol=2**-7, atol=1e-4)
    other = rowwise.dequantize(*rowwise.quantize_weight(published), torch.bfloat16)
    assert not torch.equal(other, start)


def test_layers_are_replaced_as_they_are_read(model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model in 16 bits stands on the device before it is quantized."""
    read: list[int] = []
    convert = loading._Quantize.convert

    def counted(self: Any, given: dict[str, Any], **context: Any) -> dict[str, Any]:
        linear = [m for m in context["model"].modules() if type(m) is nn.Linear and m is not context["model"].lm_head]
        read.append(sum(not module.weight.is_meta for module in linear))
        return convert(self, given, **context)

    monkeypatch.setattr(loading._Quantize, "convert", counted)
    model = AutoModelForCausalLM.from_pretrained(model_folder(), quantization_config=Fp8Config(["lm_head"]))
    assert read == [0] * 28
    assert sum(isinstance(module, Fp8Linear) for module in model.modules()) == 28
