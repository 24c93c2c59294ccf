"""A stand-alone model as GGUF. The format belongs to llama.cpp, whose own converter writes it."""

from __future__ import annotations

import os
import shutil
import subprocess  # nosec B404  # each call is judged by itself
import sys
from pathlib import Path

from finetune_trainer.errors import UsageError

CONVERTER = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP"
FILE = "model.gguf"
_LAST_LINES = 12


def find_converter() -> Path:
    """llama.cpp's converter: in the folder that `LLAMA_CPP` names, or on the PATH.

    Raises UsageError that says where to get it.
    """
    named = os.environ.get(VARIABLE)
    if named:
        found = Path(named) / CONVERTER
        if not found.is_file():
            raise UsageError(f"{VARIABLE}={named}: there is no {CONVERTER} in it; name a checkout of llama.cpp")
        return found
    on_path = shutil.which(CONVERTER)
    if on_path is None:
        raise UsageError(
            f"--format gguf needs {CONVERTER} of llama.cpp, which no package carries: check out llama.cpp and set"
            f" {VARIABLE} to its folder"
        )
    return Path(on_path)


def export_gguf(model: Path, folder: Path, converter: Path) -> None:
    """Convert a saved model to `model.gguf`, its tensors in the type that they are stored in.

    Raises UsageError with the converter's own last words where it does not know the architecture.
    """
    command = [sys.executable, str(converter), str(model), "--outfile", str(folder / FILE), "--outtype", "auto"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # nosec B603  # a list
    if done.returncode != 0 or not (folder / FILE).is_file():
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-_LAST_LINES:])
        raise UsageError(f"--format gguf: {converter.name} could not convert this model:\n{last}")
