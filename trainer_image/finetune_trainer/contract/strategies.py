"""Which strategy carries out which job: one table for the planner, which refuses before a pod starts, and the trainer.

Each row was found by running it (`tests/local/test_strategies.py` on CPUs, `hack/validate_gpu` on GPUs);
`docs/strategies.md` tells it to users.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from finetune_trainer.contract.vocabulary import LoraVariant, Method, Objective, Optimizer, QuantizationType, Strategy

FOUR_BIT = frozenset({QuantizationType.NF4, QuantizationType.FP4})
BITSANDBYTES = FOUR_BIT | {QuantizationType.INT8}
EVERY_TYPE = frozenset(QuantizationType)

QLORA: Mapping[tuple[Strategy, int | None], frozenset[QuantizationType]] = {
    (Strategy.SINGLE, None): EVERY_TYPE,
    (Strategy.DDP, None): EVERY_TYPE,
    (Strategy.DEEPSPEED, 1): BITSANDBYTES,
    (Strategy.DEEPSPEED, 2): BITSANDBYTES,
    (Strategy.DEEPSPEED, 3): FOUR_BIT,
    (Strategy.FSDP, None): FOUR_BIT,
}
"""Strategy and ZeRO stage to the types of a quantized base that they train adapters on.

bitsandbytes keeps 8-bit weights beside the parameter, where ZeRO-3 does not divide them and FSDP2 loses them. 4-bit
weights are the parameter, divided in elements of a floating-point type. FP8 was run with whole models only.
"""

TORCH_OPTIMIZERS = frozenset(
    {Optimizer.ADAMW, Optimizer.ADAMW_TORCH, Optimizer.SGD, Optimizer.RMSPROP, Optimizer.ADAGRAD}
)
"""torch's own optimizers: they know FSDP2's sharded tensors, and step on the CPU as well. bitsandbytes' do neither."""
NOT_UNDER_ZERO = frozenset({Optimizer.ADAFACTOR, Optimizer.ADAGRAD})
"""Adafactor needs a matrix whole, where ZeRO gives it flat shards; DeepSpeed makes Adagrad anew, without its groups."""

NOT_DIVIDED = frozenset({LoraVariant.EVA, LoraVariant.LOFTQ})
"""EVA sends the data through the model, LoftQ reads its weights in full, before the first step. Neither was run on a
model that is divided, or quantized on the CPU for it."""


@dataclass(frozen=True)
class StrategyUse:
    """What a job asks of a strategy."""

    strategy: Strategy
    zero_stage: int | None
    method: Method
    optimizer: Optimizer
    quantization: QuantizationType | None = None
    objective: Objective = Objective.SFT
    offloads_optimizer: bool = False
    variant: LoraVariant | None = None
    unfreezes: bool = False
    """Whether blocks join one after the other."""


def strategy_name(strategy: Strategy, zero_stage: int | None) -> str:
    """For people: `deepspeed with zeroStage 3`."""
    return f"deepspeed with zeroStage {zero_stage}" if strategy is Strategy.DEEPSPEED else strategy.value


def strategy_problems(use: StrategyUse) -> Iterator[str]:
    """Why a strategy cannot carry out a job, each with the field and what to use instead; nothing where it can."""
    if use.strategy not in (Strategy.DEEPSPEED, Strategy.FSDP):
        return
    name = strategy_name(use.strategy, use.zero_stage)
    if use.method is Method.QLORA and use.quantization not in QLORA.get((use.strategy, use.zero_stage), frozenset()):
        what = "does not train on" if use.quantization is QuantizationType.FP8 else "cannot divide"
        yield f"spec.quantization.type: {name} {what} {use.quantization} weights; use nf4 or fp4, or strategy ddp"
    if use.method is Method.HEAD or use.objective.is_preference:
        field = "spec.method: a head" if use.method is Method.HEAD else f"spec.training.objective: {use.objective}"
        yield f"{field} cannot be trained with {name}, which divides the model; use strategy ddp"
    if use.variant in NOT_DIVIDED:
        yield (
            f"spec.lora.variant: {use.variant} looks at the whole model when it starts, which {name} divides; use"
            " standard, dora, rslora, pissa, olora or lora+, or strategy ddp"
        )
    if use.unfreezes:
        yield (
            f"spec.layers.unfreeze: {name} fixes what it shards before the first step; use strategy ddp, or leave"
            " unfreeze out"
        )
    yield from _optimizer_problems(use, name)


def _optimizer_problems(use: StrategyUse, name: str) -> Iterator[str]:
    if use.strategy is Strategy.FSDP and use.optimizer not in TORCH_OPTIMIZERS:
        yield (
            f"spec.training.optimizer: {use.optimizer} does not know the sharded tensors of fsdp; use adamw, sgd,"
            " rmsprop or adagrad, or strategy deepspeed"
        )
    if use.strategy is Strategy.DEEPSPEED and use.optimizer in NOT_UNDER_ZERO:
        yield f"spec.training.optimizer: {use.optimizer} cannot work on the flat shards of {name}; use adamw"
    elif use.strategy is Strategy.DEEPSPEED and use.offloads_optimizer and use.optimizer not in TORCH_OPTIMIZERS:
        yield (
            f"spec.training.optimizer: {use.optimizer} cannot step on the CPU; use adamw, or"
            " parallelism.offload.optimizer: none"
        )
