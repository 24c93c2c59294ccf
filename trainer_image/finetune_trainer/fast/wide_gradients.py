"""Gradients of trained weights that their product writes in fp32.

Under autocast a weight in fp32 is multiplied in 16 bits, and so is its gradient: rounded to 16 bits by the product,
then read and written once more, as fp32. cuBLAS sums in fp32 anyway and can write that: nothing is rounded, and the
second pass is spared, 4 bytes of traffic for each trained weight and micro-batch. `torch.mm(..., out_dtype=...)` is
there on GPUs alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

_MM = torch.ops.aten.mm
_CONVERT = torch.ops.prims.convert_element_type.default
_DEVICE = "cuda"


class WideGradients(CustomGraphPass):
    """A pass of inductor over the graph of a compiled block, after it was differentiated."""

    def __call__(self, graph: fx.Graph) -> None:
        """Have each product that is only computed to be returned in fp32 write fp32."""
        for node in list(graph.find_nodes(op="call_function", target=_CONVERT)):
            product = node.args[0]
            if not _is_gradient(node, product):
                continue
            with graph.inserting_before(product):
                wide = graph.call_function(_MM.dtype, (*product.args, torch.float32))
            wide.meta = {**product.meta, "val": node.meta["val"]}
            node.replace_all_uses_with(wide)
            graph.erase_node(node)
            graph.erase_node(product)

    def uuid(self) -> Any:
        """Compiled code is kept for graphs that this very file has passed over."""
        return get_hash_for_files((__file__,))


def _is_gradient(node: fx.Node, product: Any) -> bool:
    """Whether `node` is a result of the graph, in fp32, of a product of two matrices in 16 bits on a GPU."""
    if not isinstance(product, fx.Node) or product.target is not _MM.default or len(product.users) > 1:
        return False
    if node.args[1] is not torch.float32 or any(user.op != "output" for user in node.users):
        return False
    value = product.meta["val"]
    return value.device.type == _DEVICE and value.dtype in (torch.bfloat16, torch.float16)
