"""Tokenized samples on disk: flat arrays and offsets, read through memory maps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.tokenization import BoolArray, Encoded, IntArray
from finetune_trainer.errors import InternalError

IGNORED_LABEL = -100
"""No loss is taken over a token with this label (PyTorch's `cross_entropy`)."""

Index = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array for `numpy.load`. numpy itself does not say when the disk is full."""
    content = io.BytesIO()
    np.save(content, array)
    path.write_bytes(content.getbuffer())


class SampleStore:
    """Every sample of a data set, once: 5 bytes a token, plus 8 a sample."""

    def __init__(self, tokens: IntArray, trained: BoolArray, offsets: Index, labels: Numbers | None = None) -> None:
        self.tokens = tokens
        self.trained = trained
        self.offsets = offsets
        """[samples + 1], where each sample begins in the flat arrays."""
        self.labels = labels
        """[samples], what a sample is judged to be, where samples are judged."""

    @classmethod
    def open(cls, folder: Path) -> SampleStore:
        """Map what a SampleWriter wrote. Raises ValueError or OSError where it is not whole."""
        offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        total = int(offsets[-1])
        tokens = np.memmap(folder / "tokens.i32", dtype="<i4", mode="r", shape=(total,))
        trained = np.memmap(folder / "trained.u8", dtype=np.bool_, mode="r", shape=(total,))
        labels = folder / "labels.npy"
        return cls(tokens, trained, offsets, np.load(labels, allow_pickle=False) if labels.exists() else None)


class SampleWriter:
    """Appends samples to the files of a SampleStore."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokens = (folder / "tokens.i32").open("wb")
        self._trained = (folder / "trained.u8").open("wb")
        self._offsets = [0]

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing writes what is left, and fails where there is no room for it.
        with self._tokens, self._trained:
            pass
        if kind is None:
            save_array(self._folder / "offsets.npy", np.asarray(self._offsets, dtype=np.int64))

    def append(self, sample: Encoded) -> int:
        """Add a sample; its number."""
        self._tokens.write(sample.input_ids.astype("<i4").tobytes())
        self._trained.write(sample.trained.tobytes())
        self._offsets.append(self._offsets[-1] + len(sample.input_ids))
        return len(self._offsets) - 2


class Samples(Sequence[tuple[IntArray, IntArray]]):
    """Samples of a store in an order of their own; one may come several times. Items are `(input_ids, labels)`."""

    def __init__(self, store: SampleStore, index: Index) -> None:
        self._store = store
        self._index = index
        self.lengths: Index = store.offsets[index + 1] - store.offsets[index]
        """[samples], tokens of each."""

    def __len__(self) -> int:
        return len(self._index)

    def where(self, chosen: BoolArray) -> Samples:
        """Those of them that are chosen [samples]."""
        return Samples(self._store, self._index[chosen])

    @property
    def labels(self) -> Numbers:
        """[samples]: the number of the class, the number to predict, or whether an answer was liked (1 or 0)."""
        if self._store.labels is None:
            raise InternalError("samples were asked for labels that they do not have")
        return self._store.labels[self._index]

    @overload
    def __getitem__(self, position: int) -> tuple[IntArray, IntArray]: ...
    @overload
    def __getitem__(self, position: slice) -> Samples: ...
    def __getitem__(self, position: int | slice) -> tuple[IntArray, IntArray] | Samples:
        """`(input_ids [n], labels [n])`; a label is the token itself, or -100 where no loss is taken over it."""
        if isinstance(position, slice):
            return Samples(self._store, self._index[position])
        number = self._index[position]
        part = slice(self._store.offsets[number], self._store.offsets[number + 1])
        input_ids = np.array(self._store.tokens[part], dtype=np.int32)
        return input_ids, np.where(self._store.trained[part], input_ids, np.int32(IGNORED_LABEL))

    def count_tokens(self) -> tuple[int, int]:
        """Tokens, and of these the trained ones, every repetition counted."""
        per_sample = np.add.reduceat(self._store.trained, self._store.offsets[:-1], dtype=np.int64)
        return int(self.lengths.sum()), int(per_sample[self._index].sum())
