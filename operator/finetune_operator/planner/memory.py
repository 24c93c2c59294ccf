"""Peak memory of one GPU, in parts. Pure: no I/O.

What the trainer does, which the counts follow: frozen weights stay in 16 bits (or quantized), trained ones are fp32
master weights of which autocast makes 16-bit copies (Micikevicius et al. 2018, arXiv:1710.03740); gradients and Adam's
two moments are in fp32, 4 + 4 + 8 bytes for each trained element. Sharding follows Rajbhandari et al. 2020 (ZeRO,
arXiv:1910.02054, section 5), offloading Ren et al. 2021 (ZeRO-Offload, arXiv:2101.06840), quantization Dettmers et al.
2023 (QLoRA, arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from finetune_operator.api.v1alpha1 import MemoryPerGpu
from finetune_operator.planner.activations import (
    activation_bytes,
    bytes_at_the_end,
    bytes_at_the_loss,
    bytes_of_evaluation,
    logit_bytes,
    recomputed_blocks,
    residual_bytes,
)
from finetune_operator.planner.kept import fused_weight_elements
from finetune_operator.planner.workload import CAST, Batch, Layout, Workload, once
from finetune_trainer.contract.vocabulary import LoraVariant, Optimizer, QuantizationType, Strategy

GIB = 2**30
USABLE_SHARE = 0.97
"""A card sold with 80 GiB shows a program 79.1 to 79.6; the rest is a margin for what the counts leave out."""

_CONTEXT = int(0.8 * GIB)
"""The CUDA context, kernels and cuBLAS workspaces; not seen by torch's own counters."""
_COLLECTIVES = int(0.5 * GIB)
"""NCCL's channels."""
_FRAGMENTATION = 0.04
"""Share of what is allocated and freed in every step that the caching allocator cannot reuse."""
_ABSMAX_BLOCK = 64
"""Weights that share a quantization constant (QLoRA, section 3)."""
_DOUBLE_QUANT_BLOCK = 256
"""Constants that share a constant of the second level (QLoRA, section 3: 0.127 bits per weight in all)."""
_OPTIMIZER_BLOCK = 256
"""Elements of 8-bit optimizer state that share a constant (Dettmers et al. 2022, arXiv:2110.02861; bitsandbytes)."""
_MOMENTS = {
    Optimizer.ADAMW: 2,
    Optimizer.ADAMW_TORCH: 2,
    Optimizer.ADAMW_8BIT: 2,
    Optimizer.ADEMAMIX: 3,
    Optimizer.ADEMAMIX_8BIT: 3,
    Optimizer.LION_32BIT: 1,
    Optimizer.LION_8BIT: 1,
    Optimizer.RMSPROP: 1,
    Optimizer.ADAGRAD: 1,
}
"""Numbers that an optimizer keeps on the GPU for each trained element."""
_ZERO_BUCKET = 500_000_000
"""Elements: DeepSpeed's default `reduce_bucket_size` and `allgather_bucket_size`."""
_ZERO_BUCKET_FACTOR = 4.5
"""Buckets that exist at a time with `overlap_comm` (DeepSpeed's documentation)."""
_ZERO_LIVE = 1_000_000_000
"""Elements: DeepSpeed's default `stage3_max_live_parameters`."""


def estimate(work: Workload, batch: Batch, layout: Layout) -> MemoryPerGpu:
    """Peak bytes of one process on one GPU; where it is open whether blocks are compiled, of what needs more."""
    return max((_parts(way, batch, layout) for way in _ways(work, layout)), key=lambda parts: parts.total)


def allocated_bytes(work: Workload, batch: Batch, layout: Layout) -> int:
    """Of an estimate, what torch counts as allocated (`max_memory_allocated`): neither the context nor what the
    caching allocator cannot reuse."""
    parts = estimate(work, batch, layout)
    return parts.total - parts.overhead + _workspaces(work) + _buffers(work, layout)


def _ways(work: Workload, layout: Layout) -> Iterator[Workload]:
    if layout.shards:
        yield work.sharded
        return
    yield work
    if work.may_compile:
        yield work.compiled


