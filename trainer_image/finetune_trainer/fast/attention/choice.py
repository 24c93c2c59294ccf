"""The fastest kernel that computes what a model's own attention does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from finetune_trainer.contract.vocabulary import FlashAttn
from finetune_trainer.distributed import told_by_all
from finetune_trainer.errors import InternalError, first_line
from finetune_trainer.fast.attention import trial
from finetune_trainer.fast.attention.flash4 import FLASH4
from finetune_trainer.fast.attention.flex import FLEX
from finetune_trainer.fast.attention.kernel import Kernel, Unsupported
from finetune_trainer.fast.attention.reference import ONE_BY_ONE
from finetune_trainer.fast.attention.samples import installed
from finetune_trainer.fast.attention.varlen import FLASH3, TORCHS
from finetune_trainer.fast.rows import bounds
from finetune_trainer.sanity import MIXED

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of hidden states, relative, between two ways to compute attention: what rounding adds up to over the blocks."""
WORTH_FLASH4 = 5000
"""Micro-batches: its code takes 8 to 33 seconds to make, and saves some 13 milliseconds of each on an 8B model, where
samples are of several lengths."""
SAMPLES = (9, 14)
"""Tokens of those that a model is asked with."""
EQUAL_SAMPLES = (9, 9)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""By one of these a mixture's configuration says how many it has."""
_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}

Run = Callable[[dict[str, Any]], torch.Tensor]
"""A model's inputs -> its last hidden states (1, tokens, width)."""

logger = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """What a training asks of attention."""

    how: FlashAttn
    longest: int
    """Tokens of a sample at most."""
    micro_batches: int
    waits: bool
    """With `auto`: whether it waits for a kernel's code where there is no other kernel (`contract.compiling`)."""
    masked: bool = True
    """Whether a mask would do, too. Where none does, `auto` waits for whatever kernel there is."""


class _Asked(NamedTuple):
    """A row of samples, and what the model makes of each alone."""

    inputs: dict[str, Any]
    expected: tuple[torch.Tensor, ...]


def best_kernel(model: PreTrainedModel, device: torch.device, dtype: torch.dtype, wanted: Wanted, run: Run) -> Kernel:
    """The first, in order of speed, that agrees with the reference, and with which the model makes of samples in a row
    what it makes of each, in all processes.

    dtype: of the attention. run: the model in evaluation mode, without gradients, as it is trained. All processes
    enter. Raises Unsupported with the reasons against each kernel.
    """
    longest = wanted.longest
    reason = _own_attention(model, longest)
    asked: list[_Asked] = []
    if reason is None:
        try:
            asked = [_asked(SAMPLES, longest, device, run), _asked(EQUAL_SAMPLES, EQUAL_SAMPLES[0], device, run)]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own code wants that is not given here
            _raise_if_gpu_is_broken(device, type(model).__name__, error)
            reason = f"{type(model).__name__} cannot be run on a few tokens: {first_line(error)}"
    _raise_first(reason)
    reasons = []
    for kernel in _candidates(wanted, device):
        own = kernel.why_not(device, dtype) or _tried(kernel, model, device, dtype, run, asked, alone=not wanted.masked)
        reason = next((one for one in told_by_all(own) if one is not None), None)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
        logger.info("attention: not with %s", reasons[-1])
    raise Unsupported("; ".join(reasons))


def _raise_first(reason: str | None) -> None:
    """Of all processes."""
    for one in told_by_all(reason):
        if one is not None:
            raise Unsupported(one)


def _candidates(wanted: Wanted, device: torch.device) -> tuple[Kernel, ...]:
    if wanted.how is FlashAttn.FLEX:
        return (FLEX,)
    if device.type == "cpu":
        return (ONE_BY_ONE,)
    if wanted.how is FlashAttn.VARLEN:
        return (FLASH4, FLASH3, TORCHS, FLEX)
    if wanted.masked and not wanted.waits:
        return (FLASH3, TORCHS)
    # With a mask, special scores of all pairs of tokens are kept. Plain ones are not, and are fast enough as they are.
    last = replace(FLEX, special_only=wanted.masked)
    if wanted.micro_batches >= WORTH_FLASH4:
        return (FLASH4, FLASH3, TORCHS, last)
    return (FLASH3, TORCHS, FLASH4, last)


def _own_attention(model: PreTrainedModel, longest: int) -> str | None:
    """Why a model's attention cannot be replaced at all."""
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        return f"{name} does not let its attention be chosen"
    if getattr(config, "attention_dropout", 0.0):
        return "the model's attention has dropout"
    # What only a mask says, samples of a few tokens do not show.
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _KINDS)
    if others:
        return f"{name} has layers of other kinds: {', '.join(map(str, others))}"
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and chunk < longest:
        return f"{name} looks at chunks of {chunk} tokens"
    return None


def _asked(lengths: Sequence[int], longest: int, device: torch.device, run: Run) -> _Asked:
    """longest: what the model is told that no sample exceeds."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    # Each with tokens of its own: of what is said twice it does not show who sees it.
    ids = torch.arange(3, 3 + len(positions))
    parts = zip(ids.split(list(lengths)), positions.split(list(lengths)), strict=True)
    alone = [run(_inputs(one.to(device), at.to(device))) for one, at in parts]
    where = bounds(positions, max(longest, *lengths))
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in where.items()}
    return _Asked(_inputs(ids.to(device), positions.to(device)) | moved, tuple(one.float() for one in alone))


def _inputs(ids: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
    return {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}


def _tried(
    kernel: Kernel,
    model: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
    run: Run,
    asked: Sequence[_Asked],
    *,
    alone: bool,
) -> str | None:
    """Why not, after the model was run with it: an architecture's own code decides what becomes of the bounds that it
    is given. alone: samples mix where there is a mask, so that attention may not be all that mixes them."""
    seen: dict[trial.Heads, None] = {}
    name = type(model).__name__
    try:
        with installed(model, trial.remembering(kernel, seen)):
            # Samples of one length are an own case for what makes rows of them.
            for inputs, expected in asked if kernel.rows else asked[:1]:
                away = _away(run(inputs).float(), expected, mixture=_is_mixture(model))
                if not away <= ROUNDING[dtype]:
                    return f"what {name} makes of two samples differs by {away:.2g} from what it makes of each"
            if alone and _mixes(run, asked[0]):
                return f"in {name} samples see each other without a mask, too"
        longest = asked[0].inputs["max_length_q"]
        reason = _window_unseen(model, seen, longest)
        if kernel.special_only and not any(heads.are_special for heads in seen):
            reason = "it has to be asked for where scores are plain"
        if reason is not None or kernel is ONE_BY_ONE:
            return reason
        found = (trial.difference(kernel, heads, device, dtype, longest) for heads in seen)
        return next(filter(None, found), None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an architecture, a kernel or a compiler raises
        _raise_if_gpu_is_broken(device, kernel.name, error)
        return first_line(error)


def _mixes(run: Run, asked: _Asked) -> bool:
    """Whether a token of the second sample depends on the first: on whichever it is. Rounding may send a token of a
    mixture to another expert once."""
    ids, first = asked.inputs["input_ids"], asked.expected[0].shape[1]

    def second(further: int) -> torch.Tensor:
        other = ids.clone()
        other[:, :first] += further * ids.shape[1]
        return run(asked.inputs | {"input_ids": other}).float()[0, first:]

    one, *others = (second(further) for further in range(3))
    away = torch.stack([(one - other).abs().amax(dim=-1) for other in others]).amin(dim=0)
    return not away.max() < MIXED * one.abs().max()


def _away(found: torch.Tensor, expected: Sequence[torch.Tensor], *, mixture: bool) -> float:
    """How far the sample that differs most is off, relative; NaN where one has any. Of a mixture of experts it is the
    median of its tokens: grouped otherwise, rounding sends some to another expert."""
    away = []
    for part, one in zip(found.split([one.shape[1] for one in expected], dim=1), expected, strict=True):
        tokens = (part - one).norm(dim=-1) / one.norm(dim=-1)
        away.append(tokens.median() if mixture else (part - one).norm() / one.norm())
    return float(torch.stack(away).max())


def _is_mixture(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config(decoder=True)
    return any((getattr(config, name, None) or 1) > 1 for name in _EXPERTS)


def _raise_if_gpu_is_broken(device: torch.device, what: str, error: Exception) -> None:
    """After some errors nothing can be computed any more, with whatever kernel; who met one first is told only here."""
    broken = isinstance(error, torch.AcceleratorError)
    if device.type == "cuda" and not broken:
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            broken = True
    if broken:
        raise InternalError(
            f"attention by {what} broke the GPU's state: {first_line(error)}; set training.flashAttn: sdpa"
        ) from error


def _window_unseen(model: PreTrainedModel, seen: dict[trial.Heads, None], longest: int) -> str | None:
    """A window that is in a model's mask, and that its layers do not ask for."""
    if not seen:
        return f"{type(model).__name__} does not come to it"
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    if window and slides and window < longest and all(heads.window != window for heads in seen):
        return f"layers of {type(model).__name__} do not say that they see {window} tokens only"
    return None
