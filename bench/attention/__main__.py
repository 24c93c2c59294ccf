"""`python -m bench.attention`: one layer's attention over the samples of a row, by each kernel, forward and backward.

Beside the kernels that a training chooses among stand two peers: the samples as rows of a batch, where they are of one
length (torch's SDPA, cuDNN on Hopper), and all pairs of tokens with a mask. Each kernel has to pass its trial first,
and how far its results and gradients are from those of the first that ran is told. `--cpu` is a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from bench.trainer.inputs import MEAN_TOKENS
from bench.trainer.report import machine
from finetune_trainer.errors import first_line
from finetune_trainer.fast.attention import trial
from finetune_trainer.fast.attention.flash4 import FLASH4
from finetune_trainer.fast.attention.flex import FLEX, sample_blocks
from finetune_trainer.fast.attention.kernel import Kernel, Samples, Scores, Unsupported
from finetune_trainer.fast.attention.reference import ONE_BY_ONE, dense
from finetune_trainer.fast.attention.samples import rows_of_samples
from finetune_trainer.fast.attention.varlen import FLASH3, TORCHS

TOKENS = 8192
LONGEST = 2010
RUNS, WARM_UP = 10, 3
_BUSY_CYCLES = 3_000_000
"""For which the GPU is kept busy before a run, so that the host is ahead of it."""


class Shape(NamedTuple):
    """A layer of a model, and the samples that it sees."""

    heads: trial.Heads
    samples: str
    """`equal`: four of one length; `real`: lengths as in instruction data; `one`."""


def _heads(queries: int, keys: int, width: int, window: int = 0, softcap: float | None = None) -> trial.Heads:
    return trial.Heads(queries, keys, width, width, None, window, softcap, None)


SHAPES = {
    "8b-equal": Shape(_heads(32, 8, 128), "equal"),
    "8b-real": Shape(_heads(32, 8, 128), "real"),
    "8b-window": Shape(_heads(32, 8, 128, 1024), "one"),
    "1b-real": Shape(_heads(32, 8, 64), "real"),
    "gemma2-real": Shape(_heads(16, 8, 256, softcap=50.0), "real"),
    "gemma2-window": Shape(_heads(16, 8, 256, 4096, 50.0), "one"),
    "gpt-oss-real": Shape(_heads(64, 8, 64)._replace(sinks=torch.bfloat16), "real"),
    "gpt-oss-window": Shape(_heads(64, 8, 64, 128)._replace(sinks=torch.bfloat16), "real"),
}
"""Llama 3.1 8B, Llama 3.2 1B, Gemma 2 9B, gpt-oss-20b."""
TINY = {
    "equal": Shape(_heads(4, 2, 16), "equal"),
    "real": Shape(_heads(4, 2, 16, 50, 5.0)._replace(sinks=torch.bfloat16), "real"),
}


def _as_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, samples: Samples, scores: Scores) -> torch.Tensor:
    lengths = set(samples.bounds.diff().tolist())
    if scores.special or scores.window or len(lengths) > 1:
        raise Unsupported("samples of several lengths, windows and special scores")
    return rows_of_samples(q, k, v, samples.longest, scores.scaling)


def _with_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, samples: Samples, scores: Scores) -> torch.Tensor:
    at = torch.arange(len(q), device=q.device, dtype=torch.int32)
    sample = torch.searchsorted(samples.bounds[1:].contiguous(), at, right=True)
    mask = (at[:, None] >= at[None, :]) & (sample[:, None] == sample[None, :])
    if scores.window:
        mask &= at[:, None] - at[None, :] < scores.window
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    if scores.special:
        return dense(query, key, value, mask[None, None], scores)[0].transpose(0, 1)
    found = functional.scaled_dot_product_attention(query, key, value, mask[None, None], enable_gqa=True)
    return found[0].transpose(0, 1)


PEERS = (Kernel("rows of a batch", _as_rows, lambda *_: None), Kernel("mask", _with_mask, lambda *_: None))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write each result as it comes."""
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("attention.json"), help="results (%(default)s)")
    parser.add_argument("--only", nargs="*", default=[], metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal with tiny shapes")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.cpu else "cuda")
    kernels = (ONE_BY_ONE,) if options.cpu else (TORCHS, FLASH4, FLASH3, FLEX)
    results: list[dict[str, Any]] = []
    report = {"machine": machine(cpu=options.cpu), "results": results}
    for name, shape in (TINY if options.cpu else SHAPES).items():
        if options.only and name not in options.only:
            continue
        for result in _measured(shape, (*kernels, *PEERS), device, 512 if options.cpu else TOKENS):
            results.append({"shape": name, **result})
            sys.stdout.write(_line(results[-1]))
            sys.stdout.flush()
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def lengths_of(samples: str, tokens: int) -> list[int]:
    """Tokens of each sample, so many together."""
    if samples != "real":
        parts = 4 if samples == "equal" else 1
        return [tokens // parts] * parts
    rng, sigma = random.Random(1), 0.9
    found: list[int] = []
    while sum(found) < tokens:
        drawn = int(rng.lognormvariate(math.log(MEAN_TOKENS) - sigma**2 / 2, sigma))
        if 24 <= drawn <= LONGEST:
            found.append(min(drawn, tokens - sum(found)))
    return found


def _measured(shape: Shape, kernels: Sequence[Kernel], device: torch.device, tokens: int) -> Iterator[dict[str, Any]]:
    heads = shape.heads
    lengths = lengths_of(shape.samples, tokens)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    samples = Samples(bounds, max(lengths), {heads.window: sample_blocks(bounds, tokens, heads.window)})
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16, generator=generator)

    leaves = [drawn(tokens, number, heads.width).requires_grad_() for number in (heads.queries, heads.keys, heads.keys)]
    upstream = drawn(tokens, heads.queries, heads.width)
    scores = Scores(heads.scaling, heads.window, heads.softcap, drawn(heads.queries) if heads.sinks else None)
    first: list[torch.Tensor] = []
    for kernel in kernels:
        result: dict[str, Any] = {"kernel": kernel.name, "samples": len(lengths)}
        try:
            reason = kernel.why_not(device, torch.bfloat16)
            if reason is None and kernel not in PEERS:
                began = time.perf_counter()
                reason = trial.difference(kernel, heads, device, torch.bfloat16)
                result["trial_seconds"] = round(time.perf_counter() - began, 1)
            if reason is None:
                with kernel.active():
                    found = _timed(kernel, leaves, samples, scores, upstream, result)
                first = first or found
                result["apart"] = max(float((a - b).norm() / b.norm()) for a, b in zip(found, first, strict=True))
        except (Unsupported, RuntimeError) as error:
            reason = first_line(error)
        yield result | ({} if reason is None else {"error": reason})


def _timed(
    kernel: Kernel,
    leaves: list[torch.Tensor],
    samples: Samples,
    scores: Scores,
    upstream: torch.Tensor,
    result: dict[str, Any],
) -> list[torch.Tensor]:
    """Output and gradients. Into the result: median ms of both passes, and MiB that there are more meanwhile."""
    gpu = upstream.device.type == "cuda"
    times: list[tuple[float, float]] = []
    base = 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    for _ in range(WARM_UP + RUNS):
        marks = [_mark(gpu, busy=True)]
        found = kernel.attend(leaves[0], leaves[1], leaves[2], samples, scores)
        marks.append(_mark(gpu))
        gradients = torch.autograd.grad(found, leaves, upstream)
        marks.append(_mark(gpu))
        if gpu:
            torch.cuda.synchronize()
        times.append((_between(marks[0], marks[1]), _between(marks[1], marks[2])))
    result["forward_ms"], result["backward_ms"] = (
        round(statistics.median(column), 3) for column in zip(*times[WARM_UP:], strict=True)
    )
    if gpu:
        result["mib"] = round((torch.cuda.max_memory_allocated() - base) / 2**20)
    return [tensor.detach().float() for tensor in (found, *gradients)]


def _mark(gpu: bool, *, busy: bool = False) -> Any:
    if not gpu:
        return time.perf_counter()
    if busy:
        torch.cuda._sleep(_BUSY_CYCLES)
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(one: Any, other: Any) -> float:
    return 1e3 * (other - one) if isinstance(one, float) else float(one.elapsed_time(other))


def _line(result: dict[str, Any]) -> str:
    name = f"{result['shape']:15} {result['kernel'][:32]:32}"
    if "error" in result:
        return f"{name} {result['error'][:100]}\n"
    memory = f"  {result['mib']:6,} MiB" if "mib" in result else ""
    return (
        f"{name} {result['forward_ms']:9.3f} + {result['backward_ms']:9.3f} ms{memory}"
        f"  apart {result['apart']:.1e}  trial {result.get('trial_seconds', 0.0):.1f} s\n"
    )


if __name__ == "__main__":
    sys.exit(main())
