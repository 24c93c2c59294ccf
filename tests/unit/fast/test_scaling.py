"""The bench of several GPUs: what it makes of times and traces, and its model of many nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.scaling.inputs import with_fewer_blocks
from bench.scaling.model import BUCKETS, FULL_8B, JOBS, LORA_8B, LORA_70B, Cluster, step, table
from bench.scaling.report import markdown, ratios
from bench.scaling.settings import RUNS, TINY
from bench.scaling.trace import summarised, union
from bench.trainer.inputs import write_model
from transformers import AutoModelForCausalLM

DOCS = Path(__file__).parents[3] / "docs"


def _event(name: str, begin: float, end: float, *, stream: int = 7, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "args": {"stream": stream}}


GATHER = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


def test_a_trace_says_what_communication_hides_behind() -> None:
    found = summarised(
        [
            _event("gemm", 1000, 3000),
            _event("gemm", 2500, 4000, stream=8),
            _event(GATHER, 3500, 5500, stream=20),
            _event("Memcpy DtoD", 5000, 5200, stream=20, cat="gpu_memcpy"),
            _event(GATHER, 6000, 6100, stream=20),
            # None of these is work of the GPU.
            _event("nccl:all_gather", 0, 9000, cat="gpu_user_annotation"),
            _event("ncclAllGather", 0, 9000, cat="cuda_runtime"),
            {"ph": "i", "cat": "kernel", "name": "gemm", "ts": 0},
        ]
    )
    assert found is not None
    # The second gemm runs beside the first gathering for 500 us, the copy for 200.
    assert (found["communication_ms"], found["overlap"], found["exposed_ms"]) == (2.1, round(0.7 / 2.1, 4), 1.4)
    assert (found["span_ms"], found["computation_ms"], found["idle_ms"]) == (5.1, 3.2, 0.5)
    assert found["collectives"] == 2
    assert found["streams"] == {"communication": [20], "computation": [7, 8, 20]}
    assert found["longest_collectives"] == [[GATHER, 2.1]]


def test_a_trace_without_a_gpu_says_nothing() -> None:
    assert summarised([_event("aten::mm", 0, 5, cat="cpu_op")]) is None


def test_a_step_without_communication_has_no_overlap() -> None:
    found = summarised([_event("gemm", 0, 1000), _event("gemm", 3000, 4000)])
    assert found is not None
    assert (found["overlap"], found["communication_ms"], found["idle_ms"]) == (None, 0.0, 2.0)


@pytest.mark.parametrize(
    ("spans", "merged"),
    [
        ([], []),
        ([(3.0, 4.0), (1.0, 2.0)], [(1.0, 2.0), (3.0, 4.0)]),
        ([(1.0, 5.0), (2.0, 3.0), (5.0, 6.0)], [(1.0, 6.0)]),
    ],
)
def test_stretches_of_time_are_counted_once(
    spans: list[tuple[float, float]], merged: list[tuple[float, float]]
) -> None:
    assert union(spans) == merged


def _result(name: str, blocks: int, seconds: float, gpus: int = 1) -> dict[str, Any]:
    return {
        "name": name,
        "trained": name.split("/")[0],
        "blocks": blocks,
        "gpus": list(range(gpus)),
        "median_seconds": seconds,
        "tokens_per_second": gpus * 100 / seconds,
        "peaks_gib": [1.0] * gpus,
    }


def test_two_gpus_are_held_against_one_with_the_same_model() -> None:
    results = [_result("lora/one", 32, 0.5), _result("full/one", 32, 9.0), _result("lora/ddp", 32, 0.52, gpus=2)]
    found = ratios(results)
    assert found == {"lora/ddp": {"ratio": 1.923, "one": {"seconds": 0.5, "measured": True}}}
    text = markdown({"results": results, "ratios": found})
    assert "| lora/ddp | 2 | 520.0 | 385 | 1.923 | 1.0, 1.0 |" in text


def test_what_one_gpu_cannot_hold_lies_on_a_line() -> None:
    """0.1 s beside the blocks, 0.05 s each: 1.7 s with 32."""
    out = {**_result("full/one-32", 32, 9.0), "error": "OutOfMemoryError"}
    few = [_result("full/one-8", 8, 0.5), _result("full/one-24", 24, 1.3), out]
    found = ratios([*few, _result("full/fsdp2", 32, 1.8, gpus=2)])["full/fsdp2"]
    assert found["ratio"] == pytest.approx(2 * 1.7 / 1.8, abs=1e-3)
    one = found["one"]
    assert (one["measured"], one["blocks"]) == (False, [8, 24])
    assert one["seconds_a_block"] == pytest.approx(0.05)
    assert one["seconds_beside"] == pytest.approx(0.1)
    assert ratios([few[0], _result("full/fsdp2", 32, 1.8, gpus=2)]) == {}


def test_fewer_blocks_are_the_lower_ones_of_the_same_files(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "tiny", "tiny")
    less = with_fewer_blocks(tmp_path / "tiny-2", whole, 2)
    large, small = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, less))
    assert {name.split(".")[2] for name in small if ".layers." in name} == {"0", "1"}
    assert all(torch.equal(large[name], tensor) for name, tensor in small.items())
    files = list(less.glob("*.safetensors"))
    assert files and all(path.stat().st_nlink == 2 for path in files)


def test_every_strategy_is_measured_and_traced_on_both_gpus() -> None:
    two = {run.name: run for run in RUNS if len(run.gpus) == 2}
    assert two.keys() == {"lora/ddp", "full/fsdp2", "full/zero2", "full/zero3"}
    assert all(run.traced for run in two.values())
    assert [run.name for run in TINY] == [run.name for run in RUNS]
    # Rows, paths and packing are those of the run on one GPU.
    for run in two.values():
        one = next(other for other in RUNS if other.trained == run.trained and len(other.gpus) == 1)
        assert replace(one.setting, name="", shape="") == replace(run.setting, name="", shape="")
        assert one.packed == run.packed


# ---- the model of many nodes ----


def test_one_gpu_sends_nothing() -> None:
    for job in JOBS:
        found = step(job, Cluster(1))
        assert (found.sent, found.communication, found.exposed, found.efficiency) == (0, 0, 0, 1)


NODE = Cluster(8, reached=1.0, hop=0.0, far_hop=0.0)
WEIGHTS = 32 * 218_103_808 + 2 * 128_256 * 4096
ADAPTERS = 41_943_040


@pytest.mark.parametrize(
    ("job", "size"),
    [
        # An all-reduce of fp32 gradients.
        (LORA_8B, 2 * 4 * ADAPTERS),
        # An all-reduce of 16-bit gradients, and 16-bit weights gathered.
        (FULL_8B, (2 * 2 + 2) * WEIGHTS),
        # Weights gathered twice, gradients scattered.
        (replace(FULL_8B, strategy="zero3"), 3 * 2 * WEIGHTS),
        (replace(FULL_8B, strategy="fsdp2"), 3 * 4 * WEIGHTS),
        (replace(LORA_8B, strategy="fsdp2"), 2 * 2 * WEIGHTS + 3 * 4 * ADAPTERS),
    ],
)
def test_bytes_are_those_of_the_collectives(job: Any, size: float) -> None:
    found = step(job, NODE)
    assert found.sent == pytest.approx(size * 7 / 8)
    assert found.communication == pytest.approx(size * 7 / 8 / 450e9)


def test_computation_is_that_of_the_shape() -> None:
    """8,192 tokens; twice the weights forward, four times backward, twice once more for blocks; attention beside it."""
    block, head, attention = 32 * 218_103_808, 128_256 * 4096, 2 * 4096 * 2048 * 32
    assert FULL_8B.forward_flops() == pytest.approx(8192 * (2 * (block + head) + attention))
    assert FULL_8B.backward_flops() == pytest.approx(8192 * (6 * block + 4 * head + 3 * attention))
    kept = replace(FULL_8B, recomputed=False)
    assert kept.backward_flops() == pytest.approx(8192 * (4 * (block + head) + 2 * attention))
    assert LORA_8B.backward_flops() == pytest.approx(8192 * (2 * (block + head) + 2 * attention + 6 * ADAPTERS))


@pytest.mark.parametrize(
    ("cluster", "bandwidth", "latency"),
    [
        (Cluster(8), 0.8 * 450e9, 7 * 2e-6),
        (Cluster(16, network=50e9), 0.8 * 50e9, 14 * 2e-6 + 10e-6),
        (Cluster(64, network=800e9), 0.8 * 450e9, 56 * 2e-6 + 7 * 10e-6),
    ],
)
def test_the_slowest_place_of_a_ring_counts(cluster: Cluster, bandwidth: float, latency: float) -> None:
    assert [cluster.bandwidth, cluster.latency] == pytest.approx([bandwidth, latency])
    n = cluster.gpus
    assert cluster.seconds(1e9, 3) == pytest.approx(1e9 * (n - 1) / n / bandwidth + 3 * latency)


def test_what_computation_hides_costs_nothing_but_its_last_piece() -> None:
    found = step(FULL_8B, NODE)
    gathering = 2 * WEIGHTS * 7 / 8 / 450e9
    last = 4 * WEIGHTS * 7 / 8 / 450e9 / (2 * WEIGHTS / BUCKETS["zero2"])
    assert found.exposed == pytest.approx(gathering + last)
    divided = step(replace(FULL_8B, strategy="zero3"), NODE)
    assert divided.exposed == pytest.approx(2 * gathering / 32)


def test_what_is_longer_than_computation_is_waited_for() -> None:
    slow = replace(NODE, gpus=64, network=5e9)
    found = step(replace(LORA_70B, rank=None), slow)
    assert found.exposed == pytest.approx(found.communication - found.computation)
    reduced = step(replace(LORA_8B, rank=4096), slow)
    assert reduced.exposed > 0.5 * reduced.communication


def test_the_table_of_the_documentation_is_what_the_model_says() -> None:
    assert table() in (DOCS / "speed.md").read_text(encoding="utf-8")
    # 16 bytes for each of 70 billion weights are more than eight GPUs hold.
    assert "| 70B, full, FSDP2 | 8 |" not in table()
    assert "| 70B, full, FSDP2 | 64 |" in table()
