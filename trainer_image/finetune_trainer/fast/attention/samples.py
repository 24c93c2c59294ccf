"""What transformers calls in the place of its own attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune_trainer.fast.attention.flex import sample_blocks
from finetune_trainer.fast.attention.kernel import Kernel, Samples, Scores, Unsupported
from finetune_trainer.fast.attention.reference import dense

NAME = "finetune_samples"
"""Under which transformers knows it."""
BLOCKS = "sample_blocks"
"""The argument of a model under which `Samples.blocks` comes to its layers."""


def attention_by(kernel: Kernel) -> Any:
    """transformers' interface to a kernel: query (1, heads, tokens, width), key and value (1, kv heads, tokens, width)
    -> (1, tokens, heads, width).

    Where a batch has no bounds of samples (evaluation, generation), it is computed with a mask. Raises Unsupported for
    dropout, for a mask that a model's own code has made, and for what the kernel does not do.
    """

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        same_length: bool = False,
        sample_blocks: dict[int, Any] | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        scores = Scores(scaling, sliding_window or 0, softcap, s_aux)
        if cu_seq_lens_q is None or max_length_q is None:
            if scores.special:
                return dense(query, key, value, attention_mask, scores).transpose(1, 2), None
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                sliding_window=sliding_window, **options,
            )  # fmt: skip
        if dropout or options.get("position_bias") is not None:
            raise Unsupported(f"attention with {'dropout' if dropout else 'a bias of positions'}")
        if attention_mask is not None and attention_mask.numel() > 1:
            raise Unsupported("attention with a mask of the model's own")
        if scores.window >= max_length_q:
            scores = scores._replace(window=0)
        device = query.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
        q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
        if same_length and kernel.rows and not scores.window and not scores.special:
            return rows_of_samples(q, k, v, max_length_q, scaling)[None], None
        return kernel.attend(q, k, v, Samples(cu_seq_lens_q, max_length_q, sample_blocks), scores)[None], None

    return attention


def rows_of_samples(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, scaling: float | None
) -> torch.Tensor:
    """Samples of one length are the rows of a batch, for which torch has faster kernels (cuDNN's on Hopper). (tokens,
    heads, width) each."""
    q, k, v = (tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in (query, key, value))
    grouped = key.shape[1] != query.shape[1]
    found = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    return found.transpose(1, 2).flatten(0, 1)


@contextmanager
def installed(model: PreTrainedModel, kernel: Kernel) -> Iterator[None]:
    """Let a model's attention go through a kernel meanwhile.

    Raises what a package raises that cannot be used.
    """
    with ExitStack() as stack:
        stack.enter_context(kernel.active())
        if kernel.blocks:
            stack.callback(model.base_model.register_forward_pre_hook(_add_blocks, with_kwargs=True).remove)
        AttentionInterface.register(NAME, attention_by(kernel))
        AttentionMaskInterface.register(NAME, sdpa_mask)
        stack.callback(model.set_attn_implementation, _implementations(model.config))
        model.set_attn_implementation(_for_text(model.config))
        yield


def _implementations(config: PreTrainedConfig) -> dict[str, Any]:
    """Of a model and its parts, as transformers takes them."""
    parts = {key: getattr(config, key) for key in config.sub_configs}
    found = {key: _implementations(part) for key, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **found}


def _for_text(config: PreTrainedConfig) -> dict[str, Any]:
    """What decodes text has it: pictures are seen with another attention."""
    text = config.get_text_config(decoder=True)
    return {"": NAME, **{key: {"": NAME} for key in config.sub_configs if getattr(config, key) is text}}


def _add_blocks(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Once for all layers: made in each, they would take longer than attention."""
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:
        return args, kwargs
    positions = kwargs["position_ids"]
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None) or 0
    windows = {0, window if window < kwargs["max_length_q"] else 0}
    return args, {**kwargs, BLOCKS: {one: sample_blocks(bounds, positions.shape[-1], one) for one in windows}}
