"""Llama shapes, and the arithmetic of a training step on them. Pure: no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool
    rope_factor: float | None = None
    """Of Llama 3.1's and 3.2's rotary embeddings; None for plain ones."""

    def config(self) -> dict[str, Any]:
        """Arguments of transformers' LlamaConfig."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 500_000.0}
        if self.rope_factor is not None:
            rope |= {
                "rope_type": "llama3",
                "factor": self.rope_factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.mlp,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": rope,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }

    @property
    def linear(self) -> int:
        """Weights of a block's linear layers."""
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.mlp

    @property
    def linear_sides(self) -> int:
        """Inputs and outputs of a block's linear layers, added up: a rank's number of adapter weights."""
        head = self.hidden // self.heads
        query, key = head * self.heads, head * self.kv_heads
        return 2 * (self.hidden + query) + 2 * (self.hidden + key) + 3 * (self.hidden + self.mlp)


SHAPES = {
    "8b": Shape(4096, 32, 32, 8, 14_336, 128_256, tied=False, rope_factor=8.0),
    "1b": Shape(2048, 16, 32, 8, 8192, 128_256, tied=True, rope_factor=32.0),
    "tiny": Shape(64, 4, 4, 2, 128, 512, tied=False),
}
"""Llama 3.1 8B, Llama 3.2 1B, and one for a rehearsal on CPUs."""
SHAPES |= {
    f"{name}-{blocks}": replace(SHAPES[name], blocks=blocks)
    for name, blocks in (("8b", 8), ("8b", 24), ("tiny", 1), ("tiny", 2))
}
"""The same with other numbers of blocks, for `bench.scaling`."""


def flops_per_token(
    shape: Shape, *, lowest: int, trained_blocks: int, rank: int, context: float, skipped: int = 0
) -> float:
    """Floating-point operations that a training step needs for one token, whatever an implementation spends beyond.

    Each weight of a matrix costs 2 in the forward pass, 2 for the gradient of its input in every block from the lowest
    that a gradient passes, and 2 more for its own gradient where it is trained. Attention costs, for each of the
    `context` tokens that a token sees on average, 4 x hidden in the forward pass and twice that in the backward pass.
    Embeddings, norms and activations count nothing, nor does anything that is computed a second time.

    trained_blocks: blocks whose own weights are trained; rank: of adapters on all linear layers, 0 without; skipped:
    blocks that are not run at all, since what comes out of them is cached.
    """
    head = shape.hidden * shape.vocabulary
    passed = shape.blocks - lowest
    weights = 2 * ((shape.blocks - skipped) * shape.linear + head) + 2 * (passed * shape.linear + head)
    weights += 2 * trained_blocks * shape.linear
    # The first of the passed blocks needs no gradient of its own input, which is a thirtieth part and left in.
    adapters = 6 * rank * shape.linear_sides * passed
    attention = 4 * shape.hidden * context * (shape.blocks - skipped + 2 * passed)
    return float(weights + adapters + attention)
