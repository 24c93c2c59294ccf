"""A kernel is believed once it has computed what the reference does, on this machine and with a model's own heads."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from finetune_trainer.fast.attention.flex import sample_blocks
from finetune_trainer.fast.attention.kernel import Attend, Kernel, Samples, Scores
from finetune_trainer.fast.attention.reference import one_by_one

LENGTHS = (130, 1, 257, 64, 383, 61)
"""Of samples: within a block of 128 tokens, over several, and with an end on a block's."""
WINDOW = 100
"""Of a layer that has one, at most: shorter than some of the samples."""
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Of a tensor, relative: GPUs may multiply fp32 with 10 bits of mantissa."""


class Heads(NamedTuple):
    """How many, how wide, and how their scores are made."""

    queries: int
    keys: int
    width: int
    values_width: int
    scaling: float | None
    window: int
    softcap: float | None
    sinks: torch.dtype | None
    """Of the sinks, where there are any."""

    @property
    def are_special(self) -> bool:
        """Whether `Scores.special` has something to say of them."""
        return self.softcap is not None or self.sinks is not None


def remembering(kernel: Kernel, seen: dict[Heads, None]) -> Kernel:
    """The same kernel, for a few tokens; with which heads it is called is put into `seen`, in their order."""
    of_few = kernel.few or kernel.attend

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, samples: Samples, scores: Scores
    ) -> torch.Tensor:
        sinks = None if scores.sinks is None else scores.sinks.dtype
        shapes = (query.shape[1], key.shape[1], query.shape[2], value.shape[2])
        seen[Heads(*shapes, scores.scaling, scores.window, scores.softcap, sinks)] = None
        return of_few(query, key, value, samples, scores)

    return replace(kernel, attend=attend)


def difference(
    kernel: Kernel, heads: Heads, device: torch.device, dtype: torch.dtype, longest: int = max(LENGTHS)
) -> str | None:
    """What of it differs from the reference, output or gradients, and by how much; None where nothing does.

    longest: tokens of a sample at most, on which it depends what kernels are compiled for.
    """
    generator = torch.Generator(device).manual_seed(0)
    lengths = [min(length, longest) for length in LENGTHS]
    tokens = sum(lengths)
    window = min(heads.window, WINDOW)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    given = {
        "queries": drawn(tokens, heads.queries, heads.width),
        "keys": drawn(tokens, heads.keys, heads.width),
        "values": drawn(tokens, heads.keys, heads.values_width),
    }
    if heads.sinks is not None:
        given["sinks"] = drawn(heads.queries).to(heads.sinks)
    ends = torch.tensor((0, *lengths, 0), device=device).cumsum(0, dtype=torch.int32)
    samples = Samples(ends, longest, {window: sample_blocks(ends, tokens, window)} if kernel.blocks else None)
    scores = Scores(heads.scaling, window, heads.softcap)
    upstream = drawn(tokens, heads.queries, heads.values_width)
    with kernel.active():
        found = _both_ways(kernel.attend, given, samples, scores, upstream)
    wide = {name: tensor.float() for name, tensor in given.items()}
    expected = _both_ways(one_by_one, wide, samples, scores, upstream.float())
    for name, tensor in expected.items():
        error = float((found[name].float() - tensor).norm() / tensor.norm())
        if not error <= TOLERANCE[dtype]:
            return f"{name} differ{'s' if name == 'output' else ''} by {error:.2g} from what is right"
    return None


@torch.enable_grad()
def _both_ways(
    attend: Attend, given: dict[str, torch.Tensor], samples: Samples, scores: Scores, upstream: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The output, and the gradient of each tensor that was given."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
    output = attend(
        leaves["queries"], leaves["keys"], leaves["values"], samples, scores._replace(sinks=leaves.get("sinks"))
    )
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream)
    return {"output": output.detach()} | {
        f"gradients of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }
