"""Which products of a compiled block's graph write fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from finetune_trainer.fast import compilation, wide_gradients
from finetune_trainer.fast.wide_gradients import WideGradients
from tests.compiling import compile_by
from tests.tiny_models import tiny_model

MM = torch.ops.aten.mm
CONVERT = torch.ops.prims.convert_element_type.default


def graph_of(function: Any, device: str, dtype: torch.dtype = torch.bfloat16) -> fx.Graph:
    """Of two matrices on a device that need not be there."""
    with FakeTensorMode():
        given = (torch.empty(8, width, dtype=dtype, device=device) for width in (4, 6))
        graph: fx.Graph = make_fx(function)(*given).graph
    return graph


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.target in (MM.default, MM.dtype, CONVERT)]


def gradient(gradients: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    wide: torch.Tensor = CONVERT(torch.mm(gradients.t(), inputs), torch.float32)
    return wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_that_is_returned_in_fp32_writes_it(dtype: torch.dtype) -> None:
    graph = graph_of(gradient, "cuda", dtype)

    WideGradients()(graph)

    graph.lint()
    assert targets(graph) == [MM.dtype]
    (result,) = (node.args[0] for node in graph.nodes if node.op == "output")
    assert result.args[1:] == (result.args[1], torch.float32)
    assert result.meta["val"].dtype is torch.float32
    assert result.meta["val"].shape == (4, 6)


def used_twice(gradients: torch.Tensor, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    product = torch.mm(gradients.t(), inputs)
    return CONVERT(product, torch.float32), product


def used_further(gradients: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return gradient(gradients, inputs) * 2


def narrowed(gradients: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    narrow: torch.Tensor = CONVERT(torch.mm(gradients.t(), inputs), torch.float16)
    return narrow


def no_product(gradients: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    del inputs
    wide: torch.Tensor = CONVERT(gradients, torch.float32)
    return wide


@pytest.mark.parametrize("function", [used_twice, used_further, narrowed, no_product])
def test_other_products_stay_as_they_are(function: Any) -> None:
    graph = graph_of(function, "cuda")
    before = str(graph)

    WideGradients()(graph)

    assert str(graph) == before


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_where_there_is_no_such_product_none_is_asked_for(device: str, dtype: torch.dtype) -> None:
    graph = graph_of(gradient, device, dtype)
    before = str(graph)

    WideGradients()(graph)

    assert str(graph) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gradients_of_all_trained_matrices_of_a_block_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their form in the graph is torch's own affair, and the same on a CPU, which has no such product."""
    seen: list[tuple[int, ...]] = []

    def look(module: fx.GraphModule, _inputs: Any) -> Any:
        for node in module.graph.find_nodes(op="call_function", target=CONVERT):
            if wide_gradients._is_gradient(node, node.args[0]):
                seen.append(tuple(node.meta["val"].shape))
        return make_boxed_func(module.forward)

    def split(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, inputs, **options)

    monkeypatch.setattr(wide_gradients, "_DEVICE", "cpu")
    # What inductor does to a graph until it makes code of it.
    table = select_decomp_table()
    compile_by(monkeypatch, aot_autograd(fw_compiler=look, bw_compiler=look, partition_fn=split, decompositions=table))
    model = tiny_model().train().requires_grad_(False)
    block = model.model.layers[1].requires_grad_(True)
    with compilation.compiled([block], draws=False), torch.autocast("cpu", dtype=torch.bfloat16):
        model.model(torch.arange(16)[None]).last_hidden_state.float().sum().backward()

    trained = [parameter for parameter in block.parameters() if parameter.dim() == 2]
    assert len(trained) == 7
    assert sorted(seen) == sorted(tuple(parameter.shape) for parameter in trained)
