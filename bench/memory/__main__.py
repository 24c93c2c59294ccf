"""`python -m bench.memory`: run the table, several jobs at a time where the GPU has room for them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.memory.planned import planned
from bench.memory.report import line, machine, table
from bench.memory.runs import Queue, Run
from bench.memory.settings import TABLE, TINY, Setting
from bench.trainer.inputs import write_model

GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write. Returns 1 where a run failed."""
    options = _options(arguments)
    if options.measured:
        sys.stdout.write(table(json.loads(options.measured.read_text())["results"]))
        return 0
    began = time.monotonic()
    settings = [one for one in (TINY if options.cpu else TABLE) if not options.only or one.name in options.only]
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = machine(cpu=options.cpu)
    sys.stdout.write(json.dumps(about) + "\n")
    results: list[dict[str, Any]] = []
    report = {"machine": about, "results": results}
    room = int(about["gpu_mib"] * 2**20) if not options.cpu else int(options.gpu_gib * GIB)
    queue = Queue([_run(setting, room, folder, options) for setting in settings], room)
    queue.start_some()
    for shape in dict.fromkeys(setting.shape for setting in settings):
        write_model(folder / shape, shape)
    for result in queue.results(until=began + options.limit):
        results.append(result)
        sys.stdout.write(line(result))
        sys.stdout.flush()
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(f"{len(results)} of {len(settings)} settings in {time.monotonic() - began:.0f} s\n")
    sys.stdout.write(table(results))
    return int(any("error" in result for result in results))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("memory.json"), help="results, written as they come")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench"), help="models, data and logs (%(default)s)")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="of the table; default: all")
    parser.add_argument("--explain", nargs="*", metavar="NAME", help="say what was held at the peak; no name: of all")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which nothing goes on (%(default)s)")
    parser.add_argument("--measured", type=Path, help="run nothing: hold these results against today's planner")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal with tiny models")
    parser.add_argument("--gpu-gib", type=float, default=80.0, help="that the rehearsal pretends to have")
    return parser.parse_args(arguments)


def _run(setting: Setting, room: int, folder: Path, options: argparse.Namespace) -> Run:
    plan = planned(setting, room).plan
    told = {
        "setting": asdict(setting),
        "plan": plan.model_dump(mode="json", by_alias=True),
        "folder": str(folder),
        "explain": options.explain is not None and (not options.explain or setting.name in options.explain),
    }
    return Run(setting, plan, folder / f"memory-{setting.name}.json", told, cpu=options.cpu)


if __name__ == "__main__":
    sys.exit(main())
