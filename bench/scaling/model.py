"""What more GPUs would give: a step's time from bytes, bandwidths and floating-point operations. Pure; nothing here is
measured. `python -m bench.scaling.model` prints the table of docs/speed.md, which has the assumptions in words.

Bytes of collectives: Patarasuk and Yuan 2009 (bandwidth-optimal all-reduce); of ZeRO's stages: Rajbhandari et al. 2020
(arXiv:1910.02054, section 7).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.trainer.shapes import SHAPES, Shape, flops_per_token

LLAMA_70B = Shape(8192, 80, 64, 8, 28_672, 128_256, tied=False, rope_factor=8.0)
BITS16, FP32 = 2, 4
"""Bytes."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs."""

    gpus: int
    """In all."""
    gpus_per_node: int = 8
    flops: float = 450e12
    """A second, of a GPU, in a step without communication."""
    link: float = 450e9
    """Bytes a second that a GPU sends over NVLink, and receives at the same time."""
    network: float = 400e9
    """The same, of a node with all its adapters."""
    reached: float = 0.8
    """Share of both that a collective reaches."""
    hop: float = 2e-6
    """Seconds from one GPU of a node to the next."""
    far_hop: float = 10e-6
    """Seconds from one node to the next."""

    @property
    def nodes(self) -> int:
        """As many as it takes."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def bandwidth(self) -> float:
        """Bytes a second that pass every place of the rings. These go through a node's GPUs and leave it once, all of
        them together by all its adapters."""
        slowest = self.link if self.nodes == 1 else min(self.link, self.network)
        return self.reached * slowest

    @property
    def latency(self) -> float:
        """Seconds that the first byte takes around a ring."""
        return (self.gpus - self.nodes) * self.hop + (self.nodes - 1) * self.far_hop

    def seconds(self, size: float, collectives: float = 1) -> float:
        """Of gathering or scattering tensors of so many bytes in all, in so many collectives. An all-reduce is two."""
        if self.gpus == 1:
            return 0.0
        return size * (self.gpus - 1) / self.gpus / self.bandwidth + collectives * self.latency


@dataclass(frozen=True)
class Job:
    """What a GPU does in a step, and what of the model is divided."""

    name: str
    shape: Shape
    strategy: str
    """ddp, zero2, zero3 or fsdp2."""
    rank: int | None = None
    """Of adapters on all linear layers; None: everything is trained."""
    rows: int = 4
    length: int = 2048
    recomputed: bool = True

    @property
    def weights(self) -> int:
        """Of embeddings, blocks and head; norms are left out."""
        return self.shape.blocks * self.shape.linear + 2 * self.shape.hidden * self.shape.vocabulary

    @property
    def trained(self) -> int:
        """Weights with a gradient."""
        if self.rank is None:
            return self.weights
        return self.rank * self.shape.linear_sides * self.shape.blocks

    @property
    def tokens(self) -> int:
        """Of a GPU in a step."""
        return self.rows * self.length

    def held(self, gpus: int) -> float:
        """Bytes of weights, gradients and Adam's state of a GPU, without activations and what is gathered."""
        n = gpus
        frozen = 0 if self.rank is None else self.weights * BITS16
        if self.strategy == "ddp":
            return frozen + 16.0 * self.trained
        if self.strategy == "zero2":
            return frozen + (2 + (2 + 12) / n) * self.trained
        return (frozen + 16.0 * self.trained) / n

    def forward_flops(self) -> float:
        """Of the tokens of a GPU."""
        shape = self.shape
        weights = shape.blocks * shape.linear + shape.hidden * shape.vocabulary
        return self.tokens * (2.0 * weights + 2 * shape.hidden * self.length * shape.blocks)

    def backward_flops(self) -> float:
        """With what is computed once more."""
        shape, full = self.shape, self.rank is None
        both = flops_per_token(
            shape,
            lowest=0,
            trained_blocks=shape.blocks if full else 0,
            rank=self.rank or 0,
            context=self.length / 2,
        )
        head = 2 * shape.hidden * shape.vocabulary
        again = self.forward_flops() - self.tokens * head if self.recomputed else 0.0
        return self.tokens * (both + (head if full else 0)) - self.forward_flops() + again


@dataclass(frozen=True)
class Step:
    """Seconds of a step."""

    computation: float
    communication: float
    """All of it, hidden or not."""
    exposed: float
    """What nothing is computed beside."""
    sent: float
    """Bytes that a GPU sends, and as many that it receives."""

    @property
    def seconds(self) -> float:
        """The whole."""
        return self.computation + self.exposed

    @property
    def efficiency(self) -> float:
        """Tokens a second of a GPU, of what they would be without communication."""
        return self.computation / self.seconds


BUCKETS = {"ddp": 25 * 2**20, "zero2": 5e8 * BITS16}
"""Bytes of gradients that are reduced at a time, as torch and DeepSpeed have it."""


