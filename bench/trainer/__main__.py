"""`python -m bench.trainer`: run the table, one setting after the other, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.trainer.report import line, machine, missing, ratios
from bench.trainer.settings import OWN_PYTHON, TABLE, TINY, Setting

LIMIT_SECONDS = 240.0
ROOT = Path(__file__).absolute().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write. Returns 1 where a run failed."""
    options = _options(arguments)
    pythons = dict(options.python)
    wanted = [s for s in (TINY if options.cpu else TABLE) if _wanted(s, options.only)]
    settings = [s for s in wanted if s.peer not in OWN_PYTHON or s.peer in pythons]
    left_out = [s.name for s in wanted if s not in settings]
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = machine(cpu=options.cpu)
    sys.stdout.write(json.dumps(about) + "\n" + missing(left_out))
    results: list[dict[str, Any]] = []
    report = {"machine": about, "left_out": left_out, "results": results}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    waiting = _start(settings[0], folder, options) if settings else None
    for number, setting in enumerate(settings):
        process, waiting = waiting, None
        assert process is not None
        _go(process)
        if number + 1 < len(settings):
            waiting = _start(settings[number + 1], folder, options)
        result = _finish(process, setting, folder)
        results.append(result)
        sys.stdout.write(line(result, about["product_tflops"]))
        sys.stdout.flush()
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(ratios(results))
    return int(any("error" in result for result in results))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.trainer", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="results, written as they come")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench"), help="models, data and logs (%(default)s)")
    parser.add_argument("--only", nargs="*", default=[], metavar="ROW[/VARIANT]", help="of the table; default: all")
    parser.add_argument(
        "--python",
        nargs="*",
        default=[],
        type=_python,
        metavar="PEER=PYTHON",
        help=f"of the environments of {' and '.join(OWN_PYTHON)}; their rows are left out without",
    )
    parser.add_argument("--trace", nargs="*", default=[], metavar="NAME", help="runs to record one step of")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal with tiny models")
    return parser.parse_args(arguments)


def _python(text: str) -> tuple[str, str]:
    """A peer, and the python that it is run by."""
    peer, _, python = text.partition("=")
    if peer not in OWN_PYTHON:
        raise argparse.ArgumentTypeError(f"{peer}: no peer with an environment of its own; use {', '.join(OWN_PYTHON)}")
    if not os.access(python, os.X_OK):
        raise argparse.ArgumentTypeError(f"{peer}: no program at {python or '(nothing)'}")
    return peer, os.path.abspath(python)


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
    python = dict(options.python).get(setting.peer, sys.executable)
    if setting.peer in OWN_PYTHON:
        environment |= _apart(folder)
    with file.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [python, "-m", "bench.trainer.worker", str(file)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _go(process: subprocess.Popen[bytes]) -> None:
    """The line that a worker waits for. One that ended during its imports is told nothing."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(b"\n")
        process.stdin.flush()
    with suppress(BrokenPipeError):
        process.stdin.close()


def _apart(folder: Path) -> dict[str, str]:
    """A peer sees the bench and nothing else of ours, keeps its files here, and asks nobody."""
    caches = folder / "caches"
    folders = {
        name: caches / name.lower() for name in ("HF_HOME", "TMPDIR", "TRITON_CACHE_DIR", "UNSLOTH_COMPILE_LOCATION")
    }
    for path in folders.values():
        path.mkdir(parents=True, exist_ok=True)
    switches = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    return {"PYTHONPATH": str(ROOT), **switches, **{name: str(path) for name, path in folders.items()}}


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
        log = _file(setting, folder).with_suffix(".log")
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing said"])[-1]
        return {"setting": asdict(setting), "error": f"exit code {process.returncode}; {log.name}: {last[:300]}"}
    result: dict[str, Any] = json.loads(written.read_text())
    return result


if __name__ == "__main__":
    sys.exit(main())
