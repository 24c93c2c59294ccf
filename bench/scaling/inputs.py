"""One model's files, and others that are its lower blocks."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

_INDEX = "model.safetensors.index.json"
_BLOCK = re.compile(r"\.layers\.(\d+)\.")


def with_fewer_blocks(folder: Path, whole: Path, blocks: int) -> Path:
    """The lowest blocks of a model, with its embeddings and head: links to its files, and an index of what is used of
    them. What else is in a file is not read."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    index = json.loads((whole / _INDEX).read_text())
    weights = {name: shard for name, shard in index["weight_map"].items() if _used(name, blocks)}
    for path in whole.iterdir():
        if path.name in weights.values():
            os.link(path, folder / path.name)
        elif path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    (folder / _INDEX).write_text(json.dumps({**index, "weight_map": weights}))
    config = json.loads((whole / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
    return folder


def _used(name: str, blocks: int) -> bool:
    found = _BLOCK.search(name)
    return found is None or int(found[1]) < blocks
