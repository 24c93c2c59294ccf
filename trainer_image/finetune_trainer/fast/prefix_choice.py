"""Whether a training caches its frozen prefix, where the hidden states are kept, and why not where it does not."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune_trainer.balancing import balancing_weight
from finetune_trainer.contract import ModelLayout, TrainerConfig
from finetune_trainer.contract.vocabulary import Switch
from finetune_trainer.distributed import told_by_all
from finetune_trainer.errors import UsageError, first_line
from finetune_trainer.fast.attention import ROUNDING, Unsupported
from finetune_trainer.fast.choice import causal_of, use_of
from finetune_trainer.fast.prefix_blocks import Boundary, Unusable
from finetune_trainer.fast.prefix_cache import PrefixCache
from finetune_trainer.fast.prefix_store import Address, Room, StatesStore, lay_out
from finetune_trainer.fast.prefix_traffic import Span, Traffic
from finetune_trainer.layers import decoder_blocks, lowest_differentiated_block
from finetune_trainer.model import DTYPES, autocast

FEWEST_PASSES = 2
"""Over the data: the first one stores, those after it read."""
REPEATABLE = 0.1
"""Of what two ways to compute the same may differ by: how much one way may differ from itself."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrefixJob:
    """A training that is about to begin, in one process."""

    config: TrainerConfig
    model: nn.Module
    layout: ModelLayout
    device: torch.device
    folder: Path
    """On the disk that may be used."""
    lengths: Sequence[int]
    """Tokens of each row."""
    sample: Callable[[], tuple[dict[str, Any], list[Span]]]
    """A few rows as a batch on the device, and where these are."""
    passes: float
    """Over the data, in the whole training."""
    passes_left: float
    process: int = 0
    local_process: int = 0


@dataclass(frozen=True)
class _Offer:
    """What a process tells the others before they begin."""

    reason: str | None
    address: Address | None = None
    """Of a node's first process."""


@contextmanager
def cached_prefix(job: PrefixJob) -> Iterator[PrefixCache | None]:
    """The cache for a training, while blocks are prepared for it; None where it is not used, which is logged with the
    reason. All processes enter.

    Raises UsageError where the job insists on it.
    """
    wanted = job.config.training.cache_frozen_prefix
    with ExitStack() as stack:
        reason = _unwanted(wanted, job.device) or _unusable(job)
        cache = None
        if reason is None:
            reason, cache = _begin(job, stack)
        if reason is not None:
            logger.info("cached prefix: not used: %s", reason)
            # What is left of a run that was resumed may be too short for it.
            excused = job.passes_left < FEWEST_PASSES <= job.passes
            if wanted is Switch.ALWAYS and not excused:
                raise UsageError(f"spec.training.cacheFrozenPrefix: always cannot be kept: {reason}; use auto or never")
        yield cache
        if cache is not None:
            logger.info("cached prefix: hidden states of rows: %d computed, %d read", cache.computed, cache.read)


def _unwanted(wanted: Switch, device: torch.device) -> str | None:
    if wanted is Switch.NEVER:
        return "as spec.training.cacheFrozenPrefix says"
    if wanted is Switch.AUTO and device.type == "cpu":
        # A row that is computed beside other rows is rounded otherwise.
        return "on a CPU a run that is resumed stays bit for bit the one that was not stopped; always uses it"
    return None


def _unusable(job: PrefixJob) -> str | None:
    """Why it cannot be used, as far as is known without running the model."""
    reason = use_of(job.config).unfit
    if reason is not None:
        return reason
    if job.config.training.neftune_alpha is not None:
        return "NEFTune's noise lies below the trained blocks"
    if balancing_weight(causal_of(job.model)):
        return "the model's balancing loss counts the experts of all blocks"
    lowest = lowest_differentiated_block(job.model, job.layout)
    if lowest == 0:
        return "the first block, or something below it, is trained"
    if job.passes_left < FEWEST_PASSES:
        return f"the data are passed over {job.passes_left:.3g} times, and only a second pass would read"
    random = _random_modules(job.model, decoder_blocks(job.model, job.layout)[lowest:])
    return f"the model has dropout below the trained blocks ({random})" if random else None


def _random_modules(model: nn.Module, above: nn.ModuleList) -> str:
    not_below = {id(module) for block in above for module in block.modules()}
    names = [
        name
        for name, module in causal_of(model).named_modules()
        if id(module) not in not_below and isinstance(module, nn.Dropout) and module.p > 0
    ]
    return ", ".join(names[:2])


