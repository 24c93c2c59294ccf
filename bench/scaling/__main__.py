"""`python -m bench.scaling`: run the table on two GPUs. Results are written as they come."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.scaling.inputs import with_fewer_blocks
from bench.scaling.report import line, lines, ratios
from bench.scaling.settings import BOTH, RUNS, TINY, Run
from bench.trainer.inputs import write_model
from bench.trainer.report import machine
from bench.trainer.shapes import SHAPES

RUN_SECONDS = 110.0
"""Of one run, from the moment at which it has its GPUs."""
COLLECTIVES_SECONDS = 60.0
"""For their rates."""
AHEAD = 3
"""Runs that import what they need while others have the GPUs."""
_POLL_SECONDS = 0.1


@dataclass
class Started:
    """A run whose processes are there."""

    run: Run
    process: subprocess.Popen[bytes]
    file: Path
    went: float | None = None
    """When it was given its GPUs."""

    def is_ready(self) -> bool:
        """Whether it has imported what it needs, or never will."""
        return self.file.with_suffix(".ready").exists() or self.process.poll() is not None

    def go(self) -> None:
        """Let it have its GPUs."""
        self.file.with_suffix(".go").touch()
        self.went = time.monotonic()

    def end(self) -> None:
        """Its launcher's end is that of all its ranks."""
        self.process.kill()
        self.process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write. Returns 1 where a run gave no figures that had a chance to."""
    options = _options(arguments)
    began = time.monotonic()
    runs = [run for run in (TINY if options.cpu else RUNS) if not options.only or run.name in options.only]
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(runs, folder, options.out, cpu=options.cpu, deadline=began + options.limit)
    return bench.run()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("scaling.json"), help="results, written as they come")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench"), help="models, data and logs (%(default)s)")
    parser.add_argument("--only", nargs="*", default=[], metavar="RUN", help=", ".join(run.name for run in RUNS))
    parser.add_argument("--limit", type=float, default=1200.0, metavar="SECONDS", help="for all of it (%(default)s)")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal with tiny models and gloo")
    return parser.parse_args(arguments)


class Bench:
    """Begins runs in their order, each as soon as its GPUs are free, and has the next ones ready."""

    def __init__(self, runs: Sequence[Run], folder: Path, out: Path, *, cpu: bool, deadline: float) -> None:
        self._to_start = list(runs)
        self._folder = folder
        self._out = out
        self._cpu = cpu
        self._deadline = deadline
        self._ready: list[Started] = []
        self._going: list[Started] = []
        self._report: dict[str, Any] = {"machine": None, "results": []}

    def run(self) -> int:
        """All of it."""
        try:
            shapes = [run.setting.shape for run in self._to_start]
            several = any(len(run.gpus) > 1 for run in self._to_start)
            finish_collectives = self._measure_collectives() if several else None
            self._start_ahead()
            self._make_models(shapes)
            if finish_collectives is not None:
                finish_collectives()
            self._write()
            while self._ready or self._going or self._to_start:
                self._turn()
                time.sleep(_POLL_SECONDS)
        finally:
            for started in (*self._going, *self._ready):
                started.end()
        results = self._report["results"]
        for text in lines(ratios(results)):
            sys.stdout.write(text)
        return int(any("error" in result and not _alone_for_the_proof(result, results) for result in results))

    def _make_models(self, shapes: Sequence[str]) -> None:
        for name in dict.fromkeys(shapes):
            whole = name.split("-")[0]
            write_model(self._folder / whole, whole)
            if name != whole:
                with_fewer_blocks(self._folder / name, self._folder / whole, SHAPES[name].blocks)
        self._report["machine"] = about = machine(cpu=self._cpu)
        sys.stdout.write(json.dumps(about) + "\n")

    def _turn(self) -> None:
        """Look at what goes on, and begin what can begin."""
        over = time.monotonic() > self._deadline
        for started in list(self._going):
            assert started.went is not None
            if started.process.poll() is not None:
                self._finish(started, f"exit code {started.process.returncode}")
            elif over or time.monotonic() > started.went + RUN_SECONDS:
                started.end()
                self._finish(started, "the time of the bench is over" if over else f"not done in {RUN_SECONDS:.0f} s")
        if over:
            self._leave_out()
        taken = {gpu for started in self._going for gpu in started.run.gpus}
        if self._ready and taken.isdisjoint(self._ready[0].run.gpus) and self._ready[0].is_ready():
            self._going.append(self._ready.pop(0))
            self._going[-1].go()
        self._start_ahead()

    def _leave_out(self) -> None:
        for started in self._ready:
            started.end()
        for run in (*(started.run for started in self._ready), *self._to_start):
            self._add({**_about(run), "error": "not run: the time of the bench is over"})
        self._ready, self._to_start = [], []

    def _start_ahead(self) -> None:
        while self._to_start and len(self._ready) < AHEAD:
            self._ready.append(self._start(self._to_start.pop(0)))

    def _start(self, run: Run) -> Started:
        """Its processes, which wait."""
        file = self._folder / f"{run.name.replace('/', '--')}.json"
        for old in self._folder.glob(f"{file.stem}.*"):
            old.unlink()
        file.write_text(json.dumps({"run": asdict(run), "folder": str(self._folder)}))
        command = ["worker"] if len(run.gpus) == 1 else ["launch", "worker"]
        return Started(run, self._spawn(command, file, run.gpus), file)

    def _spawn(self, command: Sequence[str], file: Path, gpus: Sequence[int]) -> subprocess.Popen[bytes]:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PET_", "MASTER_", "RANK"))},
            "CUDA_VISIBLE_DEVICES": "" if self._cpu else ",".join(map(str, gpus)),
            "PET_NPROC_PER_NODE": str(len(gpus)),
            "FINETUNE_PEER_GRACE_SECONDS": "3",
        }
        if self._cpu:
            environment["OMP_NUM_THREADS"] = "1"
        module, *rest = command
        with file.with_suffix(".log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"bench.scaling.{module}", *rest, str(file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def _measure_collectives(self) -> Callable[[], None]:
        """While models are made; what is returned waits for it."""
        file = self._folder / "collectives.json"
        file.unlink(missing_ok=True)
        process = self._spawn(["launch", "collectives"], file, BOTH)

        def finish() -> None:
            try:
                process.wait(COLLECTIVES_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            found = _read(file) or {"error": _last_words(file.with_suffix(".log"))}
            self._report["collectives_gb_per_second"] = found
            sys.stdout.write(f"collectives, GB/s: {json.dumps(found)}\n")

        return finish

    def _finish(self, started: Started, otherwise: str) -> None:
        """Take what its ranks wrote."""
        self._going.remove(started)
        assert started.went is not None
        run, file = started.run, started.file
        ranks = [_read(file.with_suffix(f".rank-{rank}.json")) for rank in range(len(run.gpus))]
        errors = [found["error"] for found in ranks if "error" in found]
        result = {**_about(run), "seconds_in_all": round(time.monotonic() - started.went, 1)}
        if "median_seconds" in ranks[0]:
            tokens = run.setting.micro_batch * run.setting.accumulation * run.setting.length * len(run.gpus)
            result |= {
                **ranks[0],
                "peaks_gib": [found.get("peak_gib", 0.0) for found in ranks],
                "tokens_per_step": tokens,
                "tokens_per_second": round(tokens / ranks[0]["median_seconds"], 1),
            }
        else:
            result["error"] = "; ".join(errors) or f"{otherwise}; {_last_words(file.with_suffix('.log'))}"
        self._add(result)

    def _add(self, result: dict[str, Any]) -> None:
        self._report["results"].append(result)
        sys.stdout.write(line(result))
        sys.stdout.flush()
        self._write()

    def _write(self) -> None:
        self._report["ratios"] = ratios(self._report["results"])
        self._out.write_text(json.dumps(self._report, indent=1) + "\n")


def _about(run: Run) -> dict[str, Any]:
    """What a result is of."""
    return {
        "name": run.name,
        "trained": run.trained,
        "gpus": list(run.gpus),
        "parallelism": dict(run.parallelism),
        "blocks": SHAPES[run.setting.shape].blocks,
        "setting": asdict(run.setting),
    }


def _alone_for_the_proof(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> bool:
    """Whether a run shows by its end that one GPU does not hold what several do."""
    larger = [other for other in results if len(other["gpus"]) > 1 and other["blocks"] == result["blocks"]]
    return len(result["gpus"]) == 1 and "OutOfMemoryError" in result["error"] and bool(larger)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _last_words(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["nothing said"])[-1][:300]


if __name__ == "__main__":
    sys.exit(main())
