"""Bytes that the backward pass needs of the forward pass. Pure: no I/O.

What one block keeps is counted in `kept`. Checkpointing keeps each block's input, perhaps in host memory, and
recomputes one block at a time (Chen et al. 2016, arXiv:1604.06174). The blocks that are recomputed are the lowest of
those that the backward pass reaches: when it comes to them, what the blocks above kept is gone. Blocks below the lowest
trained one keep nothing.

Memory is highest either when the loss is taken, or in the backward pass of the highest block, when nothing of what was
kept is gone yet; with checkpointing also when a block was recomputed. What each of these needs besides is gone when the
other comes, so that the larger one counts.
"""

from __future__ import annotations

from finetune_operator.planner.kept import block_bytes_per_token, inputs_from, mlps_are_whole, most_inputs
from finetune_operator.planner.workload import Batch, Workload
from finetune_trainer.contract.vocabulary import Method, QuantizationType

LOGITS_PER_CHUNK = 2**25
"""Elements of logits that the trainer's loss holds at a time (`finetune_trainer.loss`)."""
COMPILED_LOGITS_PER_CHUNK = 2**27
"""The same where it is compiled (`finetune_trainer.fast.cross_entropy`)."""
INPUTS_ON_GPU = 2
"""Of blocks whose inputs are in host memory: the one at work and the next (`finetune_trainer.fast.offload`)."""
_BYTES_PER_LOGIT = 12
"""fp32 logits and their log-softmax; in the backward pass the latter, its gradient, and the gradient in 16 bits."""
_BYTES_PER_COMPILED_LOGIT = 4
"""Logits and their gradient, in 16 bits."""
_BYTES_PER_TRAINED_HEAD = 12
"""fp32 gradient of all chunks, of one, and its scaled sum or, before, the 16-bit weight and its gradient."""


def attention_bytes(work: Workload, batch: Batch) -> int:
    """What one block keeps for each pair of tokens of a row: nothing, but for masks and eager attention."""
    pairs = batch.rows * batch.length**2
    mask = work.narrow * pairs if _masked(work) else 0
    shape = work.known.shape
    kept = shape.keeps_scores or (shape.caps_scores and not work.paths.capped)
    return mask + (_bytes_of_scores(work) * pairs if kept else 0)


def _masked(work: Workload) -> bool:
    return work.packing and not work.without_mask


def bytes_of_evaluation(work: Workload, batch: Batch) -> int:
    """What evaluating one row takes where training has a kernel for its scores and evaluation has none: there the
    trainer takes fewer rows at a time until they fit (`finetune_trainer.evaluation.scores`)."""
    shape = work.known.shape
    return _bytes_of_scores(work) * batch.length**2 if shape.caps_scores and work.paths.capped else 0


def _bytes_of_scores(work: Workload) -> int:
    """Of a pair of tokens: soft-capped scores in 16 bits, fp32 softmax, its 16-bit copy (compare 5as/h of Korthikanti
    et al., section 4.1)."""
    return (2 * work.narrow + 4) * work.known.shape.heads


def activation_bytes(work: Workload, batch: Batch) -> int:
    """The most that there is of activations in the backward pass: what is kept, and what a block needs beside it."""
    residual = residual_bytes(work, batch)
    waiting, above = _waiting_bytes(work, batch)
    highest = waiting + above + _temporary_bytes(work, batch) + residual
    if not batch.checkpointing or recomputed_blocks(work, batch) == 0:
        return highest
    # The inputs that were brought to host memory come back for one block, and for the next.
    back = min(recomputed_blocks(work, batch), INPUTS_ON_GPU) * residual
    once = block_bytes(work, batch) + _temporary_bytes(work, batch, recomputed=True) + residual
    return max((back if batch.offloaded else waiting) + once, highest)


def bytes_at_the_loss(work: Workload, batch: Batch) -> int:
    """What is there when the loss is taken."""
    return sum(_waiting_bytes(work, batch)) + logit_bytes(work, batch)


def bytes_at_the_end(work: Workload, batch: Batch) -> int:
    """What is there when the backward pass comes to its last block: what this one kept."""
    recomputed = batch.checkpointing and recomputed_blocks(work, batch) > 0
    return (
        block_bytes(work, batch)
        + _temporary_bytes(work, batch, recomputed=recomputed)
        + 2 * residual_bytes(work, batch)
    )


def _waiting_bytes(work: Workload, batch: Batch) -> tuple[int, int]:
    """When the forward pass has come to its end: inputs of blocks that will be recomputed, and what the others keep."""
    recomputed = recomputed_blocks(work, batch) if batch.checkpointing else 0
    kept = work.known.shape.blocks - work.lowest
    fixed = block_bytes_per_token(work) * batch.tokens + attention_bytes(work, batch)
    above = (kept - recomputed) * fixed
    above += inputs_from(work)[work.lowest + recomputed] * batch.tokens
    mask = batch.rows * batch.length**2 if _masked(work) else 0
    on_gpu = min(1, recomputed) if batch.offloaded else recomputed
    return on_gpu * residual_bytes(work, batch) + mask, above


def block_bytes(work: Workload, batch: Batch) -> int:
    """What one block keeps where most is trained in it."""
    if work.known.shape.blocks == work.lowest:
        return 0
    fixed = block_bytes_per_token(work) * batch.tokens + attention_bytes(work, batch)
    return fixed + most_inputs(work) * batch.tokens


def _temporary_bytes(work: Workload, batch: Batch, *, recomputed: bool = False) -> int:
    """Of the widest part of a block: its gradient, that of the gate, and an fp32 copy for an adapter. With an FP8 base
    a gradient is widened by the weight's scales before it is rounded, compiled in the same pass as what is computed
    again. An MLP that is one function has its gradient and those of gate and up, which in 4 bits take the places of
    gate and up where these are recomputed."""
    fp8 = work.quantization is QuantizationType.FP8
    if mlps_are_whole(work):
        width = work.narrow * (1 if recomputed and not fp8 else 3)
    else:
        width = 4 + 2 * work.narrow
        if fp8:
            width += 4 + 2 * work.narrow if work.paths.compiled else 8
    return width * work.known.shape.mlp * batch.tokens


def residual_bytes(work: Workload, batch: Batch) -> int:
    """What enters a block."""
    return work.residual_width * work.known.shape.hidden * batch.tokens


def recomputed_blocks(work: Workload, batch: Batch) -> int:
    """With checkpointing: blocks whose input is kept."""
    kept = work.known.shape.blocks - work.lowest
    return kept if batch.recomputed is None else min(batch.recomputed, kept)


def logit_bytes(work: Workload, batch: Batch) -> int:
    """The loss: one chunk of logits, the hidden states of the trained positions with their gradient, and for a trained
    head its gradients. Counts every position as trained: the most there can be.
    """
    shape = work.known.shape
    hidden = batch.tokens * shape.hidden * (4 + 3 * work.narrow)
    if work.method is Method.HEAD:
        # A few numbers for each token.
        return hidden
    fused = work.paths.compiled and not work.trained_head
    chunk, size = (
        (COMPILED_LOGITS_PER_CHUNK, _BYTES_PER_COMPILED_LOGIT) if fused else (LOGITS_PER_CHUNK, _BYTES_PER_LOGIT)
    )
    rows = min(batch.tokens, max(1, chunk // shape.vocabulary))
    return rows * shape.vocabulary * size + hidden + _BYTES_PER_TRAINED_HEAD * work.trained_head
