"""What the pods of a shared model need in host memory, and who is refused for it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from finetune_operator.errors import DoesNotFit
from finetune_operator.planner import plan
from finetune_operator.planner.host import loading_bytes, memory_for_pod, offloaded_state, pod_needs
from finetune_operator.planner.memory import GIB
from finetune_operator.planner.workload import Layout
from finetune_trainer.contract.vocabulary import Strategy
from tests.unit.planner.models import known, spec, workload

PARAMETERS = 8_030_261_248
"""Of Llama 3.1 8B."""
FSDP = {"parallelism": {"strategy": "fsdp"}}


def planned(**parts: Any) -> Any:
    return plan(spec(**parts), known(), gpu_memory=80 * GIB)


def test_each_process_has_what_it_trains_in_fp32_and_shares_the_rest() -> None:
    layout = Layout(Strategy.FSDP, 8)
    assert loading_bytes(workload(method="full"), layout) == 4 * PARAMETERS
    assert loading_bytes(workload(method="lora"), layout) == 0
    frozen = workload(method="freeze", layers={"last": 2})
    assert loading_bytes(frozen, layout) == 4 * sum(p.size for p in frozen.trained_base)
    quantized = workload(method="qlora")
    assert loading_bytes(quantized, layout) == sum(p.size for p in quantized.quantized) // 2


@pytest.mark.parametrize(
    "layout", [Layout(Strategy.SINGLE), Layout(Strategy.DDP, 8), Layout(Strategy.DEEPSPEED, 8, 2)], ids=str
)
def test_a_model_that_goes_whole_to_the_gpu_is_not_loaded_on_the_host(layout: Layout) -> None:
    assert loading_bytes(workload(method="full"), layout) == offloaded_state(workload(method="full"), layout) == 0


def test_offloaded_state_is_what_the_gpus_do_not_hold() -> None:
    work = workload(method="full")
    # Weights and gradients in 16 bits, the fp32 master, Adam's two moments: 2 + 2 + 4 + 8 bytes (ZeRO, section 3.1).
    everything = offloaded_state(work, Layout(Strategy.DEEPSPEED, 8, 3, True, True))
    assert 8 * everything == pytest.approx(16 * PARAMETERS, rel=1e-6)
    optimizer = offloaded_state(work, Layout(Strategy.DEEPSPEED, 8, 2, True))
    assert 8 * optimizer == pytest.approx(14 * PARAMETERS, rel=1e-6)


def test_pods_share_the_need_with_the_gpus() -> None:
    layout, work = Layout(Strategy.FSDP, 8), workload(method="full")
    one = pod_needs(spec(method="full", resources={"gpus": 8}), work, layout)
    four = pod_needs(spec(method="full", resources={"gpus": 8, "gpusPerNode": 2}), work, layout)
    assert one == 8 * 4 * PARAMETERS == 4 * four


def test_a_pod_that_would_be_killed_while_it_loads_is_refused_with_what_it_needs() -> None:
    with pytest.raises(DoesNotFit) as refused:
        planned(method="full", resources={"gpus": 8}, **FSDP)
    said = str(refused.value)
    assert "239.3 GiB of each pod's memory are taken while its processes load the weights; it has 64Gi" in said
    remedy = re.search(r"resources\.memory: (\w+) \(", said)
    assert remedy is not None and "method: lora (" in said
    found = planned(method="full", resources={"gpus": 8, "memory": remedy[1]}, **FSDP)
    assert found.plan.fits and found.plan.strategy == "fsdp"
    assert any("239.3 GiB of each pod's memory" in note for note in found.notes)
    assert (
        memory_for_pod(spec(method="full", resources={"gpus": 8}), workload(method="full"), Layout(Strategy.FSDP, 8))
        == (remedy[1])
    )


def test_more_gpus_are_no_remedy_where_a_pod_cannot_load_for_them() -> None:
    with pytest.raises(DoesNotFit, match=r"resources\.gpus: 2 \(ZeRO-3, "):
        planned(method="full")
    with pytest.raises(DoesNotFit) as refused:
        planned(method="full", resources={"gpus": 1, "memory": "32Gi"})
    assert "resources.gpus: 4 (ZeRO-2, " in str(refused.value) and "ZeRO-3" not in str(refused.value)
