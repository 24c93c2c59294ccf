"""The libraries that have a part in a result."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from platform import python_version

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers")


def library_versions() -> dict[str, str]:
    """Version of every library that has a part in a result."""
    found = {"python": python_version()}
    for name in (*LIBRARIES, "finetune-operator"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
