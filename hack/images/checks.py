"""What must hold of an image by itself: looked at from outside, and from inside as its own user."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from images.container import output
from images.engine import Image
from images.errors import ImageError

COMPILERS = ("gcc", "cc", "g++", "c++", "clang", "nvcc", "as", "ld", "make", "cmake", "pip", "git")
_SHARED = ("tmp", "var/tmp", "run/lock", "var/lock")
"""Everybody may write there, in any Debian."""

_RUNS_AS_ANOTHER = frozenset(
    f"usr/{name}"
    for name in (
        *("bin/chage", "bin/chfn", "bin/chsh", "bin/expiry", "bin/gpasswd", "bin/newgrp", "bin/passwd"),
        *("bin/mount", "bin/su", "bin/umount"),
        *("sbin/pam_extrausers_chkpwd", "sbin/unix_chkpwd"),
    )
)
"""Setuid or setgid in Debian's and Ubuntu's own base (packages passwd, util-linux, mount, libpam-modules-bin)."""

_LOOK = f"""
import importlib.metadata, importlib.util, json, os, shutil, sys
def writes(folder):
    try:
        with open(os.path.join(folder, ".probe"), "w"): pass
        os.remove(os.path.join(folder, ".probe"))
        return True
    except OSError as error:
        return error.strerror
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
sys.stdout.write(json.dumps({{
    "uid": os.getuid(), "groups": os.getgroups(), "python": sys.version.split()[0],
    "capabilities": [status[name].strip() for name in ("CapEff", "CapPrm", "CapBnd")],
    "no_new_privileges": status["NoNewPrivs"].strip(),
    "programs": [name for name in {COMPILERS!r} if shutil.which(name)],
    "packages": sorted((one.name.lower().replace("_", "-").replace(".", "-"), one.version)
                       for one in importlib.metadata.distributions()),
    "writes": {{path: writes(path) for path in sys.argv[1:]}},
    "cached": importlib.util.find_spec("pydantic").cached,
}}))
"""


def inside(image: Image, root: Path, pod: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a process of the pod sees: who it is, what it may write to, which packages and programs there are."""
    (container,) = pod["containers"]
    mounted = [one["mountPath"] for one in container["volumeMounts"] if not one.get("readOnly")]
    where = ["/", "/etc", "/opt/finetune", "/usr/bin", "/var/lib", *mounted]
    found: dict[str, Any] = json.loads(output(image, root, pod, folder, "python", "-c", _LOOK, *where))
    require(found["uid"] == 65532, f"{image.name} runs as {found['uid']}")
    require(found["no_new_privileges"] == "1", "privileges may be gained")
    require(set("".join(found["capabilities"])) == {"0"}, f"capabilities: {found['capabilities']}")
    denied = {path: word for path, word in found["writes"].items() if path not in mounted}
    require(set(denied.values()) == {"Read-only file system"}, f"the root file system is not read-only: {denied}")
    require(all(found["writes"][path] is True for path in mounted), f"not every volume can be used: {found['writes']}")
    return found


def packages(locked: Mapping[str, str], found: Mapping[str, Any]) -> int:
    """The image holds what the lock says, nothing more and nothing less. Returns how many that are."""
    there = {name: version for name, version in found["packages"] if name != "finetune-operator"}
    odd = sorted(set(there.items()) ^ set(locked.items()))
    require(not odd, f"the lock and the image differ: {odd}")
    return len(there)


def byte_code(root: Path) -> int:
    """Every module of ours has byte code that needs no look at the source. Returns how many there are."""
    count = 0
    for source in (root / "opt/finetune/lib").rglob("finetune_*/**/*.py"):
        (compiled,) = (source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")
        flags = int.from_bytes(compiled.read_bytes()[4:8], "little")
        require(flags == 0b01, f"{compiled.name} is compared with its source at each start")
        count += 1
    require(count > 50, f"only {count} modules were found")
    return count


def writable(root: Path, user: int, allowed: tuple[str, ...] = ()) -> None:
    """Nothing in the image belongs to the user or may be written by everybody, and nothing runs as somebody else but
    what the base brings.

    The read-only root makes the first true anyway, and `no_new_privs` the last, for those who have them.
    """
    for path in _files(root):
        name, info = str(path.relative_to(root)), path.lstat()
        if stat.S_ISLNK(info.st_mode) or name in (*_SHARED, *allowed) or name.startswith(("proc/", "sys/", "dev/")):
            continue
        require(info.st_uid != user, f"/{name} belongs to the image's user")
        require(not info.st_mode & stat.S_IWOTH, f"everybody may write to /{name}")
        # On a folder, setgid only says whose its new files are.
        other = stat.S_ISREG(info.st_mode) and info.st_mode & (stat.S_ISUID | stat.S_ISGID)
        require(not other or name in _RUNS_AS_ANOTHER, f"/{name} runs as somebody else")


def _files(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        yield from (Path(folder, name) for name in (*names, *files))


def require(holds: bool, otherwise: str) -> None:
    """Raise ImageError where something does not hold."""
    if not holds:
        raise ImageError(otherwise)
