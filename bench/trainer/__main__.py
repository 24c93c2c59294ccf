"""`python -m bench.trainer`: run the table, one setting after the other, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.trainer.report import line, machine, ratios
from bench.trainer.settings import TABLE, TINY, Setting

LIMIT_SECONDS = 240.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write. Returns 1 where a run failed."""
    options = _options(arguments)
    settings = [s for s in (TINY if options.cpu else TABLE) if _wanted(s, options.only)]
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = machine(cpu=options.cpu)
    sys.stdout.write(json.dumps(about) + "\n")
    results: list[dict[str, Any]] = []
    waiting = _start(settings[0], folder, options) if settings else None
    for number, setting in enumerate(settings):
        process, waiting = waiting, None
        assert process is not None
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        if number + 1 < len(settings):
            waiting = _start(settings[number + 1], folder, options)
        result = _finish(process, setting, folder)
        results.append(result)
        sys.stdout.write(line(result, about["product_tflops"]))
        sys.stdout.flush()
        options.out.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
    sys.stdout.write(ratios(results))
    return int(any("error" in result for result in results))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.trainer", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="results, written as they come")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench"), help="models, data and logs (%(default)s)")
    parser.add_argument("--only", nargs="*", default=[], metavar="ROW[/VARIANT]", help="of the table; default: all")
    parser.add_argument("--trace", nargs="*", default=[], metavar="NAME", help="runs to record one step of")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal with tiny models")
    return parser.parse_args(arguments)


def _wanted(setting: Setting, only: Sequence[str]) -> bool:
    return not only or setting.name in only or setting.row in only


def _start(setting: Setting, folder: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A worker that imports what it needs, and waits."""
    file = _file(setting, folder)
    told = {"setting": asdict(setting), "folder": str(folder), "trace": setting.name in options.trace}
    file.write_text(json.dumps(told))
    file.with_suffix(".result.json").unlink(missing_ok=True)
    environment = dict(os.environ)
    if options.cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with file.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "bench.trainer.worker", str(file)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _file(setting: Setting, folder: Path) -> Path:
    return folder / f"{setting.name.replace('/', '--')}.json"


def _finish(process: subprocess.Popen[bytes], setting: Setting, folder: Path) -> dict[str, Any]:
    """Wait for a worker and read what it wrote."""
    try:
        process.wait(LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return {"setting": asdict(setting), "error": f"not done after {LIMIT_SECONDS:.0f} s"}
    written = _file(setting, folder).with_suffix(".result.json")
    if not written.exists():
        return {"setting": asdict(setting), "error": f"exit code {process.returncode}; see {written.stem}.log"}
    result: dict[str, Any] = json.loads(written.read_text())
    return result


if __name__ == "__main__":
    sys.exit(main())