def step(job: Job, cluster: Cluster) -> Step:
    """A step of a job on a cluster, all GPUs with the same rows."""
    forward, backward = (flops / cluster.flops for flops in (job.forward_flops(), job.backward_flops()))
    plan = (
        _whole_on_each(job, cluster, backward) if job.strategy in BUCKETS else _divided(job, cluster, forward, backward)
    )
    size, communication, exposed = plan
    sent = size * (cluster.gpus - 1) / cluster.gpus
    return Step(forward + backward, communication, exposed, sent)


def _whole_on_each(job: Job, cluster: Cluster, backward: float) -> tuple[float, float, float]:
    """Gradients are reduced bucket by bucket beside the backward pass, the last bucket after it. ZeRO-2 then gathers
    the weights that each GPU has updated, and nothing is computed meanwhile. DeepSpeed reduces with all-reduces, and
    takes of these what a GPU needs."""
    width = FP32 if job.strategy == "ddp" else BITS16
    size = 2.0 * width * job.trained
    buckets = max(1.0, width * job.trained / BUCKETS[job.strategy])
    reduction = cluster.seconds(size, 2 * buckets)
    last = reduction / buckets
    exposed = max(reduction - backward * (1 - 1 / buckets), last)
    if job.strategy == "ddp":
        return size, reduction, exposed
    gathered = float(BITS16 * job.trained)
    gathering = cluster.seconds(gathered)
    return size + gathered, reduction + gathering, exposed + gathering


def _divided(job: Job, cluster: Cluster, forward: float, backward: float) -> tuple[float, float, float]:
    """Each block's weights are gathered in the forward and in the backward pass while the block before is computed, and
    its gradients are scattered meanwhile. The first gathering and the last scattering have nothing beside them.

    FSDP2 gathers trained weights in the fp32 that they are kept in, frozen ones in 16 bits; ZeRO-3 all in 16 bits.
    """
    width = FP32 if job.strategy == "fsdp2" else BITS16
    frozen = 0 if job.rank is None else BITS16 * job.weights
    gathered = float(frozen + width * job.trained)
    scattered = float(width * job.trained)
    blocks = job.shape.blocks
    gathering, scattering = cluster.seconds(gathered, blocks), cluster.seconds(scattered, blocks)
    # What is left when all that is computed beside it is done, or the piece that nothing is computed beside.
    beyond = max(gathering - forward, gathering / blocks)
    beyond += max(gathering + scattering - backward, scattering / blocks)
    return 2 * gathered + scattered, 2 * gathering + scattering, beyond


LORA_8B = Job("8B, LoRA rank 16, DDP", SHAPES["8b"], "ddp", rank=16, recomputed=False)
FULL_8B = Job("8B, full, ZeRO-2", SHAPES["8b"], "zero2")
LORA_70B = Job("70B, LoRA rank 16, FSDP2", LLAMA_70B, "fsdp2", rank=16)
JOBS = (
    LORA_8B,
    FULL_8B,
    replace(FULL_8B, name="8B, full, ZeRO-3", strategy="zero3"),
    replace(FULL_8B, name="8B, full, FSDP2", strategy="fsdp2"),
    LORA_70B,
    replace(LORA_70B, name="70B, full, ZeRO-3", strategy="zero3", rank=None),
    replace(LORA_70B, name="70B, full, FSDP2", rank=None),
)
GPUS = (8, 64, 256)
NETWORKS = {"one adapter": 50e9, "eight adapters": 400e9}
"""Bytes a second of a node: InfiniBand adapters of 400 Gb/s."""
ROOM = 7 / 8
"""Share of a GPU's memory for weights, gradients and optimizer; the rest is for activations and what is gathered."""


def table(gpus: Sequence[int] = GPUS, memory: float = 80e9) -> str:
    """In Markdown; without the settings whose state a GPU with so many bytes does not hold."""
    networks = " | ".join(f"{name}: step, s | efficiency" for name in NETWORKS)
    lines = [
        f"| job | GPUs | held, GB | sent a step, GB | computation, s | {networks} |",
        f"|{' --- |' * (5 + 2 * len(NETWORKS))}",
    ]
    for job in JOBS:
        for number in gpus:
            if job.held(number) > ROOM * memory:
                continue
            steps = [step(job, Cluster(number, network=network)) for network in NETWORKS.values()]
            cells = [f"{found.seconds:.2f} | {100 * found.efficiency:.0f} %" for found in steps]
            first = steps[0]
            lines.append(
                f"| {job.name} | {number} | {job.held(number) / 1e9:.1f} | {first.sent / 1e9:.2f} |"
                f" {first.computation:.2f} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling.model", description="The table of docs/speed.md.")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="in all; eight make a node (%(default)s)")
    parser.add_argument("--memory", type=float, default=80.0, metavar="GB", help="of a GPU (%(default)s)")
    options = parser.parse_args(arguments)
    sys.stdout.write(table(options.gpus, options.memory * 1e9))


if __name__ == "__main__":
    main()
