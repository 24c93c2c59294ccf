"""Predicted activations, held against what autograd really keeps of the models that the trainer builds."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from finetune_operator.planner.activations import activation_bytes, attention_bytes, logit_bytes
from finetune_operator.planner.kept import block_bytes_per_token, trained_inputs
from finetune_operator.planner.paths import Paths
from finetune_operator.planner.shapes import read_model
from finetune_operator.planner.workload import Batch, Workload
from finetune_trainer.contract import LayerSelection, Selection, adapter_shapes, select
from finetune_trainer.contract.config import LoraConfig
from finetune_trainer.contract.vocabulary import LoraBias, LoraVariant, Method, Optimizer, Precision
from finetune_trainer.fast import adapter_groups, adapters, attention, compilation
from finetune_trainer.fast.attention.reference import ONE_BY_ONE
from finetune_trainer.fast.rows import flatten
from finetune_trainer.layers import apply_selection, checkpoint_blocks, decoder_blocks, layout_of
from finetune_trainer.methods.lora import add_adapters
from finetune_trainer.model import set_precision
from tests.unit.planner.models import LLAMA_8B, workload

ROWS, LENGTH, RANK = 2, 104, 4
BATCH = Batch(ROWS, LENGTH, False)
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 16}


def prepared(
    config: PreTrainedConfig, method: Method, selection: Selection, precision: Precision, variant: LoraVariant
) -> PreTrainedModel:
    """A model as the trainer would have it after loading and applying a method."""
    dtype = torch.bfloat16 if precision is Precision.BF16 else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layout = layout_of(model)
    if not method.uses_lora:
        set_precision(model, selection.parameters, dtype)
        apply_selection(model, selection.parameters)
        return model
    lora = LoraConfig(rank=RANK, alpha=16, dropout=0.0, variant=variant, bias=LoraBias.NONE)
    tuned = add_adapters(model, layout, selection, lora, adapter_shapes(selection, rank=RANK, alpha=16))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    base: PreTrainedModel = tuned.get_base_model()
    return base


def kept_bytes(
    model: PreTrainedModel, precision: Precision, *, packed: bool = False, paths: Paths | None = None
) -> int:
    """Bytes of all storages that the blocks' backward pass holds on to, weights and casts of weights left out."""
    paths = paths or Paths()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.BF16)
    with ExitStack() as stack:
        install(model.train(), paths, stack, autocast)
        return _kept_bytes(model, inputs_of(packed=packed, samples=paths.samples), autocast)


def install(model: PreTrainedModel, paths: Paths, stack: ExitStack, autocast: torch.autocast) -> None:
    """What the trainer installs for these paths."""

    @torch.no_grad()
    def run_few_tokens() -> None:
        model.eval()
        with autocast:
            model.base_model(input_ids=torch.arange(3, 11)[None], use_cache=False)
        model.train()

    blocks = list(decoder_blocks(model, layout_of(model)))
    if paths.samples:
        stack.enter_context(attention.installed(model, ONE_BY_ONE))
    if paths.shared:
        stack.enter_context(adapters.without_wide_inputs(model))
    if paths.fused:
        stack.enter_context(adapter_groups.grouped(model, blocks, run_few_tokens))
    if paths.compiled:
        stack.enter_context(compilation.compiled(blocks, draws=False))


