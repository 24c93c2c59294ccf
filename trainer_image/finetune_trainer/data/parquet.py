"""Rows of a Parquet file, and bytes of one that is packed with Zstandard. The only module that needs pyarrow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_trainer.data.rows import MAX_ROW_BYTES, Row, too_long
from finetune_trainer.errors import DataError, InputMissing, UsageError

_BATCH_ROWS = 32
"""Decoded at the same time. A file may say the same text a thousand times in a few bytes."""
_OF_A_NEST = 8
"""Bytes of a list or an object besides what is in it."""


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
    """Rows in file order, a few in memory at a time.

    Raises UsageError where pyarrow is not installed, DataError where the file is not Parquet, or not of rows.
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
            _check_row_groups(path, file.metadata)
            _check_types(path, file.schema_arrow)
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for part in _parts(batch):
                    if _written_out(part) > MAX_ROW_BYTES:
                        number += 1
                        yield Row(path.name, number, None, too_long())
                        continue
                    for value in part.to_pylist():
                        number += 1
                        yield Row(path.name, number, {name: _without_nulls(item) for name, item in value.items()})
    except (pyarrow.ArrowException, ValueError, TypeError, KeyError, OverflowError) as error:
        # The others come from extension types that some library has registered, for what a file says of its columns,
        # and from dates that Python has no year for.
        raise DataError(f"data file {path.name} is not a readable Parquet file: {error}") from error
    except OSError as error:
        if path.is_file():
            raise DataError(f"data file {path.name} is not a readable Parquet file: {error}") from error
        raise InputMissing(f"data file {path.name} cannot be read: {error}; check spec.dataset.sources") from error


def _without_nulls(value: Any) -> Any:
    """An object without the keys that only those of other rows have: in Arrow all have the same, and null stands where
    there was none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _check_row_groups(path: Path, metadata: Any) -> None:
    """A column's page is unpacked whole, so that one of a few thousand rows has to be small."""
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if group.total_byte_size > MAX_ROW_BYTES * max(1, group.num_rows):
            raise DataError(
                f"data file {path.name} has {group.num_rows} rows of {group.total_byte_size / 2**20:,.0f} MiB in row"
                f" group {index}; a row may have {MAX_ROW_BYTES // 2**20} MiB"
            )


def _check_types(path: Path, schema: Any) -> None:
    """Arrow ends the process where a library's own type is stored as a dictionary."""
    import pyarrow

    for field in schema:
        for own in _within(field.type):
            if isinstance(own, pyarrow.BaseExtensionType) and any(map(pyarrow.types.is_dictionary, _within(own))):
                raise DataError(
                    f"data file {path.name}: column {field.name} has the type {own}, a dictionary by another name,"
                    " which cannot be read; write the column as plain text"
                )


def _within(kind: Any) -> Iterator[Any]:
    """A type and those of its parts."""
    import pyarrow

    yield kind
    if isinstance(kind, pyarrow.BaseExtensionType):
        yield from _within(kind.storage_type)
    for index in range(kind.num_fields):
        yield from _within(kind.field(index).type)


def _parts(batch: Any) -> Iterator[Any]:
    """The whole batch, or its rows one by one where they are large: as Python objects they take several times as
    much."""
    if _written_out(batch) <= MAX_ROW_BYTES:
        yield batch
    else:
        yield from (batch.slice(row, 1) for row in range(batch.num_rows))


def _written_out(batch: Any) -> int:
    """Bytes of its rows. Arrow's `nbytes` counts all values of a dictionary, even those that no row names, and each
    of them once, however many rows name it."""
    return sum(_size(column) for column in batch.columns)


def _size(array: Any) -> int:
    import pyarrow

    if isinstance(array, pyarrow.ExtensionArray):
        return _size(array.storage)
    if pyarrow.types.is_dictionary(array.type):
        # Counted before any of it is repeated: a row may be a list that names a long value a million times.
        indices, counts = array.indices.value_counts().flatten()
        named = zip(indices.to_pylist(), counts.to_pylist(), strict=True)
        repeated = sum(_length(array.dictionary, index) * times for index, times in named)
        return int(array.indices.nbytes + repeated)
    if pyarrow.types.is_string_view(array.type) or pyarrow.types.is_binary_view(array.type):
        # Of these, too, a slice counts what all of them share.
        return int(array.cast(pyarrow.large_binary()).nbytes)
    if not array.type.num_fields:
        return int(array.nbytes)
    if pyarrow.types.is_map(array.type):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        parts = [part.slice(first, last - first) for part in (array.keys, array.items)]
    else:
        parts = array.flatten()
    return _OF_A_NEST * len(array) + sum(_size(part) for part in (parts if isinstance(parts, list) else [parts]))


def _length(dictionary: Any, index: int | None) -> int:
    """Bytes of a value; only those of texts and of bytes come as dictionaries from a Parquet file."""
    buffer = None if index is None else dictionary[index].as_buffer()
    return 0 if buffer is None else int(buffer.size)
