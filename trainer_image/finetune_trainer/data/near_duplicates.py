"""Rows that resemble an earlier one: MinHash signatures on disk, compared where locality-sensitive hashing says so.

The only module that needs datasketch. Broder 1997, "On the resemblance and containment of documents"; the bands are
those of Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4. Memory is some 40 bytes a row,
however long the rows are; 512 bytes a row lie on the disk meanwhile.
"""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.errors import UsageError

PERMUTATIONS = 128
"""Length of a signature. The similarity that it tells is off by 0.04 (one standard deviation) at most."""
SHINGLE = 5
"""Characters of a shingle: they need no spaces between words, as Chinese, Japanese and Thai have none."""
_REPRESENTATIVES = 64
"""In a bucket, a row is compared with so many different ones: a bucket that holds everything ends as well."""
_WEIGHTS = (0.1, 0.9)
"""Of false positives, which the comparison of signatures rules out, and of false negatives, which nothing mends."""
_HIGHEST = 0.98
"""Above it there would be a single band."""
_CHUNK = 4096
_ODD = np.uint64(0x9E3779B97F4A7C15)

Hashes = npt.NDArray[np.uint32]


class NearDuplicates:
    """Collects rows in their order, then says which of them resemble an earlier one."""

    def __init__(self, threshold: float, folder: Path) -> None:
        """`threshold` is a Jaccard similarity of sets of shingles, 0 to 1. Raises UsageError without datasketch."""
        try:
            from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]
        except ImportError as error:
            raise UsageError(
                "spec.dataset.cleaning.nearDuplicates needs the package datasketch: install "
                "'finetune-operator[trainer]', or leave the field out"
            ) from error
        lsh = MinHashLSH(threshold=min(threshold, _HIGHEST), num_perm=PERMUTATIONS, weights=_WEIGHTS)
        self._bands, self._band_rows = int(lsh.b), int(lsh.r)
        self._empty: Any = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
        self._threshold = threshold
        self._file = tempfile.TemporaryFile(dir=folder)
        self._count = 0

    def add(self, text: str) -> None:
        """The next row, with what is compared of it."""
        sketch = self._empty.copy()
        hashes = shingles(text)
        for start in range(0, len(hashes), _CHUNK):
            sketch.update_batch(hashes[start : start + _CHUNK].tolist())
        self._file.write(sketch.hashvalues.astype("<u4").tobytes())
        self._count += 1

    def matches(self) -> dict[int, int]:
        """Number of each row, from 0, that resembles an earlier one, to the number of that one, which resembles none.

        Only rows that share a band of their signatures are compared, and similarity is what the signatures tell: of
        pairs at the threshold about half are found, of those closer by 0.1 at least 95 %.
        """
        self._file.flush()
        if self._count < 2:
            return {}
        table = np.memmap(self._file, dtype="<u4", mode="r", shape=(self._count, PERMUTATIONS))
        earlier: dict[int, set[int]] = {}
        for band in range(self._bands):
            columns = slice(band * self._band_rows, (band + 1) * self._band_rows)
            for bucket in _buckets(table, columns):
                self._compare(table, bucket, earlier)
        found: dict[int, int] = {}
        for row in sorted(earlier):
            kept = [other for other in earlier[row] if other not in found]
            if kept:
                found[row] = min(kept)
        return found

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def _compare(self, table: Hashes, bucket: npt.NDArray[np.int64], earlier: dict[int, set[int]]) -> None:
        representatives: list[int] = []
        signatures = np.empty((_REPRESENTATIVES, PERMUTATIONS), dtype=np.uint32)
        for row in bucket.tolist():
            signature = np.asarray(table[row])
            alike = (signatures[: len(representatives)] == signature).mean(axis=1) >= self._threshold
            if alike.any():
                earlier.setdefault(row, set()).update(representatives[at] for at in np.flatnonzero(alike))
            elif len(representatives) < _REPRESENTATIVES:
                signatures[len(representatives)] = signature
                representatives.append(row)


def shingles(text: str) -> Hashes:
    """Hashes of the distinct runs of `SHINGLE` characters; case, width and white space do not count."""
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    codes = np.frombuffer(normal.encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    size = min(SHINGLE, len(codes))
    hashes = np.zeros(max(1, len(codes) - size + 1), dtype=np.uint64)
    for offset in range(size):
        hashes = hashes * _ODD + codes[offset : offset + len(hashes)]
    hashes ^= hashes >> np.uint64(32)
    return np.unique((hashes * _ODD >> np.uint64(32)).astype(np.uint32))


def _buckets(table: Hashes, columns: slice) -> Iterator[npt.NDArray[np.int64]]:
    """Rows that agree in these columns of their signatures, two at least, in their order."""
    keys = np.zeros(len(table), dtype=np.uint64)
    for start in range(0, len(table), _CHUNK):
        part = keys[start : start + _CHUNK]
        for column in table[start : start + _CHUNK, columns].T:
            part *= _ODD
            part += column
            part ^= part >> np.uint64(29)
    order = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.append(keys[order][1:] != keys[order][:-1], True)) + 1
    starts = np.append(0, ends[:-1])
    shared = np.flatnonzero(ends - starts > 1)
    for start, end in zip(starts[shared].tolist(), ends[shared].tolist(), strict=True):
        yield order[start:end]