def inputs_of(*, packed: bool, samples: bool) -> dict[str, Any]:
    """A batch as the trainer lays it out: full rows, or several samples in a row."""
    ids = torch.randint(3, 500, (ROWS, LENGTH))
    if not samples:
        positions = {"position_ids": torch.arange(LENGTH // 2).repeat(ROWS, 2)} if packed else {}
        return {"input_ids": ids, "use_cache": False, **positions}
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(LENGTH).repeat(ROWS, 1)}
    flat = flatten(batch, capacity=ROWS * LENGTH, longest=LENGTH)
    return {"use_cache": False} | {name: value for name, value in flat.items() if name != "labels"}


def _kept_bytes(model: PreTrainedModel, inputs: dict[str, Any], autocast: torch.autocast) -> int:
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model.base_model(**inputs)
    return sum(kept.values())


def compare(
    config: PreTrainedConfig,
    method: Method,
    *,
    layers: LayerSelection | None = None,
    precision: Precision = Precision.BF16,
    packed: bool = False,
    variant: LoraVariant = LoraVariant.STANDARD,
    paths: Paths | None = None,
) -> float:
    """Predicted over measured."""
    torch.manual_seed(0)
    model = read_model(config.to_dict())
    selection = select(model.layout, method, layers)
    tuned = prepared(config, method, selection, precision, variant)
    measured = kept_bytes(tuned, precision, packed=packed, paths=paths)
    work = Workload(
        known=model,
        selection=selection,
        method=method,
        precision=precision,
        optimizer=Optimizer.ADAMW,
        packing=packed,
        adapters=adapter_shapes(selection, rank=RANK, alpha=16),
        variant=variant,
        paths=paths or Paths(),
    )
    blocks = model.shape.blocks - work.lowest
    fixed = blocks * (block_bytes_per_token(work) * BATCH.tokens + attention_bytes(work, BATCH))
    # The norm after the last block keeps its input in fp32 and, trained, what it scales.
    final = (8 if model.layout.final_norm in {p.module for p in work.trained_base} else 4) * model.shape.hidden
    return (fixed + (sum(trained_inputs(work).values()) + final) * BATCH.tokens) / measured


@pytest.mark.parametrize("method", [Method.LORA, Method.FULL], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**GROUPED),
        Qwen2Config(**GROUPED),
        Qwen3Config(**HEADED),
        Gemma2Config(**HEADED),
        Gemma3TextConfig(**HEADED),
        MixtralConfig(**GROUPED, num_local_experts=4),
        Qwen3MoeConfig(**HEADED, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256),
    ],
    ids=lambda config: config.model_type,
)
def test_within_nine_percent_in_mixed_precision(config: PreTrainedConfig, method: Method) -> None:
    assert 0.95 < compare(config, method) < 1.09


