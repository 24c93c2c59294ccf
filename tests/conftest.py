"""Before any test imports torch: threads that wait must not spin, since tests share two cores with servers."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Neither of them looks at the code: both measure wall time, which on a busy machine is the neighbours'. The first draw
# of a fresh clone, which builds Unicode tables, took three seconds.
settings.register_profile("busy-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy-machine")

SLOWEST_FIRST = (
    "local/test_strategies.py",
    "apiserver/test_faults.py",
    "e2e/test_jobs.py",
    "local/test_fault_sweep.py",
    "chart/test_installed.py",
    "apiserver/test_lifecycle.py",
    "local/test_two_processes.py",
    "local/test_preemption_moments.py",
    "apiserver/test_progress.py",
    "dashboard/test_browser.py",
    "apiserver/test_lost_node.py",
    "unit/fast/test_bench.py",
    "unit/fast/test_bench_scaling.py",
    "local/test_two_processes_methods.py",
    "unit/fast/test_training.py",
    "unit/fast/test_prefix_training.py",
    "local/test_cached_prefix.py",
)
"""Files that take a minute and more: begun last, they would keep one worker busy while the others have nothing to do.
Needs xdist's `--no-loadscope-reorder`, as xdist begins with the files that have the most tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first."""
    items.sort(key=lambda item: _rank(item.path.parts))


def _rank(parts: Sequence[str]) -> int:
    name = "/".join(parts[parts.index("tests") + 1 :] if "tests" in parts else parts)
    return SLOWEST_FIRST.index(name) if name in SLOWEST_FIRST else len(SLOWEST_FIRST)
