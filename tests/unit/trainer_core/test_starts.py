"""Adapters that start from data (EVA) or from what quantization lost (LoftQ), and what they start as when a run goes
on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune_trainer.contract import AdapterShape, LayerSelection, adapter_shapes, select
from finetune_trainer.contract.vocabulary import LoraVariant, Method
from finetune_trainer.errors import InternalError, UsageError
from finetune_trainer.layers import layout_of
from finetune_trainer.methods import Start, apply_method, check_method, eva
from finetune_trainer.methods.lora import adapters, quiet_peft, trained_names
from finetune_trainer.methods.qlora import prepare_quantized
from tests.tiny_models import meta_model, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer
from tests.trainer_jobs import fit, start_of, token_rows, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder
from tests.unit.trainer_core.test_exactness import quick
from tests.unit.trainer_core.test_export import BASE, export

IDS = torch.arange(3, 15)[None]


def lora(variant: str, **changes: Any) -> dict[str, Any]:
    return {"rank": 4, "alpha": 8, "dropout": 0.0, "variant": variant, "bias": "none", **changes}


# ---- EVA ----


def inputs_of(model: torch.nn.Module, module: str, rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """What a module is given at the trained tokens of the rows."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    for row in rows:
        model(input_ids=row["input_ids"][None])
    handle.remove()
    return torch.cat([x[0, row["labels"] != -100] for x, row in zip(seen, rows, strict=True)])


def test_eva_starts_in_the_directions_in_which_the_inputs_vary_most() -> None:
    model, rows = tiny_model().eval(), token_rows(24)
    layout = layout_of(model)
    selection = select(layout, Method.LORA, LayerSelection(ids=(2,), modules=("q_proj", "down_proj")))
    config = trainer_config(Path("m"), Path("d"), lora=lora("eva", eva_rho=1.0))
    expected = model(input_ids=IDS).logits
    inputs = {name: inputs_of(model, name, rows) for name in selection.adapted}
    tuned = apply_method(model, layout, selection, config, start_of(Path("m"), rows, None))
    assert tuned.adapters == adapter_shapes(selection, rank=4, alpha=8), "rho 1 moves no rank"
    torch.testing.assert_close(tuned.model(input_ids=IDS).logits, expected, msg="B is zero: it is the base still")
    for name, layer in adapters(tuned.model).items():
        a = layer.lora_A["default"].weight.detach()
        centred = inputs[name] - inputs[name].mean(0)
        best = torch.linalg.svd(centred, full_matrices=False)
        captured = (centred @ torch.linalg.qr(a.T).Q).square().sum() / centred.square().sum()
        ideal = best.S[:4].square().sum() / best.S.square().sum()
        assert captured > 0.9 * ideal
        torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-3, rtol=0)


def test_eva_moves_ranks_keeps_their_sum_and_every_scale(model_folder: ModelFolder, tmp_path: Path) -> None:
    base = model_folder()
    options = lora("eva", rank_pattern={"down_proj": 6})
    config = quick("lora", {"all": True}, lora=options)
    fitted = fit(base, config, tmp_path / "run", rows=token_rows(24))
    asked = adapter_shapes(fitted.selection, rank=4, alpha=8, rank_pattern={"down_proj": 6})
    given = fitted.tuned.adapters
    assert sum(shape.rank for shape in given.values()) == sum(shape.rank for shape in asked.values())
    assert {shape.rank for shape in given.values()} != {shape.rank for shape in asked.values()}
    assert all(shape.rank <= 2 * 6 for shape in given.values())
    for name, shape in given.items():
        assert shape.alpha / shape.rank == pytest.approx(asked[name].alpha / asked[name].rank)
    assert fitted.changed() == set(trained_names(fitted.selection, LoraVariant.EVA, given))
    again = fit(base, config, tmp_path / "again", rows=token_rows(24))
    assert again.losses == fitted.losses and again.tuned.adapters == given

    target = export(fitted.tuned, fitted.layout, config, tiny_tokenizer(), BASE, tmp_path / "out")
    with quiet_peft():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), target)
    fitted.tuned.model.eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, fitted.tuned.model(input_ids=IDS).logits)


