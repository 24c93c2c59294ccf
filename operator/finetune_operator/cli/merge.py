"""`finetune merge`: the trainer's own program, started with its output on this terminal."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess  # nosec B404  # each call is judged by itself
import sys
from dataclasses import dataclass
from pathlib import Path

from finetune_operator.cli.console import stdout
from finetune_operator.cli.inputs import model_mirror
from finetune_operator.cli.run import RUNS_FOLDER
from finetune_operator.errors import FinetuneError

_MIRROR_VARIABLE = "FINETUNE_MODEL_MIRROR"


@dataclass(frozen=True)
class MergeArguments:
    """The command line."""

    result: str
    output: Path
    into: str
    model: str | None
    format: str
    endpoint: str | None
    model_mirror: Path | None
    trust_remote_code: bool


def merge_command(arguments: MergeArguments) -> int:
    """Make a stand-alone model and show how far it is from the adapter on its base. The exit code."""
    if importlib.util.find_spec("torch") is None:
        raise FinetuneError("merging needs the trainer's libraries: pip install 'finetune-operator[trainer]'")
    command = [sys.executable, "-m", "finetune_trainer.merging", _result(arguments.result)]
    command += ["--into", arguments.into, "--output", str(arguments.output), "--format", arguments.format]
    for name, value in (("--model", arguments.model), ("--endpoint", arguments.endpoint)):
        command += [name, value] if value is not None else []
    command += ["--trust-remote-code"] if arguments.trust_remote_code else []
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    mirror = model_mirror(arguments.model_mirror)
    if mirror is not None:
        environment[_MIRROR_VARIABLE] = str(mirror)
    done = subprocess.run(  # nosec B603  # a list, no shell
        command, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        return 1
    _show(json.loads(done.stdout.splitlines()[-1]))
    return 0


def _result(place: str) -> str:
    """The name of a run of this machine stands for its folder."""
    named = Path(RUNS_FOLDER) / place
    return str(named) if "://" not in place and not Path(place).exists() and named.is_dir() else place


def _show(report: dict[str, object]) -> None:
    console = stdout(patient=True)
    if "into" in report:
        share = 100 * float(str(report["sameFirstChoice"]))
        console.print(
            f"merged into {report['into']}: largest logit difference {float(str(report['largestLogitDifference'])):.3g}"
            f" (largest logit {float(str(report['largestLogit'])):.3g}), {share:.4g} % of next tokens the same",
            highlight=False,
        )
    if "largestDifferenceInOnnxRuntime" in report:
        found = float(str(report["largestDifferenceInOnnxRuntime"]))
        console.print(f"ONNX Runtime: largest logit difference {found:.3g}", highlight=False)
    console.print(f"here: {report['output']}", markup=False, highlight=False, soft_wrap=True)
