"""`python -m bench.operator`: the operator beside the floor, in turns, on one real API server; prints a table."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.operator import payload, scenarios
from bench.operator.client import Client
from bench.operator.process import Process
from controlplane import ControlPlane, find_binaries, needed
from finetune_operator.api import crd

CONTENDERS = ("floor", "frameworks", "operator")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="*", default=[100, 1000, 5000], help="jobs at once")
    parser.add_argument("--rounds", type=int, default=3, help="how often each; medians are printed")
    parser.add_argument(
        "--steady", type=int, default=30, metavar="SECONDS", help="of 20 creates a second; 0 leaves out"
    )
    parser.add_argument("--only", choices=CONTENDERS, nargs="*", default=CONTENDERS)
    parser.add_argument("--out", type=Path, help="a JSON file for every figure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / crd.FILE_NAME
        path.write_text(crd.render())
        # The training operator's CRD without the training operator: its part is played by the load.
        known = find_binaries(needed(controller_manager=False, training_operator=True)).pytorchjob_crd
        with ControlPlane(crds=[path, *([known] if known else [])]) as plane:
            results = asyncio.run(_measure(plane.kubeconfig, options))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


async def _measure(kubeconfig: Path, options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        starts = _starts(kubeconfig, Path(folder))
        async with Client(kubeconfig) as client:
            for count in options.counts:
                found = await _bursts(client, starts, count, options)
                results.update(found)
            if options.steady:
                steady: dict[str, list[Any]] = {name: [] for name in options.only}
                for _ in range(options.rounds):
                    for name in options.only:
                        steady[name].append(
                            await scenarios.steady(client, starts[name], a_second=20, seconds=options.steady)
                        )
                        await scenarios.clear(client)
                results["20 creates a second"] = _told("20 creates a second", steady)
    return results


async def _bursts(
    client: Client, starts: dict[str, Callable[[], Process]], count: int, options: argparse.Namespace
) -> dict[str, Any]:
    bursts: dict[str, list[Any]] = {name: [] for name in options.only}
    restarts: dict[str, list[Any]] = {name: [] for name in options.only}
    for _ in range(options.rounds):
        for name in options.only:
            bursts[name].append(await scenarios.burst(client, starts[name], count))
            restarts[name].append(await scenarios.restart(client, starts[name]))
            await scenarios.clear(client)
    return {
        f"{count} at once": _told(f"{count} at once", bursts),
        f"restart with {count} finished": _told(f"restart with {count} finished", restarts),
    }


def _starts(kubeconfig: Path, folder: Path) -> dict[str, Callable[[], Process]]:
    template = folder / "template.json"
    template.write_text(json.dumps(payload.template()))
    common = {"KUBECONFIG": str(kubeconfig)}
    floor = {**common, "FLOOR_TEMPLATE": str(template)}
    operator = {
        **common,
        "FINETUNE_METRICS_PORT": "0",
        "FINETUNE_PROGRESS_PORT": "0",
        "FINETUNE_LISTEN_ADDRESS": "127.0.0.1",
    }
    return {
        "floor": lambda: Process([sys.executable, "-m", "bench.operator.floor"], floor, "ready"),
        "frameworks": lambda: Process([sys.executable, "-m", "bench.operator.frameworks"], floor, "ready"),
        "operator": lambda: Process([sys.executable, "-m", "finetune_operator.main"], operator, '"watching"'),
    }


def _told(title: str, found: dict[str, list[Any]]) -> dict[str, Any]:
    """Print the medians and the ratio to the floor; return every figure."""
    tables = {name: [scenarios.rows(one) for one in results] for name, results in found.items()}
    columns = list(next(iter(tables.values()))[0])
    medians = {name: {c: statistics.median(row[c] for row in rows) for c in columns} for name, rows in tables.items()}
    sys.stdout.write(f"\n{title}\n{'':24}" + "".join(f"{column:>14}" for column in columns) + "\n")
    for name, row in medians.items():
        sys.stdout.write(f"{name:24}" + "".join(f"{row[column]:>14.1f}" for column in columns) + "\n")
    for name in [name for name in medians if name != "floor" and "floor" in medians]:
        ratios = [medians[name][column] / max(1e-9, medians["floor"][column]) for column in columns]
        sys.stdout.write(f"{f'{name} / floor':24}" + "".join(f"{ratio:>14.2f}" for ratio in ratios) + "\n")
    for name, results in found.items():
        asked = getattr(results[-1], "requests", None)
        if asked is not None:
            sys.stdout.write(f"{name} asked: " + ", ".join(f"{what} {n}" for what, n in asked.items()) + "\n")
    sys.stdout.flush()
    return {"rows": tables, "medians": medians}


if __name__ == "__main__":
    main()
