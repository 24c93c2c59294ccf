"""What the base model says of its licence. It goes into the result, because it binds the tuned model too."""

from __future__ import annotations

from pathlib import Path

import yaml

_CARD = "README.md"
_LONGEST_HEADER = 64 * 1024


def licence_of(folder: Path) -> str | None:
    """From the header of the model's card (`license`, `license_name`, `license_link`), else the name of a licence file.

    None where neither is there, or the card cannot be read: a result does not fail for it.
    """
    header = _header(folder / _CARD)
    named = [str(header[key]) for key in ("license_name", "license", "license_link") if header.get(key)]
    if named:
        return ", ".join(dict.fromkeys(name for name in named if name != "other" or len(named) == 1))
    files = sorted(path.name for path in folder.glob("LICENSE*"))
    return f"see {files[0]} of the base model" if files else None


def _header(card: Path) -> dict[str, object]:
    try:
        with card.open(encoding="utf-8") as opened:
            text = opened.read(_LONGEST_HEADER)
    except (OSError, UnicodeDecodeError):
        return {}
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return header if isinstance(header, dict) else {}