def _begin(job: PrefixJob, stack: ExitStack) -> tuple[str | None, PrefixCache | None]:
    """A reason or a cache; what has to be undone later goes onto the stack. All processes enter."""
    below = list(decoder_blocks(job.model, job.layout))[: lowest_differentiated_block(job.model, job.layout)]
    boundary = Boundary(causal_of(job.model).base_model, below)
    with ExitStack() as undo:
        undo.enter_context(boundary.installed())
        reason, states = disagreement(job, boundary)
        store: StatesStore | None = None
        if states is not None and job.local_process == 0:
            reason, store = _create(job, states)
            if store is not None:
                undo.callback(store.close)
        offers = told_by_all(_Offer(reason, store.address if store is not None else None))
        reason = next((offer.reason for offer in offers if offer.reason is not None), None)
        if reason is not None:
            return reason, None
        if store is None:
            first = offers[job.process - job.local_process].address
            assert states is not None and first is not None, "nobody had a reason"
            try:
                store = StatesStore.attach(job.lengths, states.shape[-1], states.dtype, first)
            except OSError as error:
                return f"the processes of this node cannot share memory: {error}", None
            undo.callback(store.close)
        traffic = Traffic(store, job.device)
        undo.callback(traffic.close)
        stack.push(undo.pop_all())
    logger.info(
        "cached prefix: the hidden states that enter block %d, %s in host memory and %s on disk once all %d rows are"
        " there",
        len(below),
        _readable(store.places.memory),
        _readable(store.places.disk),
        len(job.lengths),
    )
    return None, PrefixCache(boundary, traffic)


def _promised(job: PrefixJob, token: int) -> int:
    """Bytes of this node's host memory that inputs of recomputed blocks (`offload`) will take, of so many a token."""
    training = job.config.training
    if not (training.gradient_checkpointing and training.offload_activations):
        return 0
    reached = job.layout.block_count - lowest_differentiated_block(job.model, job.layout)
    tokens = training.micro_batch_size * job.config.dataset.max_length
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return processes * min(reached, training.recomputed_blocks or reached) * tokens * token


def _create(job: PrefixJob, states: torch.Tensor) -> tuple[str | None, StatesStore | None]:
    job.folder.mkdir(parents=True, exist_ok=True)
    row = states.shape[-1] * states.dtype.itemsize
    room = Room.found(job.folder).without(_promised(job, row))
    places = lay_out([length * row for length in job.lengths], room.host)
    if places.disk > room.disk:
        return (
            f"it would take {_readable(places.memory + places.disk)} for {sum(job.lengths):,} tokens, and there are "
            f"{_readable(room.host)} of host memory and {_readable(room.disk)} of disk for it"
        ), None
    try:
        return None, StatesStore.create(job.lengths, states.shape[-1], states.dtype, room, job.folder)
    except OSError as error:
        return f"no memory or file for it can be had: {error}", None


@torch.no_grad()
def disagreement(job: PrefixJob, boundary: Boundary) -> tuple[str | None, torch.Tensor | None]:
    """Ask the model itself, with a few rows: why it is another one without the blocks below, or the hidden states
    (rows, length, width) that are to be stored.

    An architecture's own code decides what its upper blocks take from where.
    """
    causal: Any = causal_of(job.model)
    name, training = type(causal).__name__, causal.training
    devices = [job.device] if job.device.type == "cuda" else []
    inputs, spans = job.sample()
    limit = ROUNDING[DTYPES[job.config.training.precision]]
    try:
        # Random numbers stay those of a run without this.
        with autocast(job.config, job.device), torch.random.fork_rng(devices):
            causal.eval()
            expected = boundary.learn(inputs)
            states = boundary.states(inputs)
            kept = torch.zeros_like(states)
            for span in spans:
                _rows(kept, [span]).copy_(_rows(states, [span]))
            with boundary.given(kept):
                found = causal.base_model(**{**inputs, "use_cache": False}).last_hidden_state
            causal.train()
            # A block is compiled for the first shape that it sees, which is not to be this one.
            one, other = (boundary.states(inputs, uncompiled=True) for _ in range(2))
    except (Unusable, Unsupported, TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"{name}: {first_line(error)}", None
    finally:
        causal.train(training)
    if _difference(one, other, spans) > REPEATABLE * limit:
        return f"{name} computes something random below the trained blocks", None
    difference = _difference(found, expected, spans)
    if difference > limit:
        return f"{name} without the blocks below differs by {difference:.2g} from what it is with them", None
    return None, states


def _rows(states: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
    flat = states.flatten(0, 1)
    parts = [flat[span.start : span.start + span.length] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _difference(found: torch.Tensor, expected: torch.Tensor, spans: Sequence[Span]) -> float:
    one, other = _rows(found, spans).float(), _rows(expected, spans).float()
    return float((one - other).norm() / other.norm())


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
