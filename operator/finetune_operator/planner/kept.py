"""Bytes that one block keeps of each token for its backward pass. Pure: no I/O.

Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1) count what a transformer layer keeps tensor by tensor. The same
is done here for what transformers, PEFT and the trainer's fast paths really run: norms in fp32, grouped queries, gated
MLPs, attention that never writes its scores, frozen weights that need no input kept.

A compiled block keeps what matrix products and attention gave, and the residual stream before each norm. All else is
made from these without a product, so that torch computes it again (`finetune_trainer.fast.compilation`): normalised
inputs, the MLP's activation and what it is multiplied to.

The tests hold these counts against what autograd saves of a real model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate

from finetune_operator.planner.workload import MATRICES, Workload, inputs_of, once
from finetune_trainer.contract import ParameterInfo, ParameterKind
from finetune_trainer.contract.vocabulary import LoraVariant, QuantizationType

ALIGNMENT = 16
"""Ranks of a group are filled up to a multiple of it (`finetune_trainer.fast.adapter_products`)."""
MOST_RANKS = 64
"""Of an adapter in an MLP that is one function (`finetune_trainer.fast.swiglu`)."""
WHOLE_MLPS = frozenset({QuantizationType.NF4, QuantizationType.FP4, QuantizationType.FP8})
_OUT = frozenset({"o_proj", "out_proj", "dense", "c_proj"})
"""Names of the layer that takes what attention gives, which attention keeps itself."""
_VALUES = "v_proj"
_OF_A_NORM = 4
"""Bytes: the fp32 factor of each token's norm."""


@once
def block_bytes_per_token(work: Workload) -> int:
    """What one block keeps of a token, whatever is trained in it."""
    shape, narrow, compiled = work.known.shape, work.narrow, work.paths.compiled
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # A norm computes in fp32 and keeps its input so; compiled, the input as it comes.
    norms = shape.norms * (work.residual_width if compiled else 4) * shape.hidden + _OF_A_NORM * shape.norms
    if shape.head_norms:
        norms += (narrow if compiled else 4) * (query + key)
    # Query, key, value, output, and the fp32 logarithm of each head's normaliser (Dao 2023, arXiv:2307.08691,
    # section 3.1). With a mask, which packed rows have, keys and values are repeated for every query head.
    saved_key = query if work.packing and not work.without_mask else key
    attention = narrow * (2 * query + 2 * saved_key) + 4 * shape.heads
    # A mixture gathers its tokens for each expert and scales what comes back.
    experts = 4 if work.trains_experts else narrow
    routing = experts * 2 * shape.hidden * shape.routed if shape.routed > 1 else 0
    return norms + attention + _mlp_bytes(work) + routing


def _mlp_bytes(work: Workload) -> int:
    shape = work.known.shape
    narrow = 4 if work.trains_experts else work.narrow
    if work.paths.compiled:
        # With dropout nothing is made again, the activation neither.
        return ((2 if shape.gated else 1) + shape.dropout) * narrow * shape.mlp
    if shape.gated:
        # The gate before and after its activation, and what it is multiplied with.
        return 3 * narrow * shape.mlp
    if shape.stepwise_gelu:
        # Four factors; autocast raises to a power in fp32, and what follows stays so.
        return (12 + narrow) * shape.mlp
    return narrow * shape.mlp


@once
def trained_inputs(work: Workload) -> dict[int, int]:
    """Bytes for each token that blocks keep of the inputs of what is trained in them, by block."""
    kept: dict[int, int] = defaultdict(int)
    for block, size in (*_of_weights(work), *_of_adapters(work)):
        kept[block] += size
    return dict(kept)


@once
def inputs_from(work: Workload) -> tuple[int, ...]:
    """The same, of each block and all above it together; one more entry, 0, stands for no block."""
    kept = trained_inputs(work)
    sums = accumulate((kept.get(block, 0) for block in reversed(range(work.known.shape.blocks))), initial=0)
    return tuple(sums)[::-1]


@once
def most_inputs(work: Workload) -> int:
    """The same, of the block that keeps most."""
    return max(trained_inputs(work).values(), default=0)


def _of_weights(work: Workload) -> Iterator[tuple[int, int]]:
    """The gradient of a weight needs the layer's input. Autocast makes each layer a 16-bit copy of its own of it, as
    the trained norms before it give fp32."""
    layout = work.known.layout
    for parameter in work.trained_base:
        block = layout.block_of(parameter.path)
        if block is None:
            continue
        if parameter.kind is ParameterKind.EXPERTS:
            yield block, 4 * work.known.shape.routed * inputs_of(parameter)
        elif work.paths.compiled:
            continue
        elif parameter.kind in MATRICES:
            if not _takes_attention(parameter.module):
                yield block, work.narrow * inputs_of(parameter)
        elif parameter.kind is ParameterKind.OTHER and len(parameter.shape) == 1:
            # A norm keeps what it scales.
            yield block, 4 * _normalised(work, parameter)


def _takes_attention(module: str) -> bool:
    *_, parent, name = ("", *module.split("."))
    return name in _OUT and ("attn" in parent or "attention" in parent)


def _normalised(work: Workload, weight: ParameterInfo) -> int:
    """Elements of a token that a norm scales: those of the residual stream, or of all heads one by one."""
    shape = work.known.shape
    if weight.size == shape.hidden:
        return shape.hidden
    return weight.size * (shape.heads if ".q_" in weight.path else shape.kv_heads)


