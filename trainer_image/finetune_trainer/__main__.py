"""`python -m finetune_trainer --config PATH`: one process of a run, from its configuration to its exit code."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from finetune_trainer import logs, termination
from finetune_trainer.contract import CONFIG_PATH, ExitCode, RunResult, TerminationMessage, TrainerConfig
from finetune_trainer.errors import ConfigError, Preempted, TrainerError, UsageError
from finetune_trainer.explain import PEER_LOST, explain
from finetune_trainer.imports import not_needed, without
from finetune_trainer.preemption import NOTHING_LOST, PEERS_LEFT, StopRequest, heeding_signals

_SHOWN_ERRORS = 5

logger = logging.getLogger("finetune_trainer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, leave the termination message, and return the exit code."""
    rank = _from_env("RANK", 0)
    logs.configure(rank)
    path = termination.path_from_env()
    with heeding_signals(lambda: _end(_fail(Preempted(NOTHING_LOST), path))) as stop:
        try:
            options = _parse(arguments)
        except UsageError as error:
            return _fail(error, path)
        try:
            result = _run(options.config, stop, rank)
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # a process says why it ends, whatever the reason
            if stop.requested and explain(error).reason == PEER_LOST:
                error = Preempted(PEERS_LEFT)
            return _fail(error, path)
        if rank == 0:
            termination.write(_success(result), path)
        return int(ExitCode.OK)


def read_config(path: Path) -> TrainerConfig:
    """Read and check a configuration. Raises ConfigError that names the file, the field and what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"the configuration {path} cannot be read: {why}; name another with --config") from error
    try:
        json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the configuration {path} is not JSON: {error}") from error
    try:
        return TrainerConfig.model_validate_json(text)
    except ValidationError as error:
        found = [
            f"{'.'.join(str(part) for part in item['loc']) or 'the whole'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        ]
        more = f"; and {len(found) - _SHOWN_ERRORS} more" if len(found) > _SHOWN_ERRORS else ""
        raise ConfigError(
            f"the configuration {path} does not fit this trainer ({_version()}): {'; '.join(found[:_SHOWN_ERRORS])}"
            f"{more}; use the trainer image that belongs to the operator"
        ) from error


def _run(config_path: Path, stop: StopRequest, rank: int) -> RunResult:
    config = read_config(config_path)
    # These take seconds to import; a broken configuration is told at once.
    with without(not_needed(config)):
        from finetune_trainer.context import RunContext
        from finetune_trainer.progress import ProgressReporter
        from finetune_trainer.storage import ObjectStore
        from finetune_trainer.train import run
        from finetune_trainer.workspace import Workspace

    world_size = _from_env("WORLD_SIZE", 1)
    local_rank = _from_env("LOCAL_RANK", 0)
    _calm_libraries(world_size)
    logger.info("job %s/%s, attempt %d, rank %d", config.job.namespace, config.job.name, config.job.attempt, rank)
    workspace = Workspace.from_env()
    store = ObjectStore(config.s3)
    with ProgressReporter.from_env() if rank == 0 else ProgressReporter() as progress:
        context = RunContext(
            workspace=workspace,
            store=store,
            progress=progress,
            stop=stop,
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
        )
        result = run(config, context)
        progress.close(completed=True)
    return result


def _calm_libraries(world_size: int) -> None:
    """Keep libraries from doing of their own accord what the run does itself, or does not need."""
    # transformers would report progress a second time, waiting for the answer in the training loop.
    os.environ["DISABLE_KUBEFLOW_INTEGRATION"] = "TRUE"
    if world_size == 1:
        # accelerate makes a process group of one, and wraps the model for it, wherever it finds these.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


def _fail(error: BaseException, path: Path) -> int:
    failure = explain(error)
    known = isinstance(error, TrainerError)
    logger.error("%s: %s", failure.reason, failure.message, exc_info=None if known else error)
    message = TerminationMessage(
        exit_code=int(failure.exit_code),
        reason=failure.reason,
        message=logs.redact(failure.message),
        step=failure.step,
    )
    termination.write(message, path)
    return int(failure.exit_code)


def _success(result: RunResult) -> TerminationMessage:
    message = f"trained {result.trainable_parameters:,} of {result.total_parameters:,} parameters; {result.uri}"
    if result.reused:
        message = f"nothing was trained: {result.uri} is the result of the same spec; output.reuse: false trains again"
    return TerminationMessage(exit_code=int(ExitCode.OK), reason="Completed", message=message, result=result)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.format_usage().strip()}", reason="InvalidArguments")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="finetune_trainer", description="Runs one fine-tuning job.")
    parser.add_argument("--config", type=Path, default=Path(CONFIG_PATH), help="the run's configuration (%(default)s)")
    parser.add_argument("--version", action="version", version=_version())
    return parser.parse_args(arguments)


def _version() -> str:
    try:
        return f"finetune-operator {version('finetune-operator')}"
    except PackageNotFoundError:
        return "finetune-operator, not installed"


def _from_env(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default


def _end(code: int) -> NoReturn:
    if code == ExitCode.OK:
        sys.exit(code)
    # What libraries do at exit may wait for processes that are no longer there: a failed process just ends.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main())
