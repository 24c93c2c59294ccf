"""Which files are data, by their names. Pure."""

from __future__ import annotations

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".txt", ".parquet")
"""What data sets are written as. Nothing else is ever opened: no loading script, no pickle."""
PACKINGS = (".gz", ".zst")
"""What any of them but Parquet, which is packed in itself, may be packed with."""
ENDINGS = {suffix: suffix for suffix in SUFFIXES} | {
    suffix + packing: suffix for suffix in SUFFIXES for packing in PACKINGS if suffix != ".parquet"
}
"""Ending of a name to the suffix that says how the file is written."""
READABLE = f"{', '.join(SUFFIXES)}, all but Parquet also with {' or '.join(PACKINGS)}"
"""For messages."""


def data_suffix(name: str) -> str:
    """The one of `SUFFIXES` that says how a file is written; empty for a file that is no data."""
    return next((suffix for ending, suffix in ENDINGS.items() if name.lower().endswith(ending)), "")
