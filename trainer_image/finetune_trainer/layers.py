"""From a model to its layout, and from a selection to gradients: exact parameter paths in both directions.

Which paths a job selects is decided by `contract.selection`, which knows no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from itertools import takewhile
from operator import eq
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune_trainer.contract import ModelLayout, ParameterInfo, ParameterKind
from finetune_trainer.errors import InternalError, UsageError
from finetune_trainer.fast.offload import Offload


def layout_of(model: PreTrainedModel) -> ModelLayout:
    """What the model consists of. The meta device is enough: only names, shapes and module types are read.

    Raises UsageError where the decoder blocks or the token embedding cannot be told.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embeddings = _token_embedding(model)
    if id(embeddings) not in names:
        raise UsageError(
            f"spec.model: {type(model).__name__} has no token embedding; use a decoder-only language model"
        )
    blocks, count = _find_blocks(model, names[id(embeddings)])
    head = model.get_output_embeddings()
    return ModelLayout(
        parameters=tuple(_parameters(model)),
        blocks=blocks,
        block_count=count,
        input_embeddings=names[id(embeddings)],
        output_embeddings=None if head is None else names[id(head)],
        final_norm=_find_final_norm(model, blocks),
        tied=head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", object()),
    )


def _token_embedding(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # what transformers says of a model whose embedding it cannot find
        return None


def _find_blocks(model: PreTrainedModel, embeddings: str) -> tuple[str, int]:
    """The list of `num_hidden_layers` modules that stands nearest to the token embedding, which tells the decoder of a
    language model from an image encoder with as many blocks."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [n.split(".") for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if count is None or not lists:
        raise UsageError(
            f"spec.model: {type(model).__name__} has no list of its decoder blocks (num_hidden_layers is {count}); this"
            " architecture is not supported"
        )
    home = embeddings.split(".")
    # Most segments in common; of several, the outer one.
    nearest = max(lists, key=lambda path: (sum(takewhile(bool, map(eq, path, home))), -len(path)))
    return ".".join(nearest), count


def _find_final_norm(model: nn.Module, blocks: str) -> str | None:
    parent = blocks.rpartition(".")[0]
    norms = [
        name
        for name, child in model.get_submodule(parent).named_children()
        if "norm" in type(child).__name__.lower() and "emb" not in name and any(True for _ in child.parameters())
    ]
    return f"{parent}.{norms[-1]}".removeprefix(".") if norms else None


def _parameters(model: nn.Module) -> Iterable[ParameterInfo]:
    for path, parameter in model.named_parameters():
        owner, _, leaf = path.rpartition(".")
        module = model.get_submodule(owner)
        kind = ParameterKind.OTHER
        if leaf == "bias":
            kind = ParameterKind.BIAS
        elif isinstance(module, nn.Linear):
            kind = ParameterKind.LINEAR
        elif isinstance(module, Conv1D):
            kind = ParameterKind.CONV1D
        elif isinstance(module, nn.Embedding):
            kind = ParameterKind.EMBEDDING
        elif parameter.ndim == 3:
            kind = ParameterKind.EXPERTS
        yield ParameterInfo(path, tuple(parameter.shape), kind)


def apply_selection(model: nn.Module, paths: Collection[str]) -> None:
    """Require gradients of exactly these parameters.

    Raises InternalError for a path that the model does not have.
    """
    wanted = set(paths)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
        wanted.discard(name)
    if wanted:
        raise InternalError(f"selected parameters that the model does not have: {_some(wanted)}")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_trainable_is(model: nn.Module, expected: Collection[str]) -> None:
    """Refuse to train anything else than what was asked for.

    Raises InternalError that names the parameters on either side of the difference.
    """
    actual = set(trained_parameters(model))
    missing, surplus = set(expected) - actual, actual - set(expected)
    if missing or surplus:
        parts = [
            f"{len(names)} {what}: {_some(names)}"
            for what, names in (("selected but not trained", missing), ("trained but not selected", surplus))
            if names
        ]
        raise InternalError(f"the trained parameters are not the selected ones: {'; '.join(parts)}")


def _some(names: Collection[str], limit: int = 5) -> str:
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _without_adapters(model: nn.Module) -> nn.Module:
    base = getattr(model, "get_base_model", None)
    inner: nn.Module = base() if callable(base) else model
    return inner


def decoder_blocks(model: nn.Module, layout: ModelLayout) -> nn.ModuleList:
    """The decoder blocks of a model that a layout describes, whatever adapters were put around it."""
    base = _without_adapters(model)
    blocks = base.get_submodule(layout.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise InternalError(f"{layout.blocks} is no longer the list of decoder blocks")
    return blocks


def final_norm(model: nn.Module, layout: ModelLayout) -> nn.Module | None:
    """What follows the last decoder block; None where nothing does."""
    return _without_adapters(model).get_submodule(layout.final_norm) if layout.final_norm else None


def lowest_differentiated_block(model: nn.Module, layout: ModelLayout) -> int:
    """The first block that a gradient has to pass: 0 when something below the blocks is trained, the number of blocks
    when nothing in or below them is."""
    blocks = decoder_blocks(model, layout)
    inside = {id(p) for block in blocks for p in block.parameters()}
    above = _after_blocks(model, layout)
    for parameter in trained_parameters(model).values():
        if id(parameter) not in inside and id(parameter) not in above:
            return 0
    trained = (i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters()))
    return next(trained, len(blocks))


def _after_blocks(model: nn.Module, layout: ModelLayout) -> set[int]:
    """Identities of the final norm's and an untied head's parameters, adapters around them included."""
    base = _without_adapters(model)
    modules = [layout.final_norm] + ([] if layout.tied else [layout.output_embeddings])
    return {id(p) for path in modules if path for p in base.get_submodule(path).parameters()}


def checkpoint_blocks(
    model: nn.Module, layout: ModelLayout, *, enabled: bool, blocks: int | None = None, offload: bool = False
) -> int:
    """Recompute activations in the backward pass of exactly the blocks that have one, or of so many of the lowest of
    them; returns the lowest of them. With `offload`, their inputs are kept in host memory, for which this function is
    to be called again without it when nothing is trained any more.

    transformers and PEFT switch it on for all blocks and make the embeddings' output require a gradient, which sends
    the backward pass through every frozen block below. The reentrant form of checkpointing needs that; this one does
    not.
    """
    lowest = lowest_differentiated_block(model, layout)
    function = Offload() if enabled and offload else partial(checkpoint, use_reentrant=False)
    block: Any
    for index, block in enumerate(decoder_blocks(model, layout)):
        if not hasattr(block, "gradient_checkpointing"):
            if enabled:
                raise UsageError(
                    f"spec.training.gradientCheckpointing: {type(block).__name__} does not support it; set it to never"
                )
            continue
        block.gradient_checkpointing = enabled and index >= lowest and (blocks is None or index < lowest + blocks)
        block._gradient_checkpointing_func = function
    return lowest
