from __future__ import annotations

import pytest

from finetune_operator.local.gpus import Gpu, GpuPool, parse_gpus, requested_gpus, visible
from tests.unit.local.objects import Manifest, container, pod

GPUS = (Gpu(0, 1, "GPU-5d8a-11"), Gpu(1, 1, "GPU-77c0-12"), Gpu(2, 1))


def asking(count: object) -> Manifest:
    return pod(container("x", resources={"limits": {"nvidia.com/gpu": count}}))


def test_nvidia_smi_is_read() -> None:
    text = "0, 81559\n1, 40960 MiB\nNo devices were found\n\n"
    assert parse_gpus(text) == (Gpu(0, 81559 * 2**20), Gpu(1, 40960 * 2**20))
    assert parse_gpus("0, 81559, GPU-5d8a-11\n") == (Gpu(0, 81559 * 2**20, "GPU-5d8a-11"),)


@pytest.mark.parametrize(
    ("mask", "left"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("1", [1]),
        ("2, 0", [0, 2]),
        ("-1", []),
        ("GPU-abc", []),
        ("GPU-77c0-12", [1]),
        ("GPU-77c0", [1]),
        ("2,GPU-5d8a-11", [0, 2]),
        ("GPU-", []),
    ],
)
def test_a_mask_of_our_own_is_respected(mask: str | None, left: list[int]) -> None:
    assert [gpu.index for gpu in visible(GPUS, mask)] == left


def test_gpus_are_handed_out_until_none_is_left() -> None:
    pool = GpuPool(GPUS, "nvidia.com/gpu")
    assert pool.take("a", asking("2")) == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert pool.take("b", asking(2)) is None
    assert pool.take("c", asking("1")) == {"CUDA_VISIBLE_DEVICES": "2"}
    pool.release("a")
    assert pool.take("b", asking("1")) == {"CUDA_VISIBLE_DEVICES": "0"}
    pool.release("unknown")


def test_a_pod_that_asks_for_none_sees_none() -> None:
    assert GpuPool(GPUS, "nvidia.com/gpu").take("a", pod(container("x"))) == {"CUDA_VISIBLE_DEVICES": ""}


def test_without_gpus_every_pod_runs_on_the_cpu() -> None:
    assert GpuPool((), "nvidia.com/gpu").take("a", asking("8")) == {}


def test_only_the_named_resource_counts() -> None:
    assert requested_gpus(asking("2"), "amd.com/gpu") == 0
    two = pod(*asking("2")["spec"]["containers"], *asking("1")["spec"]["containers"])
    assert requested_gpus(two, "nvidia.com/gpu") == 3
