"""Rows of a Parquet file, and bytes of one that is packed with Zstandard. The only module that needs pyarrow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from finetune_trainer.data.rows import Row
from finetune_trainer.errors import DataError, InputMissing, UsageError

_BATCH_ROWS = 256


def open_zstandard(path: Path, buffer: int) -> io.BufferedReader:
    """The unpacked bytes. Raises UsageError where pyarrow is not installed, OSError where the data are damaged."""
    try:
        import pyarrow  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageError(
            f"data file {path.name} is packed with Zstandard, which needs the package pyarrow: install "
            "'finetune-operator[trainer]', or pack the file with gzip"
        ) from error
    return io.BufferedReader(pyarrow.CompressedInputStream(path.open("rb"), "zstd"), buffer)


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows in file order, a few hundred in memory at a time.

    Raises UsageError where pyarrow is not installed, DataError where the file is not Parquet.
    """
    try:
        import pyarrow
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageError(
            f"data file {path.name} is Parquet, which needs the package pyarrow: install 'finetune-operator[trainer]', "
            "or convert the file to JSON Lines"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(path.name, number, value)
    except (pyarrow.ArrowException, ValueError, TypeError, KeyError) as error:
        # The others come from extension types that some library has registered, for what a file says of its columns.
        raise DataError(f"data file {path.name} is not a readable Parquet file: {error}") from error
    except OSError as error:
        if path.is_file():
            raise DataError(f"data file {path.name} is not a readable Parquet file: {error}") from error
        raise InputMissing(f"data file {path.name} cannot be read: {error}; check spec.dataset.sources") from error
