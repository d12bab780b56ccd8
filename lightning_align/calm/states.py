"""A store of an augment's hidden states on disk. A row's states are computed once and read from the file afterwards."""

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_align.calm.reading import Reader
from lightning_align.calm.spec import AugmentInput, check_realigned
from lightning_align.runtime.checksums import sealed, unsealed
from lightning_align.runtime.files import not_written, publish_text
from lightning_align.runtime.ranks import world


class StateStore:
    """The hidden states of rows, keyed by the token ids of a row and the identity of the model.

    Each rank has its own files. The data file grows by whole rows. `flush` writes the index file after the rows. If a run is
    killed, the rows that are not in the index are computed again.

    Args:
        folder: The folder of the files.
        key: Everything that the states depend on besides the row: the model's hash, the layers that are read, the dtypes of the
            model and the precision of the computation.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        name = f"states-{hashlib.sha256(key.encode()).hexdigest()[:16]}-{world()[0]}"
        self.data, self.index_path = Path(folder) / f"{name}.bin", Path(folder) / f"{name}.json"
        self.data.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.data, "a+b")  # stays open until `close`
        self._size = os.fstat(self._file.fileno()).st_size
        self._index: dict[str, tuple[int, int, int | None]] = {}  # where a row starts, its tokens, its checksum
        self._checked: set[str] = set()
        self._changed = False
        self._shape: tuple[int, str] | None = None
        self.misses = 0
        """The number of rows that were computed, not read."""
        if self.index_path.is_file():
            self._read_index()

    def fetch(self, reader: Reader, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """Return the hidden states of a batch, and compute those of rows that are not stored yet.

        Args:
            reader: The reader of the model.
            tokens: (B, M) token ids, padded on the right.
            mask: (B, M) bool, true at real tokens.

        Returns:
            The hidden states (B, M, A) of each layer that is read, 0 at pads.

        Raises:
            ValueError: If the states of new rows have another width or dtype than the stored states.
        """
        _, names = _names(tokens, mask)
        self._forget_damaged(reader, names)
        if missing := [i for i, name in enumerate(names) if name not in self._index]:
            self.misses += len(missing)
            self._append(reader, tokens[missing], mask[missing], [names[i] for i in missing])
        return list(self._stacked(reader, tokens, names).to(tokens.device, non_blocking=True).unbind())

    def find(self, reader: Reader, tokens: Tensor, mask: Tensor) -> list[Tensor] | None:
        """Return the hidden states of a batch on the CPU, as `fetch`, or None if a row is not stored."""
        _, names = _names(tokens, mask)
        self._forget_damaged(reader, names)
        found = all(name in self._index for name in names)
        return list(self._stacked(reader, tokens, names).unbind()) if found else None

    def _stacked(self, reader: Reader, tokens: Tensor, names: list[str]) -> Tensor:
        """Read the states of rows: (layers, B, M, A) on the CPU."""
        assert self._shape is not None
        width, dtype = self._shape[0], getattr(torch, self._shape[1])
        out = torch.zeros(len(reader.depths), *tokens.shape, width, dtype=dtype)
        for i, name in enumerate(names):
            length = self._index[name][1]
            data = torch.frombuffer(bytearray(self._bytes(reader, name)), dtype=dtype)
            out[:, i, :length] = data.view(-1, length, width)
        return out

    def _bytes(self, reader: Reader, name: str) -> bytes:
        assert self._shape is not None
        start, length, _ = self._index[name]
        count = len(reader.depths) * length * self._shape[0] * getattr(torch, self._shape[1]).itemsize
        return os.pread(self._file.fileno(), count, start)

    def _forget_damaged(self, reader: Reader, names: list[str]) -> None:
        """Compare rows with their checksums when they are read first, and drop those that differ. They are computed again."""
        for name in names:
            if name in self._checked or name not in self._index:
                continue
            known = self._index[name][2]
            if known is None or zlib.crc32(self._bytes(reader, name)) == known:
                self._checked.add(name)
            else:
                warnings.warn(f"{self.data} is damaged. The hidden states of a row are computed again.", stacklevel=3)
                del self._index[name]
                self._changed = True

    def _read_index(self) -> None:
        """Read the index file. Without it, all rows are computed again."""
        try:
            content = unsealed(json.loads(self.index_path.read_text(encoding="utf-8")))
            self._shape = (content["width"], content["dtype"])
            rows = content["rows"].items()
            # Indexes of release 0.1.0 have no checksums.
            places = {row: (place[0], place[1], place[2] if len(place) > 3 else None, place[-1]) for row, place in rows}
            self._index = {row: place[:3] for row, place in places.items() if place[3] <= self._size}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            warnings.warn(f"{self.index_path} cannot be used ({error}). All hidden states are computed again.", stacklevel=3)
            self._shape, self._index, self._size, self._changed = None, {}, 0, True
            self._file.truncate(0)

    def _append(self, reader: Reader, tokens: Tensor, mask: Tensor, names: list[str]) -> None:
        states = reader.read(tokens, None if bool(mask.all()) else mask, None, None)
        stacked = torch.stack([states[depth] for depth in reader.depths], dim=1).cpu()
        shape = (stacked.shape[-1], str(stacked.dtype).removeprefix("torch."))
        if self._shape not in (None, shape):
            raise ValueError(
                f"{self.data}: the stored hidden states have (width, dtype) {self._shape}, but the augment now has {shape}. "
                "Set `store_states` to another folder, or delete this one."
            )
        self._shape = shape
        try:
            self._write(stacked, mask, names)
        except OSError as error:
            raise not_written(self.data, error) from error

    def _write(self, stacked: Tensor, mask: Tensor, names: list[str]) -> None:
        for name, state, length in zip(names, stacked, mask.sum(dim=1).tolist(), strict=True):
            data = state[:, :length].contiguous().view(torch.uint8).numpy().tobytes()
            self._file.write(data)
            self._index[name] = (self._size, length, zlib.crc32(data))
            self._checked.add(name)
            self._changed = True
            self._size += len(data)
        self._file.flush()

    def flush(self) -> None:
        """Write the index file."""
        if self._shape is None or not self._changed:
            return
        width, dtype = self._shape
        os.fsync(self._file.fileno())
        rows = {name: (*place, self._size) for name, place in self._index.items()}
        text = json.dumps(sealed({"width": width, "dtype": dtype, "rows": rows}))
        publish_text(self.index_path, text)
        self._changed = False

    def close(self) -> None:
        """Write the index file and close the data file."""
        self.flush()
        self._file.close()


def _names(tokens: Tensor, mask: Tensor) -> tuple[list[int], list[str]]:
    """Return the length and the name of each row."""
    lengths = mask.sum(dim=1).tolist()
    rows = [row[:length] for row, length in zip(tokens.cpu(), lengths, strict=True)]
    return lengths, [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in rows]


def attach_states(batch: Any, readers: Sequence[Reader], store_of: Callable[[int], StateStore]) -> Any:
    """Return a batch of the CPU with the hidden states of each augment that has stored those of all rows.

    Args:
        batch: A batch of any kind.
        readers: The reader of each augment.
        store_of: A function that returns the store of an augment.
    """
    if not isinstance(batch, dict) or "tokens" not in batch:
        return batch
    inputs = list(batch.get("augments", [None] * len(readers)))
    for index, reader in enumerate(readers):
        given = inputs[index]
        if given is not None and given.ends is not None:
            check_realigned(index, prefix=reader.prefix, own=reader.own)  # before a store is opened
        if reader.prefix or (given is not None and given.states is not None):
            continue
        tokens, mask = (batch["tokens"], batch["mask"]) if given is None else (given.tokens, given.mask)
        states = store_of(index).find(reader, tokens, torch.ones_like(tokens) > 0 if mask is None else mask)
        if states is not None:
            inputs[index] = (given or AugmentInput(tokens))._replace(states=states)
    return {**batch, "augments": inputs}
