"""Ranks and alphas by pattern: tables for the words, properties for the numbers, and what PEFT makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune_trainer.contract import (
    AdapterShape,
    LayerSelection,
    SelectionError,
    adapter_shapes,
    check_experts,
    count_trainable,
    select,
)
from finetune_trainer.contract.vocabulary import LoraVariant, Method
from finetune_trainer.layers import layout_of
from finetune_trainer.methods.lora import adapters, quiet_peft
from tests.tiny_models import meta_model
from tests.tiny_tokenizer import tiny_tokenizer
from tests.trainer_jobs import fit
from tests.unit.trainer_core.conftest import ModelFolder
from tests.unit.trainer_core.test_exactness import quick
from tests.unit.trainer_core.test_export import BASE, export
from tests.unit.trainer_core.test_selection import layout

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def ranks(pattern: dict[str, int], blocks: int = 12) -> dict[str, int]:
    """Module below its block, with the block's number, to its rank where that is not 2."""
    selection = select(layout(blocks), Method.LORA, None)
    shapes = adapter_shapes(selection, rank=2, alpha=4, rank_pattern=pattern)
    assert list(shapes) == list(selection.adapted)
    return {name.removeprefix("model.layers."): shape.rank for name, shape in shapes.items() if shape.rank != 2}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({}, {}),
        ({"1.self_attn.q_proj": 8}, {"1.self_attn.q_proj": 8}),
        ({"layers.11.mlp": 8}, {"11.mlp.up_proj": 8, "11.mlp.down_proj": 8}),
        ({"model.layers.1.self_attn.[qv]_proj": 8}, {"1.self_attn.q_proj": 8, "1.self_attn.v_proj": 8}),
        ({"2-3.self_attn.k_proj": 8}, {"2.self_attn.k_proj": 8, "3.self_attn.k_proj": 8}),
        ({"9-10.up_proj": 8}, None),
        ({"layers.9-10.*.up_proj": 8}, {"9.mlp.up_proj": 8, "10.mlp.up_proj": 8}),
        # More segments count before fewer, then fewer wildcards before more, whatever the order.
        ({"layers.0.mlp": 8, "0.mlp.up_proj": 16}, None),
        ({"0.mlp": 8, "0.mlp.up_proj": 16}, {"0.mlp.up_proj": 16, "0.mlp.down_proj": 8}),
        ({"0.mlp.up_proj": 16, "0.mlp.*": 8}, {"0.mlp.up_proj": 16, "0.mlp.down_proj": 8}),
        ({"0.mlp.*_proj": 8, "0.mlp.up_*": 8}, {"0.mlp.up_proj": 8, "0.mlp.down_proj": 8}),
    ],
)
def test_patterns_match_whole_segments(pattern: dict[str, int], expected: dict[str, int] | None) -> None:
    if expected is None:
        with pytest.raises(SelectionError):
            ranks(pattern)
        return
    assert ranks(pattern) == expected
    assert ranks(dict(reversed(pattern.items()))) == expected


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ({"q_prj": 8}, r"'q_prj' matches no module that carries an adapter: did you mean .*q_proj"),
        ({"proj": 8}, "'proj' matches no module"),
        ({"layers.1": 4, "layers.12": 8}, "'layers.12' matches no module"),
        ({"model.norm": 8}, "'model.norm' matches no module"),
        ({"0.mlp.*_proj": 8, "0.mlp.up_*": 4}, r"'0.mlp.\*_proj' and '0.mlp.up_\*' say different things about"),
    ],
)
def test_patterns_that_do_not_fit(pattern: dict[str, int], says: str) -> None:
    with pytest.raises(SelectionError, match=says) as caught:
        ranks(pattern)
    assert caught.value.field == "spec.lora.rankPattern"
    selection = select(layout(12), Method.LORA, None)
    with pytest.raises(SelectionError, match=r"^spec\.lora\.alphaPattern: "):
        adapter_shapes(selection, rank=2, alpha=4, alpha_pattern=pattern)


def test_alphas_have_patterns_of_their_own() -> None:
    selection = select(layout(2), Method.LORA, LayerSelection(modules=("mlp",)))
    shapes = adapter_shapes(selection, rank=2, alpha=4, rank_pattern={"up_proj": 8}, alpha_pattern={"1.mlp": 32})
    assert list(shapes.values()) == [AdapterShape(8, 4), AdapterShape(2, 4), AdapterShape(8, 32), AdapterShape(2, 32)]


