"""Bytes that the backward pass needs of the forward pass. Pure: no I/O.

Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1) count what a transformer layer keeps tensor by tensor. The same
is done here for what transformers and PEFT really run: norms in fp32, grouped queries, gated MLPs, attention that never
writes its scores, frozen weights that need no input kept. Checkpointing keeps each block's input and recomputes one
block at a time (Chen et al. 2016, arXiv:1604.06174). Blocks below the lowest trained one keep nothing.

The tests hold these counts against what autograd saves of a real model.
"""

from __future__ import annotations

from finetune_operator.planner.workload import Batch, Workload
from finetune_trainer.contract.vocabulary import Method

LOGITS_PER_CHUNK = 2**25
"""Elements of logits that the trainer's loss holds at a time (`finetune_trainer.loss`)."""
_BYTES_PER_LOGIT = 12
"""fp32 logits and their log-softmax; in the backward pass the latter, its gradient, and the gradient in 16 bits."""


def block_bytes_per_token(work: Workload) -> int:
    """What one block keeps of a token, whatever is trained in it."""
    shape, narrow = work.known.shape, work.narrow
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # A norm computes in fp32 and keeps its input so.
    norms = shape.norms * 4 * shape.hidden + (4 * (query + key) if shape.head_norms else 0)
    # Query, key, value, output, and the fp32 logarithm of each head's normaliser (Dao 2023, arXiv:2307.08691,
    # section 3.1). With a mask, which packed rows have, keys and values are repeated for every query head.
    saved_key = query if work.packing else key
    attention = narrow * (2 * query + 2 * saved_key) + 4 * shape.heads
    # A mixture gathers its tokens for each expert and scales what comes back.
    experts = 4 if work.trains_experts else narrow
    routing = experts * 2 * shape.hidden * shape.routed if shape.routed > 1 else 0
    return norms + attention + _mlp_bytes(work) + routing


def _mlp_bytes(work: Workload) -> int:
    shape = work.known.shape
    narrow = 4 if work.trains_experts else work.narrow
    if shape.gated:
        # The gate before and after its activation, and what it is multiplied with.
        return 3 * narrow * shape.mlp
    if shape.stepwise_gelu:
        # Four factors; autocast raises to a power in fp32, and what follows stays so.
        return (12 + narrow) * shape.mlp
    return narrow * shape.mlp


def attention_bytes(work: Workload, batch: Batch) -> int:
    """What one block keeps for each pair of tokens of a row: nothing, but for masks and eager attention."""
    pairs = batch.rows * batch.length**2
    mask = work.narrow * pairs if work.packing else 0
    # bf16 soft-capped scores, fp32 softmax, its 16-bit copy (compare 5as/h of Korthikanti et al., section 4.1).
    scores = (2 * work.narrow + 4) * work.known.shape.heads * pairs if work.known.shape.keeps_scores else 0
    return mask + scores


def activation_bytes(work: Workload, batch: Batch) -> int:
    """All that is kept between forward and backward pass, and the largest temporary beside it."""
    shape, tokens = work.known.shape, batch.tokens
    kept = shape.blocks - work.lowest
    inputs = work.kept_inputs
    fixed = block_bytes_per_token(work) * tokens + attention_bytes(work, batch)
    residual = (4 if work.wide_residual else work.narrow) * shape.hidden * tokens
    # Of the widest part of a block: its gradient, that of the gate, and an fp32 copy for an adapter.
    temporary = (4 + 2 * work.narrow) * shape.mlp * tokens
    mask = batch.rows * batch.length**2 if work.packing else 0
    if kept == 0:
        return temporary + residual + mask
    if not batch.checkpointing:
        return kept * fixed + sum(inputs.values()) * tokens + residual + temporary + mask
    return kept * residual + fixed + max(inputs.values(), default=0) * tokens + temporary + mask


def logit_bytes(work: Workload, batch: Batch) -> int:
    """The loss: one chunk of logits, the hidden states of the trained positions with their gradient, and for a trained
    head the sum of its gradient, a chunk's and the scaled one. Counts every position as trained: the most there can be.
    """
    shape = work.known.shape
    if work.method is Method.HEAD:
        # A few numbers for each token.
        return batch.tokens * shape.hidden * (4 + 2 * work.narrow)
    rows = min(batch.tokens, max(1, LOGITS_PER_CHUNK // shape.vocabulary))
    hidden = batch.tokens * shape.hidden * (4 + 2 * work.narrow)
    return rows * shape.vocabulary * _BYTES_PER_LOGIT + hidden + 8 * work.trained_head