def test_eva_goes_on_with_the_ranks_of_the_checkpoint_and_looks_at_no_data(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"lora": lora("eva"), "checkpoints": {"every": 2}, "training": {"max_steps": 4}}
    config = quick("lora", {"last": 2}, **changes)
    whole = fit(model_folder(), config, tmp_path / "whole")
    monkeypatch.setattr(eva, "find_directions", lambda *_: pytest.fail("the checkpoint has the ranks"))
    again = fit(model_folder(), config, tmp_path / "again", resume=tmp_path / "whole" / "checkpoint-2")
    assert again.tuned.adapters == whole.tuned.adapters
    assert again.losses[-2:] == whole.losses[-2:]
    ends = (dict(fitted.tuned.model.named_parameters()) for fitted in (whole, again))
    first, second = ends
    assert all(torch.equal(first[name], second[name]) for name in whole.changed())


def test_a_module_that_lost_its_adapter_stays_without_one() -> None:
    shapes = {"a": AdapterShape(4, 8), "b": AdapterShape(2, 8)}
    name = "base_model.model.{}.lora_A.default.weight"
    assert eva.shapes_in({name.format("b"): (3, 64)}, shapes) == {"b": AdapterShape(3, 12)}


def test_eva_without_enough_tokens_is_refused_and_ends() -> None:
    model = tiny_model()
    layout = layout_of(model)
    selection = select(layout, Method.LORA, LayerSelection(last=1))
    config = trainer_config(Path("m"), Path("d"), lora=lora("eva"))

    def nothing(tokens: int) -> Iterator[dict[str, Any]]:
        assert tokens == 8
        return iter(())

    with pytest.raises(UsageError, match=r"spec\.lora\.variant: eva looks for 8 directions"):
        apply_method(model, layout, selection, config, Start(batches=nothing))
    with pytest.raises(InternalError, match="no training data"):
        apply_method(tiny_model(), layout, selection, config)
    wide = trainer_config(Path("m"), Path("d"), lora=lora("eva", rank=65))
    with pytest.raises(UsageError, match=r"spec\.lora\.rank: 65 is more than the 64 inputs"):
        apply_method(tiny_model(), layout, selection, wide, Start(batches=nothing))


