"""A step of both Dockerfiles: `python imports.py PACKAGE... [--without PACKAGE...]`.

Imports every module of the packages of this project, and of others the package alone: an image that lacks a library,
or a shared object of one, is not made. What `--without` names must not be there. The standard library only.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import pkgutil
import sys
import time


def modules(package: str) -> list[str]:
    """The package, and where it is this project's, all its modules but those that are programs."""
    found = [package]
    if package.startswith("finetune_"):
        path = importlib.import_module(package).__path__
        found += [one.name for one in pkgutil.walk_packages(path, f"{package}.") if not one.name.endswith("__main__")]
    return found


def main() -> int:
    """Returns the exit status; an import that fails ends it with the traceback."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="+")
    parser.add_argument("--without", nargs="*", default=[])
    arguments = parser.parse_args()
    started = time.monotonic()
    if os.getuid() == 0:
        sys.exit("imports.py: this runs as root; USER has to stand before this step")
    for package in arguments.without:
        if importlib.util.find_spec(package) is not None:
            sys.exit(f"imports.py: {package} is installed, and must not be")
    names = [name for package in arguments.packages for name in modules(package)]
    for name in names:
        importlib.import_module(name)
    sys.stdout.write(f"imported {len(names)} modules in {time.monotonic() - started:.1f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