def _parts(work: Workload, batch: Batch, layout: Layout) -> MemoryPerGpu:
    batch = replace(batch, rows=batch.rows * work.rows_per_item)
    gradients, loss = gradient_bytes(work, layout), logit_bytes(work, batch)
    at_the_loss, backward = bytes_at_the_loss(work, batch), activation_bytes(work, batch)
    if batch.accumulating or layout.processes > 1:
        most = gradients + max(at_the_loss, backward)
    else:
        # Gradients come as what was kept goes; those of the head, which come first, stand with the loss.
        most = max(at_the_loss, backward, gradients + bytes_at_the_end(work, batch))
    most = max(most, bytes_of_evaluation(work, batch))
    # What the loss took is used again by the backward pass: activations are what there is beyond it.
    logits = min(loss, most - gradients)
    parts = {
        "weights": weight_bytes(work, layout, recomputing=batch.checkpointing),
        "gradients": gradients,
        "optimizer": optimizer_bytes(work, layout),
        "activations": most - gradients - logits,
        "logits": logits,
    }
    parts["overhead"] = _CONTEXT + _workspaces(work) + _buffers(work, layout) + int(_FRAGMENTATION * most)
    return MemoryPerGpu(**parts, total=sum(parts.values()))


def offloaded_bytes(work: Workload, batch: Batch) -> int:
    """Host memory of one process on one GPU for the inputs of recomputed blocks."""
    if not (batch.checkpointing and batch.offloaded):
        return 0
    batch = replace(batch, rows=batch.rows * work.rows_per_item)
    return recomputed_blocks(work, batch) * residual_bytes(work, batch)


def host_estimate(work: Workload, batch: Batch) -> MemoryPerGpu:
    """Peak bytes of one process that trains on CPUs: the same parts, with the libraries in place of CUDA's."""
    parts = estimate(work, batch, Layout(Strategy.SINGLE))
    return parts.model_copy(update={"overhead": parts.overhead + GIB - _CONTEXT, "total": parts.total + GIB - _CONTEXT})


def weight_bytes(work: Workload, layout: Layout, *, recomputing: bool = False) -> int:
    """Frozen and trained weights. ZeRO keeps all of them in 16 bits and counts the fp32 masters to the optimizer."""
    frozen = (work.frozen - _quantized_elements(work)) * work.narrow + _quantized_bytes(work, recomputing=recomputing)
    if layout.strategy is Strategy.DEEPSPEED:
        total = frozen + work.trained * work.narrow
        if layout.zero_stage != 3:
            return total
        return 0 if layout.offload_parameters else total // layout.processes
    if layout.strategy is Strategy.FSDP:
        total = frozen + 4 * work.trained
        return 0 if layout.offload_parameters else total // layout.processes
    return frozen + 4 * work.trained + _cast_copies(work) + work.narrow * fused_weight_elements(work)


@once
def _cast_copies(work: Workload) -> int:
    """Autocast keeps the 16-bit copy of a trained weight until the forward pass is over; compiled blocks do so with
    adapters alone, and cast their weights again."""
    if work.narrow == 4:
        return 0
    matrices = sum(p.size for p in work.trained_base if p.kind in CAST)
    beside = work.trained - sum(p.size for p in work.trained_base)
    return 2 * (beside if work.paths.compiled else matrices + beside)


@once
def _quantized_elements(work: Workload) -> int:
    return sum(p.size for p in work.quantized)


@once
def _quantized_rows(work: Workload) -> int:
    return sum(p.shape[0] for p in work.quantized)


def _quantized_bytes(work: Workload, *, recomputing: bool) -> int:
    """4 bits and a constant for each block of weights, itself in 8 bits with an fp32 constant of its own; or 8 bits and
    an fp32 constant for each row (Dettmers et al. 2022, arXiv:2208.07339, section 3), in FP8 perhaps twice."""
    if work.quantization in (QuantizationType.INT8, QuantizationType.FP8):
        copies = 2 if work.held.keeps_transposed(recomputing=recomputing) else 1
        return copies * _quantized_elements(work) + 4 * _quantized_rows(work)
    elements = _quantized_elements(work)
    constants = elements / _ABSMAX_BLOCK
    per_constant = 1 + 4 / _DOUBLE_QUANT_BLOCK if work.held.double_quant else 4
    return int(elements / 2 + constants * per_constant)