@given(st.integers(1, 12), st.dictionaries(st.sampled_from(LINEAR), st.integers(1, 9), min_size=1), st.data())
def test_each_module_has_the_rank_of_its_name_and_counts_add_up(
    blocks: int, pattern: dict[str, int], data: st.DataObject
) -> None:
    model = layout(blocks)
    selection = select(model, Method.LORA, None)
    block = data.draw(st.integers(0, blocks - 1))
    exact = f"layers.{block}.self_attn.o_proj"
    shapes = adapter_shapes(selection, rank=3, alpha=6, rank_pattern={**pattern, exact: 11})
    expected = 0
    for name, shape in shapes.items():
        wanted = 11 if name.endswith(exact) else pattern.get(name.rpartition(".")[2], 3)
        assert shape == AdapterShape(wanted, 6)
        expected += wanted * sum(model.by_path[f"{name}.weight"].shape)
    assert count_trainable(model, selection, shapes=shapes) == expected
    uniform = adapter_shapes(selection, rank=3, alpha=6)
    assert count_trainable(model, selection, shapes=uniform) == count_trainable(model, selection, rank=3)


@pytest.mark.parametrize(("variant", "dropout", "refused"), [("dora", 0.0, True), ("rslora", 0.0, False)])
def test_what_experts_cannot_have(variant: str, dropout: float, refused: bool) -> None:
    model = layout(2, experts=True)
    experts = select(model, Method.LORA, LayerSelection(modules=("experts",)))
    if refused:
        with pytest.raises(SelectionError, match=r"spec\.lora\.variant: dora cannot adapt the fused experts"):
            check_experts(experts, LoraVariant(variant), dropout)
    else:
        check_experts(experts, LoraVariant(variant), dropout)
    with pytest.raises(SelectionError, match=r"spec\.lora\.dropout: "):
        check_experts(experts, LoraVariant.STANDARD, 0.1)
    check_experts(select(model, Method.LORA, None), LoraVariant.DORA, 0.5)


def test_fused_experts_count_a_pair_of_matrices_each() -> None:
    model = layout_of(meta_model("mixtral"))
    selection = select(model, Method.LORA, LayerSelection(ids=(1,), modules=("experts",)))
    shapes = adapter_shapes(selection, rank=2, alpha=4, rank_pattern={"down_proj": 3})
    assert count_trainable(model, selection, shapes=shapes) == 4 * 2 * (256 + 64) + 4 * 3 * (64 + 128)


# ---- in PEFT ----


@pytest.mark.parametrize("variant", ["standard", "dora", "rslora", "pissa", "olora"])
def test_ranks_and_scales_reach_peft_and_come_back_from_the_export(
    variant: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "variant": variant, "bias": "none"}
    lora |= {"rank_pattern": {"3.mlp": 2, "v_proj": 6}, "alpha_pattern": {"layers.3.mlp.up_proj": 32}}
    config = quick("lora", {"last": 2}, lora=lora)
    fitted = fit(model_folder("llama-biased"), config, tmp_path / "run")
    found = adapters(fitted.tuned.model)
    block = "model.layers.3"
    assert {n: layer.r["default"] for n, layer in found.items() if n.startswith(block)} == {
        **{f"{block}.self_attn.{x}_proj": 4 for x in "qko"},
        f"{block}.self_attn.v_proj": 6,
        **{f"{block}.mlp.{x}_proj": 2 for x in ("gate", "up", "down")},
    }
    root = 2**0.5 if variant == "rslora" else 2
    assert found[f"{block}.mlp.up_proj"].scaling["default"] == pytest.approx(32 / root)
    assert found["model.layers.2.mlp.up_proj"].r["default"] == 4
    assert fitted.tuned.trainable == sum(fitted.before[name].numel() for name in fitted.changed())

    target = export(fitted.tuned, fitted.layout, config, tiny_tokenizer(), BASE, tmp_path / "out")
    with quiet_peft():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder("llama-biased")), target)
    ids = torch.arange(3, 15)[None]
    fitted.tuned.model.eval()
    torch.testing.assert_close(
        loaded(input_ids=ids).logits, fitted.tuned.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )
