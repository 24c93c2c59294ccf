"""Which fast paths a job takes, by what it asks for and what the machine has. Every choice is logged with a reason."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune_trainer.balancing import balancing_weight
from finetune_trainer.contract import ModelLayout, TrainerConfig
from finetune_trainer.contract.compiling import WORTH_COMPILING, may_be_long
from finetune_trainer.contract.fast_paths import SHARDED, FastUse
from finetune_trainer.contract.vocabulary import FlashAttn, Precision, Switch
from finetune_trainer.distributed import told_by_all
from finetune_trainer.errors import UsageError
from finetune_trainer.fast import adapter_groups, adapters, attention, compilation, packed_masks
from finetune_trainer.layers import decoder_blocks, final_norm
from finetune_trainer.model import DTYPES, autocast
from finetune_trainer.quantized.linear import unrounded_activations
from finetune_trainer.sanity import mixes_samples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FastPaths:
    """What was chosen for one training."""

    kernel: attention.Kernel | None
    """Of attention over samples one after the other, in batches that `rows.flatten` lays out; None: with a mask."""
    compiled: bool
    """Compiled decoder blocks and loss."""
    may_fail: bool
    """What the compiler cannot do runs as it is, instead of ending the run."""
    fused: bool
    """Adapted layers with the same input computed together (`adapter_groups`)."""
    late_logs: bool
    """No step waits for the figures of the one before (`training.late_logs`)."""

    @contextmanager
    def installed(self, model: nn.Module, layout: ModelLayout, config: TrainerConfig) -> Iterator[None]:
        """Have a tuned model take these paths while it trains; before and after, it is transformers' and PEFT's own."""
        with ExitStack() as stack:
            if self.kernel is not None:
                stack.enter_context(attention.installed(causal_of(model), self.kernel))
            elif config.dataset.packing:
                stack.enter_context(packed_masks.without_a_look())
            if config.training.precision is not Precision.FP32 and config.method.uses_lora:
                stack.enter_context(adapters.without_wide_inputs(model))
            blocks = list(decoder_blocks(model, layout))
            draws = self.compiled and _draws(config, model, blocks)
            if self.fused:
                _fuse(config, model, blocks, stack, mlps=self.compiled and not draws)
            if self.compiled:
                norm = final_norm(model, layout)
                stack.enter_context(compilation.compiled(blocks, draws=draws, may_fail=self.may_fail, norm=norm))
            yield


def _fuse(config: TrainerConfig, model: nn.Module, blocks: list[nn.Module], stack: ExitStack, *, mlps: bool) -> None:
    reason = "no adapter of plain arithmetic is on a layer that it can be computed together with"
    try:
        run = partial(_run_few_tokens, config, model)
        if stack.enter_context(adapter_groups.grouped(model, blocks, run, mlps=mlps)):
            return
    except _NotRun as error:
        reason = str(error)
    if config.training.fuse_adapters is Switch.ALWAYS:
        raise UsageError(use_of(config).refused("fuseAdapters", reason))
    logger.info("adapters: each layer by itself: %s", reason)


class _NotRun(Exception):
    """A few tokens cannot be passed through the model."""


def use_of(config: TrainerConfig) -> FastUse:
    """What a job asks of the fast paths."""
    training = config.training
    return FastUse(
        strategy=config.parallelism.strategy,
        method=config.method,
        flash_attn=training.flash_attn,
        torch_compile=training.torch_compile,
        fuse_adapters=training.fuse_adapters,
        quantization=config.quantization.type if config.quantization is not None else None,
        dropout=config.lora is not None and config.lora.dropout > 0,
        noise=training.neftune_alpha is not None,
    )


def mask_separates(config: TrainerConfig, model: nn.Module) -> bool:
    """Whether a model's own mask keeps the samples of packed rows apart. Where it does not, a kernel has to: what lays
    samples out one after the other needs no mask.

    All processes enter. Raises UsageError where neither does.
    """
    device = next(model.parameters()).device
    with autocast(config, device):
        mixes = mixes_samples(model, device)
    if not any(told_by_all(mixes)):
        return True
    logger.info(
        "packing: what runs with a mask has one sample in a row: %s mixes them", type(causal_of(model)).__name__
    )
    # The training asks again, once the model is tuned; what cannot be trained is refused before anything is judged.
    _kernel(config, model, device, 0, masked=False)
    return False


def choose(
    config: TrainerConfig, model: nn.Module, device: torch.device, micro_batches: int, *, masked: bool = True
) -> FastPaths:
    """The paths for a job's supervised training, of so many micro-batches on each GPU.

    masked: whether attention with a mask computes the job's rows, too (`mask_separates`). Raises UsageError where the
    job insists on a path that it cannot take, and where nothing computes its rows.
    """
    kernel = _kernel(config, model, device, micro_batches, masked=masked)
    compiled = _compiled(config, device, micro_batches)
    # The scale of gradients in fp16 is decided on the host, at every step.
    sharded = config.parallelism.strategy in SHARDED
    late = device.type == "cuda" and not sharded and config.training.precision is not Precision.FP16
    may_fail = config.training.torch_compile is Switch.AUTO
    return FastPaths(kernel, compiled, may_fail, _fused(config, device), late)


def _kernel(
    config: TrainerConfig, model: nn.Module, device: torch.device, micro_batches: int, *, masked: bool
) -> attention.Kernel | None:
    """None: with a mask, which is no answer where `masked` is false."""
    wanted = config.training.flash_attn
    reason = _untried(config, model, device, masked=masked)
    if reason is None:
        try:
            kernel = _best_kernel(config, causal_of(model), device, micro_batches, masked=masked)
        except attention.Unsupported as error:
            reason = str(error)
        else:
            logger.info("attention: samples one after the other without a mask (%s)", kernel.name)
            return kernel
    if not masked:
        others = ["use auto"] if wanted in (FlashAttn.SDPA, FlashAttn.FLEX) else []
        others += ["use strategy ddp"] if config.parallelism.strategy in SHARDED else []
        raise UsageError(
            f"spec.dataset.packing: in {type(causal_of(model)).__name__} samples that share a row see each other where "
            f"attention has a mask, and there is no kernel without one: {reason}; "
            f"{', or '.join([*others, 'set packing to false'])}",
            reason="PackingNotSupported",
        )
    if wanted in (FlashAttn.VARLEN, FlashAttn.FLEX):
        raise UsageError(use_of(config).refused("flashAttn", reason))
    logger.info("attention: with a mask; %s", reason)
    return None


def _untried(config: TrainerConfig, model: nn.Module, device: torch.device, *, masked: bool) -> str | None:
    """Why no kernel for samples of any length needs to be tried."""
    wanted = config.training.flash_attn
    if wanted is FlashAttn.SDPA:
        return "spec.training.flashAttn is sdpa"
    if wanted is FlashAttn.AUTO and device.type == "cpu" and masked:
        return "CPUs have no kernel for samples of any length"
    reason = use_of(config).masked
    if reason is None and balancing_weight(causal_of(model)):
        reason = "the model's balancing loss counts tokens of a padding mask"
    return reason


@torch.no_grad()
def _best_kernel(
    config: TrainerConfig, causal: PreTrainedModel, device: torch.device, micro_batches: int, *, masked: bool = True
) -> attention.Kernel:
    """Raises Unsupported where there is none."""

    def run(inputs: dict[str, Any]) -> torch.Tensor:
        with autocast(config, device), unrounded_activations(causal):
            found: torch.Tensor = causal.base_model(**inputs).last_hidden_state
            return found

    was_training = causal.training
    causal.eval()
    try:
        dtype = DTYPES[config.training.precision]
        training = config.training
        waits = may_be_long(training.max_steps, training.micro_batch_size * training.gradient_accumulation)
        wanted = attention.Wanted(training.flash_attn, config.dataset.max_length, micro_batches, waits, masked)
        return attention.best_kernel(causal, device, dtype, wanted, run)
    finally:
        causal.train(was_training)


def _compiled(config: TrainerConfig, device: torch.device, micro_batches: int) -> bool:
    wanted = config.training.torch_compile
    if wanted is Switch.NEVER:
        logger.info("torch.compile: not used, as spec.training.torchCompile says")
        return False
    use = use_of(config)
    reason = use.uncompiled
    if reason is None and wanted is Switch.AUTO:
        reason = _not_worth_it(device, micro_batches)
    reason = reason or compilation.why_not(device)
    if reason is None:
        logger.info("torch.compile: decoder blocks and loss")
        return True
    if wanted is Switch.ALWAYS:
        raise UsageError(use.refused("torchCompile", reason))
    logger.info("torch.compile: not used: %s", reason)
    return False


def _fused(config: TrainerConfig, device: torch.device) -> bool:
    wanted = config.training.fuse_adapters
    if wanted is Switch.NEVER or (wanted is Switch.AUTO and not config.method.uses_lora):
        return False
    use = use_of(config)
    reason = use.unfused
    if reason is None and wanted is Switch.AUTO and device.type != "cuda":
        reason = "on a CPU the files' own pages are the weights, which are not copied for it"
    if reason is None:
        return True
    if wanted is Switch.ALWAYS:
        raise UsageError(use.refused("fuseAdapters", reason))
    logger.info("adapters: each layer by itself: %s", reason)
    return False


def _draws(config: TrainerConfig, model: nn.Module, blocks: list[nn.Module]) -> bool:
    """Whether blocks draw random numbers in training (dropout), or may do so."""
    device = next(model.parameters()).device
    states: list[torch.Tensor] = []

    def note(*_: Any) -> None:
        found = [torch.get_rng_state()]
        if device.type == "cuda":
            found.append(torch.cuda.get_rng_state(device))
        states.append(torch.cat(found))

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.callback(blocks[0].register_forward_pre_hook(note).remove)
        stack.callback(blocks[-1].register_forward_hook(note).remove)
        try:
            _run_few_tokens(config, model, training=True)
        except _NotRun as error:
            logger.info("torch.compile: blocks may draw random numbers, and keep more: %s", error)
            return True
    draws = len(states) != 2 or not torch.equal(*states)
    if draws:
        logger.info("torch.compile: blocks draw random numbers, and keep more")
    return draws


@torch.no_grad()
def _run_few_tokens(config: TrainerConfig, model: nn.Module, *, training: bool = False) -> None:
    """A forward pass, in evaluation or in training mode. Raises _NotRun where the model wants more than tokens."""
    before = model.training
    device = next(model.parameters()).device
    model.train(training)
    try:
        with autocast(config, device):
            causal_of(model).base_model(input_ids=torch.arange(3, 11, device=device)[None], use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's own code wants that is not given here
        raise _NotRun(f"{type(causal_of(model)).__name__} cannot be run on a few tokens: {error}"[:300]) from error
    finally:
        model.train(before)


def _not_worth_it(device: torch.device, micro_batches: int) -> str | None:
    if device.type != "cuda":
        return "on a CPU it saves less than it takes"
    if micro_batches < WORTH_COMPILING:
        return f"{micro_batches} micro-batches are too few to make up for the time it takes"
    return None


def causal_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model within PEFT's, or itself."""
    base = getattr(model, "get_base_model", None)
    causal = base() if callable(base) else model
    assert isinstance(causal, PreTrainedModel)
    return causal