@pytest.mark.parametrize("method", [Method.LORA, Method.FULL], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        PhiConfig(**GROUPED),
        GPTNeoXConfig(**SMALL),
        GPT2Config(
            vocab_size=512,
            n_embd=128,
            n_layer=2,
            n_head=8,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0,
            attn_pdrop=0,
            embd_pdrop=0,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_families_whose_arithmetic_differs_on_gpus_are_compared_in_fp32(
    config: PreTrainedConfig, method: Method
) -> None:
    """On a GPU autocast runs layer norms and powers in fp32, which the counts follow and a CPU does not."""
    assert 0.92 < compare(config, method, precision=Precision.FP32) < 1.16


def test_chosen_layers_and_modules() -> None:
    few = LayerSelection(last=1, modules=("q_proj", "v_proj"))
    # The norms of the lowest trained block keep nothing, which is much of a model of two.
    assert 0.95 < compare(LlamaConfig(**GROUPED), Method.LORA, layers=few) < 1.1
    assert 0.95 < compare(LlamaConfig(**GROUPED), Method.FREEZE, layers=LayerSelection(last=1)) < 1.15
    assert 0.95 < compare(LlamaConfig(**GROUPED), Method.FREEZE, layers=LayerSelection(ids=(1,))) < 1.15


def test_packed_rows_and_dora_keep_more() -> None:
    assert 0.95 < compare(LlamaConfig(**GROUPED), Method.LORA, packed=True) < 1.05
    assert 0.9 < compare(LlamaConfig(**GROUPED), Method.LORA, variant=LoraVariant.DORA) < 1.1


def test_checkpointing_keeps_the_residual_of_each_block_and_one_block_whole() -> None:
    work = workload(method="lora")
    residual = 2 * 4096 * 4 * 2048
    by_blocks = [
        activation_bytes(workload({**LLAMA_8B, "num_hidden_layers": n}, method="lora"), Batch(4, 2048, True))
        for n in (1, 2, 32)
    ]
    assert by_blocks[1] - by_blocks[0] == residual
    assert by_blocks[2] - by_blocks[0] == 31 * residual
    assert activation_bytes(work, Batch(4, 2048, False)) > 10 * by_blocks[2]
    full = [
        activation_bytes(workload({**LLAMA_8B, "num_hidden_layers": n}, method="full"), Batch(4, 2048, True))
        for n in (1, 2)
    ]
    assert full[1] - full[0] == 2 * residual, "its residual stream is in fp32"


@pytest.mark.parametrize("layers", [{"all": True}, {"last": 8}])
def test_each_block_that_is_not_recomputed_keeps_all_of_its_own(layers: dict[str, Any]) -> None:
    work = workload(method="lora", layers=layers)
    reached = 32 - work.lowest
    none = activation_bytes(work, Batch(4, 2048, False))
    every = activation_bytes(work, Batch(4, 2048, True))
    some = [activation_bytes(work, Batch(4, 2048, True, recomputed=n)) for n in range(1, reached + 1)]
    residual = 2 * 4096 * 4 * 2048
    block = some[0] - some[1] + residual
    assert some[0] == none - block + residual
    assert [one - other for one, other in itertools.pairwise(some[:-1])] == [block - residual] * (reached - 2)
    assert some[-1] == every == activation_bytes(work, Batch(4, 2048, True, recomputed=99))


@pytest.mark.parametrize("recomputed", [1, 3])
def test_blocks_above_the_recomputed_ones_keep_what_they_did(recomputed: int) -> None:
    config = LlamaConfig(**{**GROUPED, "num_hidden_layers": 4})
    selection = select(read_model(config.to_dict()).layout, Method.LORA, None)
    model = prepared(config, Method.LORA, selection, Precision.BF16, LoraVariant.STANDARD).train()
    whole = kept_bytes(model, Precision.BF16, packed=False)
    assert checkpoint_blocks(model, layout_of(model), enabled=True, blocks=recomputed) == 0
    some = kept_bytes(model, Precision.BF16, packed=False)
    # Beside them the input of each recomputed block, and what the final norm keeps, in fp32.
    elements = ROWS * LENGTH * config.hidden_size
    assert 0 < some - whole * (4 - recomputed) / 4 < (recomputed * 2 + 4) * 1.3 * elements


def test_nothing_is_kept_below_the_lowest_trained_block() -> None:
    sizes = [
        activation_bytes(workload(method="freeze", layers=layers), Batch(4, 2048, False))
        for layers in ({"last": 1}, {"last": 2}, {"last": 32}, {"first": 1})
    ]
    one = sizes[1] - sizes[0]
    assert sizes[2] - sizes[0] == 31 * one
    assert sizes[3] > 19 * one, "the whole frozen suffix is passed backwards"


@pytest.mark.parametrize(
    ("changes", "lowest"),
    [
        ({"method": "lora"}, 0),
        ({"method": "lora", "layers": {"ids": [7, 20]}}, 7),
        ({"method": "freeze", "layers": {"last": 3, "also": ["lm_head", "norm"]}}, 29),
        ({"method": "freeze", "layers": {"last": 3, "also": ["embeddings"]}}, 0),
        ({"method": "full"}, 0),
        ({"method": "prompt"}, 0),
        ({"method": "ia3", "layers": {"last": 2}}, 30),
    ],
)
def test_the_lowest_block_of_the_backward_pass(changes: dict[str, Any], lowest: int) -> None:
    assert workload(**changes).lowest == lowest


def test_the_loss_holds_one_chunk_of_logits_however_many_tokens_there_are() -> None:
    work = workload(method="lora")
    few, many = (logit_bytes(work, Batch(rows, 2048, True)) for rows in (1, 8))
    hidden = 2048 * 4096 * 10
    assert many - few == 7 * hidden
    assert few - hidden == (2**25 // 128256) * 128256 * 12
    assert logit_bytes(work, Batch(1, 8, True)) == 8 * 128256 * 12 + 8 * 4096 * 10
    trained = workload(method="freeze", layers={"last": 1, "also": ["lm_head"]})
    assert logit_bytes(trained, Batch(1, 2048, True)) - few == 12 * 128256 * 4096
