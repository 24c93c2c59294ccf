"""What a set of runs says about the planner."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from bench.memory.planned import predicted
from bench.memory.settings import Setting
from bench.trainer.report import PACKAGES, versions
from finetune_operator.api.v1alpha1 import PlanStatus

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "overhead")
HIGHEST, LOWEST = 1.10, 0.95
"""What a prediction may be of what was measured."""


def machine(*, cpu: bool) -> dict[str, Any]:
    """Device and versions."""
    found: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda, **versions(PACKAGES)}
    if cpu:
        return found | {"device": f"cpu ({platform.machine()})"}
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    name, driver, memory = (part.strip() for part in told.split(","))
    return found | {"device": name, "driver": driver, "gpu_mib": float(memory)}


def line(result: dict[str, Any]) -> str:
    """One run."""
    name = result["setting"]["name"]
    if "error" in result:
        return f"{name:32} {result['error'][:160]}\n"
    parts, allocated = _predicted(result)
    peak = result["peak_bytes"]
    return (
        f"{name:32} predicted {allocated / GIB:6.2f}  measured {peak / GIB:6.2f}  ratio {_ratio(allocated, peak):>6}"
        f"  reserved {result['reserved_bytes'] / GIB:6.2f}  loading {result['loading_bytes'] / GIB:6.2f}"
        f"  base {result['base_bytes'] / GIB:6.2f}  seconds {result['start_seconds']} + {sum(result['seconds']):.1f}  "
        + " ".join(f"{part} {getattr(parts, part) / GIB:.2f}" for part in PARTS)
        + "\n"
    )


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: what was measured, and what the planner says of the same job now."""
    head = "| job | shape | rows x length | recomputed | compiled | predicted GiB | measured GiB | ratio |\n"
    lines = [head, "| --- " * 8 + "|\n"]
    good = []
    for result in results:
        if "error" in result or not result["peak_bytes"]:
            continue
        setting, plan = result["setting"], PlanStatus.model_validate(result["plan"])
        _, allocated = _predicted(result)
        ratio = allocated / result["peak_bytes"]
        good.append(LOWEST <= ratio <= HIGHEST)
        rows = f"{plan.micro_batch_size} x {setting['length']}"
        lines.append(
            f"| {setting['name'].split('-')[0]}{'' if good[-1] else ' (!)'} | {setting['shape'].upper()} | {rows} "
            f"| {_recomputed(plan)} | {'yes' if setting['compiled'] else 'no'} "
            f"| {allocated / GIB:.2f} | {result['peak_bytes'] / GIB:.2f} | {ratio:.3f} |\n"
        )
    return "".join(lines) + f"\n{sum(good)} of {len(good)} between {LOWEST} and {HIGHEST}\n"


def _recomputed(plan: PlanStatus) -> str:
    if not plan.gradient_checkpointing:
        return "no"
    if plan.offload_activations:
        return "offloaded"
    return "yes" if plan.recomputed_blocks is None else f"{plan.recomputed_blocks} blocks"


def _predicted(result: dict[str, Any]) -> tuple[Any, int]:
    return predicted(Setting(**result["setting"]), PlanStatus.model_validate(result["plan"]))


def _ratio(allocated: int, peak: int) -> str:
    return f"{allocated / peak:.3f}" if peak else "-"
