"""The container's entry point again and again, without its imports: these take longer than all that a test looks at.

`python -m tests.local.warm_launcher` reads a launch from each line of its input (`tests.local.pod` writes them), says
the process id of its launcher, and then how that ended. Launcher and ranks are processes as in a pod; only, a rank is
forked where it would be executed. One that a moment names sends SIGTERM, to itself or to the launcher, in that moment.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import torch

from finetune_trainer import __main__ as trainer
from finetune_trainer import launch, train
from finetune_trainer.preemption import StopRequest
from tests.local import strategy_worker

assert train, "imported for the ranks that come"

_PATIENCE_SECONDS = 20.0
_MOMENT = "MOMENT"


def interrupt_at(place: str, call: int, everybody: bool) -> None:
    """Let the n-th call (from 1) of a function, `module:name` or `module:Class.name`, begin with a signal.

    everybody: the launcher gets it, and passes it on; otherwise this process alone.
    """
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            if name == "backward":
                # Not before it, but within.
                arguments[0].register_hook(lambda gradient: terminate(everybody))
            else:
                terminate(everybody)
        return original(*arguments, **options)

    setattr(owner, name, interrupted)


def terminate(everybody: bool) -> None:
    """Send SIGTERM, and go on when it has come."""
    request = cast(StopRequest, signal.getsignal(signal.SIGTERM).__self__)  # type: ignore[union-attr]
    os.kill(os.getppid() if everybody else os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not request.requested:
        assert time.monotonic() < deadline, "the signal did not come back"
        time.sleep(0.002)


def fork(
    path: str,
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    file_actions: Sequence[tuple[int, int, int]],
    setpgroup: int,
    setsigdef: Sequence[int],
) -> int:
    """What `os.posix_spawn` does, for a program that is imported already."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, setpgroup)
        die_with(parent)
        signal.set_wakeup_fd(-1)
        for number in setsigdef:
            signal.signal(number, signal.SIG_DFL)
        for _, source, target in file_actions:
            os.dup2(source, target)
        for name in os.listdir("/proc/self/fd"):
            try:
                if not os.get_inheritable(int(name)):
                    os.close(int(name))
            except OSError:  # the folder's own
                continue
        os.environ.clear()
        os.environ.update(environment)
        moment = json.loads(environment[_MOMENT])
        if moment is not None and int(environment["RANK"]) == moment["rank"]:
            interrupt_at(moment["place"], moment["call"], moment["everybody"])
        # After the program between fork and exec, the interpreter and -m.
        module, *arguments = argv[argv.index("-m") + 1 :]
        if module == strategy_worker.__name__:
            strategy_worker.main(arguments)
            os._exit(0)
        trainer._end(trainer.main(arguments))
    except SystemExit as ended:
        os._exit(int(ended.code or 0))
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def die_with(parent: int) -> None:
    """Let the kernel (prctl, PR_SET_PDEATHSIG) kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def carry_out(wanted: Mapping[str, Any], parent: int) -> NoReturn:
    """Be the launcher of one run."""
    die_with(parent)
    log = os.open(Path(wanted["folder"]) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for target in (1, 2):
        os.dup2(log, target)
    os.environ.clear()
    os.environ.update({**wanted["environment"], _MOMENT: json.dumps(wanted["moment"])})
    os.posix_spawn = fork  # type: ignore[assignment]
    code = 1
    try:
        code = launch.main(wanted["arguments"], program=[sys.executable, "-m", wanted["module"]])
    finally:
        sys.stderr.flush()
        os._exit(code)


def say(number: int) -> None:
    """Answer the one who started this."""
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def main() -> None:
    """Until the input ends."""
    die_with(os.getppid())
    torch.set_num_threads(1)
    own = os.getpid()
    for line in sys.stdin:
        wanted = json.loads(line)
        pid = os.fork()
        if not pid:
            carry_out(wanted, own)
        say(pid)
        say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    main()
