"""A plan for people: what is trained, where, and how the GPU's memory is filled."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_operator.api.base import quantity_to_bytes
from finetune_operator.api.v1alpha1 import MemoryPerGpu, PlanStatus
from finetune_operator.cli.planned import Planned
from finetune_operator.cli.progress_text import size

_BAR_WIDTH = 40
_BLOCKS_A_ROW = 64
_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "overhead")


def show_plan(console: Console, planned: Planned) -> None:
    """Print a plan."""
    attempt, plan = planned.attempt, planned.attempt.plan
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("job", attempt.job.name)
    table.add_row("method", attempt.spec.method.value)
    table.add_row("model", attempt.spec.model.uri)
    table.add_row("pods", pods_text(plan.nodes, plan.gpus_per_node))
    table.add_row("strategy", f"ZeRO-{plan.zero_stage}" if plan.zero_stage else plan.strategy)
    table.add_row(
        "batch",
        f"{attempt.spec.training.batch_size} = {plan.micro_batch_size} rows x {plan.gradient_accumulation} passes x "
        f"{plan.nodes * attempt.processes_per_node} processes",
    )
    table.add_row("checkpointing", _recomputed(plan))
    if plan.trainable_parameters is not None and plan.total_parameters:
        share = plan.trainable_parameters / plan.total_parameters
        table.add_row("parameters", f"{plan.trainable_parameters:,} trained of {plan.total_parameters:,} ({share:.3%})")
    if planned.block_count is not None:
        table.add_row("blocks", f"{len(planned.blocks)} of {planned.block_count}")
        table.add_row("", blocks_picture(planned.blocks, planned.block_count))
    console.print(table)
    if planned.memory is not None:
        resources = attempt.spec.resources
        of_gpu = resources.gpu_memory or attempt.defaults.gpu_memory_of(resources.gpu_resource)
        limit = of_gpu if plan.gpus_per_node else resources.memory
        console.print(f"\nmemory of a {'GPU' if plan.gpus_per_node else 'pod'}", style="bold")
        console.print(memory_table(planned.memory, quantity_to_bytes(limit)))
    if planned.note:
        console.print(f"\n{planned.note}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _recomputed(plan: PlanStatus) -> str:
    if not plan.gradient_checkpointing:
        return "off"
    if plan.offload_activations:
        return "activations are recomputed from inputs in host memory"
    if plan.recomputed_blocks is None:
        return "activations are recomputed"
    return f"activations of the lowest {plan.recomputed_blocks} of the trained blocks are recomputed"


def pods_text(nodes: int, gpus_per_node: int) -> str:
    """`2 pods with 8 GPUs each`."""
    pods = f"{nodes} pod{'s' if nodes != 1 else ''}"
    if not gpus_per_node:
        return f"{pods} on CPUs"
    return f"{pods} with {gpus_per_node} GPU{'s' if gpus_per_node != 1 else ''}{' each' if nodes != 1 else ''}"


def blocks_picture(selected: Collection[int], count: int) -> str:
    """The decoder blocks from the embeddings (left) to the head, trained ones filled, in rows of 64."""
    marks = "".join("■" if index in selected else "·" for index in range(count))
    return "\n".join(marks[start : start + _BLOCKS_A_ROW] for start in range(0, count, _BLOCKS_A_ROW))


def memory_table(memory: MemoryPerGpu, limit: int) -> Table:
    """Parts of the planned peak as bars; a whole bar is `limit` bytes, what a GPU has."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("part")
    table.add_column("size", justify="right")
    table.add_column(f"of {size(limit)}")
    for part in _PARTS:
        value = getattr(memory, part)
        table.add_row(part, size(value), memory_bar(value, limit))
    table.add_row("total", size(memory.total), memory_bar(memory.total, limit), style="bold")
    return table


def memory_bar(value: int, limit: int) -> Text:
    """A bar as long as `value` is of `limit`, with the share; red where it is longer than the whole."""
    share = value / limit if limit else 0.0
    filled = min(_BAR_WIDTH, round(share * _BAR_WIDTH))
    return Text.assemble(
        ("█" * filled, "red" if share > 1 else "cyan"), ("·" * (_BAR_WIDTH - filled), "dim"), f" {share:6.1%}"
    )
