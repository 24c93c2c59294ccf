"""Start a program that the kernel kills when its parent ends, however that ends (Linux).

Used as `Popen(die_with_parent.command(os.getpid(), [program, ...]))`. It is a program of its own, rather than a
`preexec_fn`, because Python code between fork and exec may deadlock in a process that has threads.
"""

from __future__ import annotations

import sys

# prctl(2): the signal is sent when the *thread* that started the child ends, so start from one that stays. It
# survives execve(2). A parent that died before the call is noticed by its child's new parent.
_SHIM = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(128 + signal.SIGKILL)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def command(parent: int, program: list[str]) -> list[str]:
    """The command line that runs `program` and ends with process `parent`, which must be the one that starts it."""
    # -I -S: neither the environment nor installed packages may change or slow down the shim.
    return [sys.executable, "-I", "-S", "-c", _SHIM, str(parent), *program]
