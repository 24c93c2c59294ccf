"""What a job's fast paths are taken to be, and what they keep, held against what autograd keeps along them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

from finetune_operator.planner.activations import attention_bytes, bytes_of_evaluation
from finetune_operator.planner.kept import block_bytes_per_token, fused_weight_elements
from finetune_operator.planner.memory import estimate
from finetune_operator.planner.paths import Paths, may_compile, paths_of
from finetune_operator.planner.workload import Batch, Layout
from finetune_trainer.contract.vocabulary import Method, Strategy
from tests.unit.planner.models import spec, workload
from tests.unit.planner.test_activations import BATCH, GROUPED, HEADED, compare

FAST = Paths(samples=True, capped=True, shared=True, fused=True)


# torch's compiler makes an object of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("config", "method", "paths"),
    [
        (LlamaConfig(**GROUPED), Method.LORA, Paths(shared=True)),
        (LlamaConfig(**GROUPED), Method.LORA, FAST),
        (LlamaConfig(**GROUPED), Method.FULL, Paths(samples=True)),
        (Qwen3Config(**HEADED), Method.LORA, FAST),
        (LlamaConfig(**{**GROUPED, "num_hidden_layers": 4}), Method.LORA, replace(FAST, compiled=True)),
    ],
    ids=["llama-shared", "llama-fast", "llama-full", "qwen3-fast", "llama-compiled"],
)
def test_what_is_kept_along_the_fast_paths(config: PreTrainedConfig, method: Method, paths: Paths) -> None:
    assert 0.95 < compare(config, method, paths=paths, packed=True) < 1.08


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, FAST),
        ({"training": {"torchCompile": "always"}}, replace(FAST, compiled=True)),
        ({"training": {"flashAttn": "sdpa"}}, Paths(shared=True, fused=True)),
        ({"training": {"maxSteps": 37, "batchSize": 8}}, replace(FAST, capped=False)),
        ({"training": {"maxSteps": 37, "batchSize": 8, "flashAttn": "flex"}}, FAST),
        ({"training": {"fuseAdapters": "never"}}, Paths(samples=True, capped=True, shared=True)),
        ({"lora": {"dropout": 0.1}}, Paths(samples=True, capped=True)),
        ({"lora": {"variant": "dora"}}, Paths(samples=True, capped=True)),
        ({"training": {"precision": "fp32"}}, Paths()),
        ({"training": {"precision": "fp32", "flashAttn": "flex"}}, Paths(samples=True, capped=True)),
        ({"training": {"precision": "fp32", "flashAttn": "varlen"}, "resources": {"gpus": 0}}, Paths()),
        ({"training": {"objective": "dpo"}}, Paths()),
        ({"training": {"neftuneAlpha": 5}}, Paths(shared=True, fused=True)),
        ({"method": "full"}, Paths(samples=True, capped=True)),
        ({"method": "prefix"}, Paths()),
        ({"resources": {"gpus": 0}}, Paths(shared=True)),
    ],
)
def test_the_paths_of_a_job(changes: dict[str, Any], expected: Paths) -> None:
    assert paths_of(spec(**{"method": "lora", **changes})) == expected


@pytest.mark.parametrize(
    ("changes", "perhaps"),
    [
        ({}, True),
        ({"training": {"torchCompile": "never"}}, False),
        ({"training": {"torchCompile": "always"}}, False),
        ({"training": {"maxSteps": 37, "batchSize": 8}}, False),
        ({"training": {"maxSteps": 38, "batchSize": 8}}, True),
        ({"training": {"objective": "dpo"}}, False),
        ({"method": "qlora", "quantization": {"type": "int8"}}, False),
        ({"method": "qlora"}, True),
        ({"resources": {"gpus": 0}}, False),
    ],
)
def test_long_runs_are_compiled_perhaps(changes: dict[str, Any], perhaps: bool) -> None:
    assert may_compile(spec(**{"method": "lora", **changes})) is perhaps


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_where_it_is_open_the_way_that_needs_more_counts(method: str, checkpointing: bool) -> None:
    batch, layout = Batch(2, 2048, checkpointing), Layout(Strategy.SINGLE)
    always, never, auto = (
        estimate(workload(method=method, training={"torchCompile": wanted}), batch, layout)
        for wanted in ("always", "never", "auto")
    )
    assert always.total != never.total
    assert auto == max(always, never, key=lambda parts: parts.total)


def test_fused_adapters_are_columns_and_rows_of_the_frozen_weights() -> None:
    expected = 32 * ((4096 + 2 * 1024) * 48 + 2 * 14336 * 32 + 14336 * 16)
    assert fused_weight_elements(workload(method="lora")) == expected
    assert fused_weight_elements(workload(method="qlora")) == 0
    assert fused_weight_elements(workload(method="lora", training={"fuseAdapters": "never"})) == 0
    few = workload(method="lora", lora={"rank": 8}, layers={"all": True, "modules": ["q_proj", "v_proj"]})
    assert fused_weight_elements(few) == 32 * (4096 + 1024) * 16, "filled up to 16"


def test_sharded_weights_are_computed_as_transformers_does() -> None:
    work = workload(method="lora", dataset={"packing": True})
    batch = Batch(2, 2048, False)
    single, sharded = (
        estimate(work, batch, one).activations for one in (Layout(Strategy.SINGLE), Layout(Strategy.FSDP, 2))
    )
    assert sharded - single > 32 * 2 * 2 * 2048**2 - 32 * 2 * 2048 * 2 * 2 * 4096, "masks and repeated keys"


GEMMA = Gemma2Config(**HEADED).to_dict()
PACKED = {"packing": True, "maxLength": BATCH.length}


def test_scores_that_a_kernel_caps_are_not_kept() -> None:
    """A short run does not wait for the kernel: it has the mask and the scores of one that is not to have it."""
    kept, short, masked = (
        workload(GEMMA, method="lora", dataset=PACKED, training=training)
        for training in ({}, {"maxSteps": 10}, {"maxSteps": 10, "flashAttn": "sdpa"})
    )
    assert attention_bytes(kept, BATCH) == 0
    pairs = BATCH.rows * BATCH.length**2
    assert attention_bytes(short, BATCH) == (2 + 8 * GEMMA["num_attention_heads"]) * pairs
    assert attention_bytes(short, BATCH) == attention_bytes(masked, BATCH)
    assert block_bytes_per_token(kept) < block_bytes_per_token(short) == block_bytes_per_token(masked)


def test_a_row_is_evaluated_without_the_kernel() -> None:
    """However short what is kept is, the scores of one row have to fit."""
    long = replace(BATCH, length=32_768, rows=1)
    job = workload(GEMMA, method="lora", dataset=PACKED)
    parts = estimate(job, long, Layout(Strategy.SINGLE, 1))
    assert parts.gradients + parts.activations + parts.logits == 8 * GEMMA["num_attention_heads"] * long.length**2
    llama = workload(LlamaConfig(**GROUPED).to_dict(), method="lora", dataset=PACKED)
    assert bytes_of_evaluation(llama, long) == 0