def test_eva_ends_where_directions_never_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is new noise: PEFT would go on looking until its directions agree."""
    monkeypatch.setattr(eva, "BATCHES", 3)
    model = tiny_model()
    layout = layout_of(model)
    selection = select(layout, Method.LORA, LayerSelection(last=1, modules=("down_proj",)))
    shapes = adapter_shapes(selection, rank=8, alpha=8)
    config = trainer_config(Path("m"), Path("d"), lora=lora("eva", rank=8))
    assert config.lora is not None
    rows = token_rows(12, seed=9)
    passes: list[int] = []
    forward = eva._BoundedForward.__call__
    monkeypatch.setattr(
        eva._BoundedForward, "__call__", lambda self, m, b: (forward(self, m, b), passes.append(self.passes))
    )
    start = start_of(Path("m"), rows, None)
    assert start.batches is not None
    found, directions = eva.find_directions(model, layout, config.lora, shapes, start.batches)
    assert passes[-1] <= 4
    assert found.keys() == directions.keys() == shapes.keys()


# ---- LoftQ ----


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_loftq_starts_nearer_to_the_published_model(kind: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    base = model_folder("llama", tie_word_embeddings=True)
    quantization = {"type": kind, "double_quant": True, "compute_dtype": "float32"}
    published = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=IDS).logits
    distances = []
    for variant in ("standard", "loftq"):
        options = {"training": {"max_steps": 1, "learning_rate": 0.0}, "quantization": quantization}
        config = quick("qlora", None, lora=lora(variant, rank=16, rank_pattern={"q_proj": 8}), **options)
        fitted = fit(base, config, tmp_path / variant)
        fitted.tuned.model.eval()
        logits = fitted.tuned.model(input_ids=IDS).logits
        distances.append(float((logits - published).detach().norm()))
    assert distances[1] < 0.8 * distances[0]

    # Whoever loads the published model in the same type has the base of the adapter.
    target = export(fitted.tuned, fitted.layout, config, tiny_tokenizer(), BASE, tmp_path / "out")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    alone = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
    # Or some CPUs compute in bf16.
    prepare_quantized(alone, fitted.selection.adapted)
    with quiet_peft():
        again = PeftModel.from_pretrained(alone, target).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)


def test_each_loftq_adapter_is_the_best_of_its_rank_and_scale(model_folder: ModelFolder, tmp_path: Path) -> None:
    import bitsandbytes

    base = model_folder("llama", tie_word_embeddings=True)
    config = quick("qlora", {"last": 1}, lora=lora("loftq", alpha=12), training={"learning_rate": 0.0})
    fitted = fit(base, config, tmp_path)
    originals = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    for name, layer in adapters(fitted.tuned.model).items():
        weight = layer.get_base_layer().weight
        lost = originals[f"{name}.weight"].detach() - bitsandbytes.functional.dequantize_4bit(
            weight.data, weight.quant_state
        )
        made_up = 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        singular = torch.linalg.svdvals(lost)
        assert float((lost - made_up).detach().norm()) == pytest.approx(float(singular[4:].norm()), rel=1e-3)


def test_loftq_is_trained_and_goes_on_from_a_checkpoint(model_folder: ModelFolder, tmp_path: Path) -> None:
    changes = {"lora": lora("loftq"), "checkpoints": {"every": 2}, "training": {"max_steps": 4}}
    config = quick("qlora", {"last": 2}, **changes)
    whole = fit(model_folder(), config, tmp_path / "whole")
    assert whole.changed() == set(trained_names(whole.selection, LoraVariant.LOFTQ))
    again = fit(model_folder(), config, tmp_path / "again", resume=tmp_path / "whole" / "checkpoint-2")
    assert again.losses[-2:] == whole.losses[-2:]


def test_loftq_finds_weights_in_shards_and_names_what_is_missing(model_folder: ModelFolder, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(tmp_path / "shards")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    assert len(set(names["weight_map"].values())) > 2
    config = quick("qlora", {"last": 1}, lora=lora("loftq"))
    fit(tmp_path / "shards", config, tmp_path / "run")
    model = fit(model_folder(), quick("qlora", {"last": 1}), tmp_path / "plain").tuned.model
    del names["weight_map"]["model.layers.3.mlp.up_proj.weight"]
    index.write_text(json.dumps(names))
    from finetune_trainer.methods.loftq import start_from_rounding

    with pytest.raises(UsageError, match=r"have none called model\.layers\.3\.mlp\.up_proj\.weight; use variant"):
        start_from_rounding(model, tmp_path / "shards")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "lora"}, r"spec\.lora\.variant: loftq makes up for the rounding of a 4-bit base"),
        (
            {"method": "qlora", "quantization": {"type": "int8", "double_quant": False, "compute_dtype": "float32"}},
            r"spec\.lora\.variant: loftq makes up",
        ),
        ({"method": "qlora", "output": {"merge": "base16"}}, r"spec\.output\.merge: a loftq adapter makes up"),
    ],
)
def test_where_loftq_makes_no_sense(changes: dict[str, Any], says: str) -> None:
    config = trainer_config(Path("m"), Path("d"), lora=lora("loftq"), **changes)
    with pytest.raises(UsageError, match=says):
        check_method(config, layout_of(meta_model()), "llama")
