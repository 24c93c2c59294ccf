"""The termination message: one file for all processes of a node, in which the first failure stays."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from finetune_trainer.contract import ExitCode, TerminationMessage

PATH_VARIABLE = "FINETUNE_TERMINATION_LOG"
DEFAULT_PATH = "/dev/termination-log"

logger = logging.getLogger(__name__)


def path_from_env() -> Path:
    """Where the message goes: what `FINETUNE_TERMINATION_LOG` names, by default the kubelet's file."""
    return Path(os.environ.get(PATH_VARIABLE) or DEFAULT_PATH)


def write(message: TerminationMessage, path: Path) -> bool:
    """Write the message unless a failure stands there already. Returns whether it was written.

    A failure takes the place of a success: then another process ended badly after rank 0 had finished, and the message
    has to agree with the exit code. The file itself is locked, since it may lie where no other can be created. Never
    raises: without the file, the exit code still tells what kind of failure it was.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        logger.warning("the termination message cannot be written to %s: %s", path, error.strerror)
        return False
    try:
        with os.fdopen(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = file.read()
            earlier = TerminationMessage.decode(text.decode(errors="replace"))
            if text and (earlier is None or earlier.exit_code != ExitCode.OK or message.exit_code == ExitCode.OK):
                return False
            file.seek(0)
            file.write(message.encode().encode())
            file.truncate()
            return True
    except OSError as error:
        logger.warning("the termination message cannot be written to %s: %s", path, error.strerror)
        return False
