"""Files of what augments with their own tokenizers read of the rows of a store. They are made once and memory-mapped."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from lightning_align.calm.text import OwnTokenizer, Reading, Turn
from lightning_align.data.remembered import remembered_hash
from lightning_align.data.store import StoredTokens, TokenStore
from lightning_align.runtime.checksums import file_hash, sealed, unsealed
from lightning_align.runtime.files import locked, publish, publish_text

_FORMAT = 1
"""The version of the format. Increase it when the same rows give other files."""
_PARTS = ("ids", "ends", "columns")
_ROWS_PER_BATCH = 1024
Turns = dict[int, list[Turn]]


class AugmentedRow(NamedTuple):
    """A stored row with what each augment reads of it. See `StoredRow`."""

    row: int
    num_prompt: int
    sides: list[StoredTokens]
    readings: list[Reading | None]
    """None for an augment that has no tokenizer of its own."""


class AugmentedRows(Dataset[AugmentedRow]):
    """The rows of a store with those of the files that `write_readings` wrote.

    Args:
        store: The store.
        paths: The files of the parts of the store, in order.
    """

    def __init__(self, store: TokenStore, paths: Sequence[str]) -> None:
        self.store, self.paths = store, list(paths)
        self._table: pa.Table | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    @property
    def table(self) -> pa.Table:
        """The memory-mapped files, one after the other."""
        if self._table is None:
            self._table = pa.concat_tables(map(_read, self.paths))
        return self._table

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> AugmentedRow:
        row, table = self.store[index], self.table
        anchor_ends = table["anchor_ends"][index].values.to_numpy()
        count = max(int(name.rpartition("_")[2]) for name in table.column_names if name.startswith("ids_")) + 1
        readings = [
            Reading(**{part: table[f"{part}_{number}"][index].values.to_numpy() for part in _PARTS}, anchor_ends=anchor_ends)
            if f"ids_{number}" in table.column_names
            else None
            for number in range(count)
        ]
        return AugmentedRow(row.row, row.num_prompt, row.sides, readings)

    def longest(self, number: int) -> int:
        """Return the largest number of tokens of an augment per row. 0 for an augment that has no tokenizer of its own."""
        name = f"ids_{number}"
        return pc.max(pc.list_value_length(self.table[name])).as_py() or 0 if name in self.table.column_names else 0


def readings_path(store: TokenStore, own: Sequence[OwnTokenizer | None], options: Any = None) -> Path:
    """Return the path of the file of a store. Its name has a hash of everything that the file depends on.

    Args:
        store: The store of a source.
        own: The conversion of rows for each augment. None for an augment that has no tokenizer of its own.
        options: Other things that the file depends on, as JSON has them.
    """
    tokenizers = [None if one is None else (one.tokenizer.fingerprint, one.other.fingerprint) for one in own]
    content = json.dumps([_FORMAT, Path(store.path).stem, tokenizers, options])
    return Path(store.path).with_name(f"calm-augments-{hashlib.sha256(content.encode()).hexdigest()[:16]}.arrow")


def write_readings(
    path: Path,
    store: TokenStore,
    own: Sequence[OwnTokenizer | None],
    turns: Sequence[Callable[[], Turns] | Turns] = (),
) -> None:
    """Write the file of a store, unless it exists.

    Args:
        path: The path of the file, as returned by `readings_path`.
        store: The store of a source.
        own: The conversion of rows for each augment.
        turns: For each augment the turns of rows, by the index of the row, of which it reads other text than the anchor's. Or
            a function that finds them.
    """
    with locked(path.with_suffix(".lock"), on_wait=lambda _: None):
        if _is_whole(path, len(store)):
            return
        rank_zero_info(f"converting {len(store):,} rows to the tokens of the augments")

        def write(temporary: Path) -> None:
            batches = _batches(store, own, [one() if callable(one) else one for one in turns or [{} for _ in own]])
            first = next(batches)
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
                writer.write_batch(first)
                for batch in batches:
                    writer.write_batch(batch)

        publish(path, write)
        publish_text(path.with_suffix(".json"), json.dumps(sealed({"sha256": file_hash(path)})))


def _is_whole(path: Path, num_rows: int) -> bool:
    """Return whether a file exists as it was written. A damaged one is made again."""
    record = path.with_suffix(".json")
    if not path.exists() or not record.exists():
        return False
    try:
        known = unsealed(json.loads(record.read_text(encoding="utf-8")))["sha256"]
        if remembered_hash(str(path), file_hash, folder=path.parent / "hashes") != known:
            raise ValueError("its content differs from the content when it was written")
        return int(_read(str(path)).num_rows) == num_rows
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        warnings.warn(f"{path} is damaged and will be made again ({error})", stacklevel=2)
        return False


def _batches(store: TokenStore, own: Sequence[OwnTokenizer | None], turns: Sequence[Turns]) -> Iterator[pa.RecordBatch]:
    for start in range(0, max(1, len(store)), _ROWS_PER_BATCH):
        lists: dict[str, list[Any]] = {"anchor_ends": []}
        lists |= {f"{part}_{number}": [] for number, one in enumerate(own) if one is not None for part in _PARTS}
        for index in range(start, min(len(store), start + _ROWS_PER_BATCH)):
            row = store[index]
            ids = row.sides[0].tokens.tolist()
            for number, one in enumerate(own):
                if one is None:
                    continue
                reading = one.read(ids, num_prompt=row.num_prompt, turns=turns[number].get(index))
                for part in _PARTS:
                    lists[f"{part}_{number}"].append(np.asarray(getattr(reading, part), dtype=np.int32))
            lists["anchor_ends"].append(np.asarray(reading.anchor_ends, dtype=np.int32))
        yield pa.RecordBatch.from_pydict({name: pa.array(rows, pa.list_(pa.int32())) for name, rows in lists.items()})


def _read(path: str) -> pa.Table:
    with pa.memory_map(path) as source:
        return pa.ipc.open_file(source).read_all()