def gradient_bytes(work: Workload, layout: Layout) -> int:
    """One gradient for each trained element: fp32, in 16 bits under ZeRO, a share of them from stage 2 on."""
    if layout.strategy is Strategy.DEEPSPEED:
        whole = work.trained * work.narrow
        if layout.zero_stage == 1:
            return whole
        return 0 if layout.offload_optimizer else whole // layout.processes
    if layout.strategy is Strategy.FSDP:
        return 0 if layout.offload_parameters else 4 * work.trained // layout.processes
    return 4 * work.trained


def optimizer_bytes(work: Workload, layout: Layout) -> int:
    """State of the optimizer, and under ZeRO the fp32 master weights."""
    state = _state_bytes(work)
    if layout.strategy is Strategy.DEEPSPEED:
        if layout.offload_optimizer:
            return 0
        return (state + (4 * work.trained if work.narrow == 2 else 0)) // layout.processes
    if layout.strategy is Strategy.FSDP:
        return 0 if layout.offload_parameters or layout.offload_optimizer else state // layout.processes
    return state


@once
def _state_bytes(work: Workload) -> int:
    if work.optimizer is Optimizer.ADAFACTOR:
        # A row and a column of each matrix (Shazeer and Stern 2018, arXiv:1804.04235, section 3), adapters likewise.
        base = sum(4 * (sum(p.shape) if len(p.shape) > 1 else p.size) for p in work.trained_base)
        layout = work.known.layout
        for name, adapter in work.adapters.items():
            experts, *sides = layout.by_path[name].shape if name in layout.by_path else (1, *_sides(work, name))
            base += 4 * (2 * adapter.rank * experts + sum(sides))
        return base
    # Paged state is moved to the host when the GPU runs out (QLoRA, section 3); plain SGD has none.
    moments = _MOMENTS.get(work.optimizer, 0)
    if work.optimizer.value.endswith("8bit"):
        return moments * work.trained + moments * 4 * work.trained // _OPTIMIZER_BLOCK
    return 4 * moments * work.trained


@once
def _trained_base_elements(work: Workload) -> int:
    return sum(p.size for p in work.trained_base)


def _sides(work: Workload, module: str) -> tuple[int, ...]:
    return work.known.layout.by_path[f"{module}.weight"].shape


@once
def _workspaces(work: Workload) -> int:
    """The largest quantized weight while it is expanded (or transposed, in FP8), and the norm of a DoRA weight, which
    is computed of a whole one in fp32."""
    size = 0
    if work.quantization is not None:
        size += (1 if work.quantization is QuantizationType.FP8 else 2) * work.largest_matrix
    if work.variant is LoraVariant.DORA and work.selection.adapted:
        size += 8 * work.largest_matrix
    if work.selection.adapted_experts:
        # The experts of a block with their adapters added, while the block computes.
        layout = work.known.layout
        size += work.narrow * max(layout.by_path[path].size for path in work.selection.adapted_experts)
    return size


def _buffers(work: Workload, layout: Layout) -> int:
    """What communication needs beside the tensors themselves."""
    if layout.processes == 1:
        return 0
    shape = work.known.shape
    outside = 2 * shape.hidden * shape.vocabulary
    block = (work.known.layout.total - outside) // max(1, shape.blocks)
    if layout.strategy is Strategy.DEEPSPEED:
        buckets = int(min(_ZERO_BUCKET, work.trained) * work.narrow * _ZERO_BUCKET_FACTOR)
        live = min(_ZERO_LIVE, work.known.layout.total) * work.narrow if layout.zero_stage == 3 else 0
        return _COLLECTIVES + buckets + live
    if layout.strategy is Strategy.FSDP:
        # The block at work and the next one; embedding and head, which are a unit of their own. Trained weights are
        # gathered in fp32, cast by autocast, and leave a gradient in fp32 to be divided.
        trained = _trained_base_elements(work) / work.known.layout.total
        width = work.narrow + trained * (4 + 4 if work.narrow == 2 else 4)
        return _COLLECTIVES + int(width * (2 * max(0, block) + outside))
    # DDP's buckets hold a copy of all gradients (PyTorch, `gradient_as_bucket_view`).
    return _COLLECTIVES + 4 * work.trained
