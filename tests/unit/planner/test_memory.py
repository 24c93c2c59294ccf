"""Bytes per GPU: exact where the formula is, and against what was measured on an H100."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.v1alpha1 import MemoryPerGpu
from finetune_operator.planner.activations import activation_bytes
from finetune_operator.planner.kept import fused_weight_elements
from finetune_operator.planner.memory import (
    GIB,
    estimate,
    gradient_bytes,
    host_estimate,
    optimizer_bytes,
    weight_bytes,
)
from finetune_operator.planner.workload import Batch, Layout, Workload, readable
from finetune_trainer.contract.vocabulary import Strategy
from tests.unit.planner.models import LLAMA_8B, LLAMA_8B_PARAMETERS, workload

SINGLE = Layout(Strategy.SINGLE)
HEAD = 128256 * 4096
NORMS = 65 * 4096
BLOCK_LINEAR = 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336)
ADAPTERS = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
"""Elements of rank-16 adapters on every linear layer of the blocks."""


def total(work: Workload, batch: Batch, layout: Layout = SINGLE) -> int:
    return estimate(work, batch, layout).total


def zero(stage: int, processes: int = 8, **offload: bool) -> Layout:
    return Layout(Strategy.DEEPSPEED, processes, stage, **offload)


def test_full_tuning_has_masters_gradients_and_two_moments_in_fp32() -> None:
    work = workload(method="full")
    n = LLAMA_8B_PARAMETERS
    assert weight_bytes(work, SINGLE) == 4 * n + 2 * (n - HEAD - NORMS), "16-bit copies of what is multiplied"
    assert gradient_bytes(work, SINGLE) == 4 * n
    assert optimizer_bytes(work, SINGLE) == 8 * n
    assert weight_bytes(workload(method="full", training={"precision": "fp32"}), SINGLE) == 4 * n


def test_lora_trains_its_adapters_alone() -> None:
    work = workload(method="lora")
    assert work.trained == ADAPTERS == 41_943_040
    assert weight_bytes(work, SINGLE) == 2 * LLAMA_8B_PARAMETERS + 6 * ADAPTERS + 2 * fused_weight_elements(work)
    assert gradient_bytes(work, SINGLE) + optimizer_bytes(work, SINGLE) == 12 * ADAPTERS


def test_what_stands_beside_an_adapter_is_there_twice() -> None:
    without, beside = (
        weight_bytes(workload(method="lora", layers={"also": also}), SINGLE) for also in ([], ["lm_head"])
    )
    assert beside - without == (4 + 2) * HEAD


def test_freeze_widens_what_it_trains() -> None:
    work = workload(method="freeze", layers={"last": 2})
    trained = 2 * (BLOCK_LINEAR + 2 * 4096)
    assert work.trained == trained
    frozen = LLAMA_8B_PARAMETERS - trained
    assert weight_bytes(work, SINGLE) == 2 * frozen + 4 * trained + 2 * 2 * BLOCK_LINEAR


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({}, 4.127),
        ({"doubleQuant": False}, 4.5),
        ({"type": "fp4"}, 4.127),
        ({"type": "int8"}, 8.006),
        ({"type": "fp8"}, 16.006),
        ({"type": "fp8", "keepTransposed": "never"}, 8.006),
    ],
)
def test_quantized_weights_take_the_bits_that_the_papers_say(quantization: dict[str, Any], bits: float) -> None:
    work = workload(method="qlora", quantization=quantization)
    packed = 32 * BLOCK_LINEAR
    rest = 2 * (LLAMA_8B_PARAMETERS - packed) + 6 * ADAPTERS
    assert sum(p.size for p in work.quantized) == packed
    assert (weight_bytes(work, SINGLE) - rest) * 8 / packed == pytest.approx(bits, abs=0.002)


@pytest.mark.parametrize(("wanted", "copies"), [("auto", (2, 1)), ("always", (2, 2)), ("never", (1, 1))])
def test_fp8_weights_are_kept_twice_where_activations_are_not_recomputed(wanted: str, copies: tuple[int, int]) -> None:
    work = workload(method="qlora", quantization={"type": "fp8", "keepTransposed": wanted})
    packed = 32 * BLOCK_LINEAR
    for recomputing, times in zip((False, True), copies, strict=True):
        extra = weight_bytes(work, SINGLE, recomputing=recomputing) - weight_bytes(
            workload(method="qlora", quantization={"type": "int8"}), SINGLE
        )
        assert extra == (times - 1) * packed
    plain, thrifty = (estimate(work, Batch(1, 128, recomputing), SINGLE).weights for recomputing in (False, True))
    assert plain - thrifty == (copies[0] - copies[1]) * packed


def test_the_head_what_is_trained_in_full_and_experts_are_not_quantized() -> None:
    tied = workload({**LLAMA_8B, "tie_word_embeddings": True}, method="qlora")
    assert sum(p.size for p in tied.quantized) == 32 * BLOCK_LINEAR
    mixture = {**LLAMA_8B, "model_type": "mixtral"}
    attention = 32 * 4096 * (4096 + 1024 + 1024 + 4096)
    assert sum(p.size for p in workload(mixture, method="qlora").quantized) == attention


@pytest.mark.parametrize(
    ("optimizer", "per_element"),
    [("adamw", 8), ("adamw_8bit", 2 + 8 / 256), ("paged_adamw", 0), ("paged_adamw_8bit", 0), ("sgd", 0)],
)
def test_state_of_the_optimizers(optimizer: str, per_element: float) -> None:
    work = workload(method="full", training={"optimizer": optimizer})
    assert optimizer_bytes(work, SINGLE) == pytest.approx(per_element * LLAMA_8B_PARAMETERS, rel=1e-6)


def test_adafactor_keeps_a_row_and_a_column_of_each_matrix() -> None:
    full = optimizer_bytes(workload(method="full", training={"optimizer": "adafactor"}), SINGLE)
    block = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert full == 4 * (32 * block + 2 * (128256 + 4096) + NORMS)
    lora = optimizer_bytes(workload(method="lora", training={"optimizer": "adafactor"}), SINGLE)
    assert lora == 4 * 32 * (block + 7 * 2 * 16)


def test_zero_divides_more_with_each_stage() -> None:
    """Rajbhandari et al., figure 1: 2 + 2 + 12 bytes, of which 12, then 14, then 16 are shared out."""
    work, n = workload(method="full"), LLAMA_8B_PARAMETERS

    def parts(layout: Layout) -> tuple[int, int, int]:
        return weight_bytes(work, layout), gradient_bytes(work, layout), optimizer_bytes(work, layout)

    assert parts(zero(1)) == (2 * n, 2 * n, 12 * n // 8)
    assert parts(zero(2)) == (2 * n, 2 * n // 8, 12 * n // 8)
    assert parts(zero(3)) == (2 * n // 8, 2 * n // 8, 12 * n // 8)
    assert parts(zero(2, offload_optimizer=True)) == (2 * n, 0, 0)
    assert parts(zero(3, offload_optimizer=True, offload_parameters=True)) == (0, 0, 0)
    assert parts(Layout(Strategy.FSDP, 8)) == (4 * n // 8, 4 * n // 8, 8 * n // 8)
    assert parts(Layout(Strategy.FSDP, 8, None, True, True)) == (0, 0, 0)
    assert parts(zero(3, processes=16))[0] == 2 * n // 16


def test_frozen_weights_are_shared_out_too_where_parameters_are() -> None:
    work = workload(method="lora")
    assert weight_bytes(work, zero(2)) == 2 * (LLAMA_8B_PARAMETERS + ADAPTERS)
    assert weight_bytes(work, zero(3)) == 2 * (LLAMA_8B_PARAMETERS + ADAPTERS) // 8
    assert weight_bytes(work, Layout(Strategy.FSDP, 8)) == (2 * LLAMA_8B_PARAMETERS + 4 * ADAPTERS) // 8


def test_data_parallelism_needs_a_copy_of_the_gradients_and_buffers() -> None:
    work, batch = workload(method="lora"), Batch(1, 2048, True)
    alone, together = (estimate(work, batch, layout) for layout in (SINGLE, Layout(Strategy.DDP, 4)))
    assert together.overhead - alone.overhead == 4 * ADAPTERS + GIB // 2
    assert together.weights == alone.weights and together.activations == alone.activations


def test_fsdp_gathers_trained_weights_in_fp32_with_a_copy_and_a_gradient() -> None:
    def gathered(method: str) -> float:
        parts = estimate(workload(method=method), Batch(1, 2048, True), Layout(Strategy.FSDP, 8))
        return parts.overhead - 1.3 * GIB - 0.04 * (parts.gradients + parts.activations + parts.logits)

    # 2 bytes for each frozen weight of two blocks, embedding and head; 4 + 2 + 4 for each trained one.
    assert gathered("full") / gathered("lora") == pytest.approx(5, rel=1e-3)


def test_strategies_need_less_the_more_they_share() -> None:
    work, batch = workload(method="full"), Batch(1, 2048, True)
    offloaded = zero(3, offload_optimizer=True, offload_parameters=True)
    sizes = [total(work, batch, layout) for layout in (Layout(Strategy.DDP, 8), zero(1), zero(2), zero(3), offloaded)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_more_rows_tokens_and_rank_need_more(method: str, checkpointing: bool) -> None:
    work = workload(method=method)
    for smaller, larger in (
        (Batch(1, 2048, checkpointing), Batch(2, 2048, checkpointing)),
        (Batch(1, 2048, checkpointing), Batch(1, 4096, checkpointing)),
    ):
        assert total(work, smaller) < total(work, larger)
    if method != "full":
        ranks = [total(workload(method=method, lora={"rank": rank}), Batch(1, 512, checkpointing)) for rank in (8, 64)]
        assert ranks[0] < ranks[1]


def test_packed_rows_pay_for_their_mask_by_the_square_of_the_length() -> None:
    length = 8192
    plain, packed = (
        activation_bytes(
            workload(method="lora", dataset={"packing": packing}, training={"flashAttn": "sdpa"}),
            Batch(1, length, False),
        )
        for packing in (False, True)
    )
    repeated_keys = 2 * 2 * (4096 - 1024) * length
    assert packed - plain == 32 * (2 * length**2 + repeated_keys) + length**2


def test_parts_add_up() -> None:
    memory = estimate(workload(method="lora"), Batch(2, 1024, False), SINGLE)
    names = ("weights", "gradients", "optimizer", "activations", "logits", "overhead")
    assert memory.total == sum(getattr(memory, name) for name in names)
    assert all(getattr(memory, name) > 0 for name in names)


def test_without_a_gpu_there_is_no_cuda() -> None:
    work, batch = workload(method="lora"), Batch(1, 512, False)
    gpu, host = estimate(work, batch, SINGLE), host_estimate(work, batch)
    assert (host.weights, host.activations) == (gpu.weights, gpu.activations)
    assert host.total - gpu.total == GIB - int(0.8 * GIB)


def plain_stack(memory: MemoryPerGpu, tokens: int) -> float:
    """GiB that torch's counters would show of a training loop that computes all logits at once: three fp32 tensors of
    (tokens, vocabulary) in the place of our chunks. The context is not in those counters."""
    full = 3 * 4 * tokens * 128256
    return (memory.total - memory.overhead - memory.logits + full) / GIB


@pytest.mark.parametrize(
    ("changes", "rows", "measured"),
    [
        ({"method": "lora"}, 4, 29.4),
        ({"method": "qlora"}, 1, 9.4),
        ({"method": "qlora"}, 4, 19.7),
    ],
    ids=["lora-4", "qlora-1", "qlora-4"],
)
def test_peaks_measured_on_an_h100_with_a_plain_stack(changes: dict[str, Any], rows: int, measured: float) -> None:
    """Llama 3.1 8B's shape, rank 16 on all linear layers, rows of 2048 tokens, gradient checkpointing.

    The plain stack differs in its loss, which `plain_stack` allows for, and in that its peak, at the loss, comes before
    the one block is recomputed that we add: the estimates are 7 to 14 % above.
    """
    memory = estimate(workload(**changes), Batch(rows, 2048, True), SINGLE)
    assert measured <= plain_stack(memory, rows * 2048) < 1.15 * measured


def test_freezing_all_but_two_blocks_of_an_8b_model_on_an_h100() -> None:
    """22 to 31 GiB were measured with four rows of 2048 tokens, by the kind of loss and what was cached."""
    work = workload(method="freeze", layers={"last": 2})
    memory = estimate(work, Batch(4, 2048, False), SINGLE)
    assert 22 < (memory.total - memory.overhead) / GIB < 31


@pytest.mark.parametrize(
    ("size", "text"), [(13.25 * GIB, "13.2 GiB"), (GIB, "1.0 GiB"), (GIB - 1, "1024 MiB"), (1, "1 MiB"), (0, "0.0 GiB")]
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert readable(size) == text
