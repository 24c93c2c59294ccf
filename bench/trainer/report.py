"""What a set of runs says: a table, and the ratio of each run to its peers."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "numpy")
OF_PEERS = ("llamafactory", "liger-kernel", "unsloth", "unsloth-zoo", "xformers", "trl", "datasets")
_SIZE = 8192


def machine(*, cpu: bool) -> dict[str, Any]:
    """Device, versions, and the rate of one large matrix product in bf16, which utilisation is counted against."""
    found: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda, **versions(PACKAGES)}
    if cpu:
        return found | {"device": f"cpu ({platform.machine()})", "product_tflops": None}
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    found |= {"device": torch.cuda.get_device_name(), "driver": driver.stdout.strip()}
    return found | {"product_tflops": round(_product_rate(), 1)}


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """None for what this environment lacks."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _product_rate() -> float:
    """TFLOP/s of an 8192 x 8192 x 8192 product of random numbers; the median of ten."""
    a, b = (torch.randn(_SIZE, _SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        torch.mm(a, b)
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    del a, b
    torch.cuda.empty_cache()
    return float(2 * _SIZE**3 / sorted(times[3:])[5] / 1e12)


def line(result: dict[str, Any], product: float | None) -> str:
    """One run."""
    name = result["setting"]["name"]
    if "error" in result:
        return f"{name:28} {result['error'][:120]}\n"
    share = f"{100 * result['model_tflops'] / product:5.1f} %" if product else "      -"
    return (
        f"{name:28} {result['tokens_per_second']:10,.0f} tok/s  step {1e3 * result['median_seconds']:8.1f} ms"
        f"  peak {result['peak_gib']:6.2f} GiB  MFU {share}  first step {result['first_step_seconds']:6.1f} s"
        f"  losses {result['losses'][0]:.3f} .. {result['losses'][-1]:.3f}\n"
    )


def missing(left_out: Sequence[str]) -> str:
    """Runs of peers whose environment is not there."""
    if not left_out:
        return ""
    return f"left out, for want of a python of the peer's own (--python): {', '.join(left_out)}\n"


def ratios(results: Sequence[dict[str, Any]]) -> str:
    """Tokens a second of every two runs of the same row, one over the other."""
    lines = []
    rows: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if "error" not in result:
            rows.setdefault(result["setting"]["name"].split("/")[0], []).append(result)
    for same in rows.values():
        for one, other in combinations(same, 2):
            names = f"{one['setting']['name']} / {other['setting']['name']}"
            lines.append(f"{names:60} {one['tokens_per_second'] / other['tokens_per_second']:6.2f}\n")
    return "".join(lines)