def _of_adapters(work: Workload) -> Iterator[tuple[int, int]]:
    layout, routed = work.known.layout, work.known.shape.routed
    for name in work.adapters:
        block = layout.block_of(f"{name}.")
        if block is not None and name in layout.by_path:
            # PEFT adds the product of an expert's pair to its weight: the gradient of the sum needs the input.
            yield block, work.narrow * routed * inputs_of(layout.by_path[name])
    for block, group in adapter_groups(work):
        yield block, sum(_of_one(work, name) for name in group) if not work.paths.shared else _of_group(work, group)


def _of_one(work: Workload, name: str) -> int:
    """PEFT widens the input of an adapter and autocast narrows it again, which is a copy of each adapter's own; and
    what lies between A and B is kept."""
    weight, rank = work.known.layout.by_path[f"{name}.weight"], work.adapters[name].rank
    inputs = inputs_of(weight)
    size = work.narrow * (inputs + rank) + (inputs if work.dropout else 0)
    if work.variant is LoraVariant.DORA:
        # The base's output, the adapter's, and both before the magnitude.
        size += 3 * work.narrow * (weight.size // inputs)
    return size


def _of_group(work: Workload, group: tuple[str, ...]) -> int:
    """Adapters with the same input keep it once, with what lies between A and B beside it."""
    weights = [work.known.layout.by_path[f"{name}.weight"] for name in group]
    inputs, rank = inputs_of(weights[0]), padded_rank(work, group)
    if _takes_attention(group[0]):
        return work.narrow * rank
    joined = joins(work, group)
    # Compiled, an input that no product has part in is made again.
    made_again = work.paths.compiled and not joined
    if mlps_are_whole(work) and inputs == work.known.shape.hidden:
        made_again = False
    size = work.narrow * (rank + (0 if made_again else inputs))
    if joined:
        # Values are a part of the product of all of them, which stays there as long as they do.
        others = sum(w.size // inputs for w in weights if not w.module.endswith(_VALUES))
        size += work.narrow * others if any(w.module.endswith(_VALUES) for w in weights) else 0
    return size


@once
def adapter_groups(work: Workload) -> list[tuple[int, tuple[str, ...]]]:
    """Adapted layers with the same input, each with its block: those of one part of a block whose weights have the same
    width, but for what takes the result of attention."""
    layout = work.known.layout
    groups: dict[tuple[int, str, int, bool], list[str]] = defaultdict(list)
    for name in work.adapters:
        block = layout.block_of(f"{name}.")
        weight = layout.by_path.get(f"{name}.weight")
        if block is not None and weight is not None:
            parent = name.rpartition(".")[0]
            groups[block, parent, inputs_of(weight), _takes_attention(name)].append(name)
    return [(block, tuple(group)) for (block, *_), group in groups.items()]


@once
def mlps_are_whole(work: Workload) -> bool:
    """Whether every adapted block computes a quantized MLP as one function (`finetune_trainer.fast.swiglu_groups`). It
    leaves out the activation by itself, so that what the norms give is not made again."""
    shape, paths = work.known.shape, work.paths
    able = shape.gated and shape.silu and not shape.dropout
    if not (able and work.quantization in WHOLE_MLPS and paths.compiled and paths.fused):
        return False
    of_parents: dict[tuple[int, str], list[tuple[str, ...]]] = defaultdict(list)
    for block, group in adapter_groups(work):
        of_parents[block, group[0].rpartition(".")[0]].append(group)
    whole = {block for (block, _), groups in of_parents.items() if _is_whole(work, groups)}
    return whole == {block for block, _ in of_parents}


def _is_whole(work: Workload, groups: list[tuple[str, ...]]) -> bool:
    """Two layers behind a norm and one behind them, without biases and large ranks."""
    by_path = work.known.layout.by_path
    if sorted(len(group) for group in groups) != [1, 2] or any(_takes_attention(group[0]) for group in groups):
        return False
    down, both = sorted(groups, key=len)
    names = (*both, *down)
    inputs = [inputs_of(by_path[f"{name}.weight"]) for name in names]
    hidden, inner = work.known.shape.hidden, by_path[f"{both[0]}.weight"].size // inputs[0]
    return (
        inputs == [hidden, hidden, inner]
        and all(work.adapters[name].rank <= MOST_RANKS for name in names)
        and not any(f"{name}.bias" in by_path for name in names)
    )


def padded_rank(work: Workload, group: tuple[str, ...]) -> int:
    """Ranks of a group, filled up where they are brought together."""
    rank = sum(work.adapters[name].rank for name in group)
    return -(-rank // ALIGNMENT) * ALIGNMENT if work.paths.fused else rank


def joins(work: Workload, group: tuple[str, ...]) -> bool:
    """Whether the layers of a group are one product with one weight (`finetune_trainer.fast.adapter_bases.Wide`)."""
    if not work.paths.fused or work.quantization is not None:
        return False
    weights = [work.known.layout.by_path[f"{name}.weight"] for name in group]
    inputs = inputs_of(weights[0])
    return len(group) > 1 or 4 * (weights[0].size // inputs) >= 5 * inputs


@once
def fused_weight_elements(work: Workload) -> int:
    """Further columns, or rows, that frozen weights get for the adapters that are computed with them."""
    if not work.paths.fused or work.quantization is not None:
        return 0
    elements = 0
    for _, group in adapter_groups(work):
        weights = [work.known.layout.by_path[f"{name}.weight"] for name in group]
        inputs, outputs = inputs_of(weights[0]), sum(w.size // inputs_of(w) for w in weights)
        if joins(work, group):
            elements += outputs * padded_rank(work, group)
        elif 4 * inputs >= 5 * outputs:
            elements += inputs * padded_rank(work, group)
    return elements
