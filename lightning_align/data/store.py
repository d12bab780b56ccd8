"""Memory-mapped files of tokenized rows, cached under a hash of everything that they depend on.

A store is an Arrow file and a JSON file with the ledger of its rows. The JSON file is written last, so a store that has one
is complete.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from lightning_align.data.build import Build, clean
from lightning_align.data.earlier_stores import earlier_store
from lightning_align.data.ledger import Ledger
from lightning_align.data.mapping import map_rows
from lightning_align.data.recipe import Recipe
from lightning_align.data.remembered import remembered_hash
from lightning_align.data.rows import Row, Source, source_fingerprint
from lightning_align.data.tokenizer import Tokenizer
from lightning_align.runtime.checksums import file_hash, unsealed

__all__ = ["Recipe", "StoredRow", "StoredTokens", "TokenStore", "build_store", "open_store", "read_forms", "store_path"]

_FORMAT = 5
"""The version of the format. Increase it when the same settings produce other ids or another layout."""


class StoredTokens(NamedTuple):
    """One sequence of tokens as arrays. See `EncodedTokens`."""

    tokens: np.ndarray[Any, np.dtype[np.int32]]
    targets: np.ndarray[Any, np.dtype[np.bool_]]
    num_bytes: int


class StoredRow(NamedTuple):
    """A row as arrays. See `EncodedRow`."""

    row: int
    num_prompt: int
    sides: list[StoredTokens]
    weight: float = 1.0
    margin: float = 0.0


class TokenStore(Dataset[StoredRow]):
    """A dataset of the rows of a file that `build_store` wrote.

    It holds only the path. Each process maps the file when it first reads from it, so the cost of sending the dataset to a
    worker does not depend on the number of rows.

    Args:
        path: The path of the Arrow file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._table: pa.Table | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    @property
    def table(self) -> pa.Table:
        """The memory-mapped file."""
        if self._table is None:
            with pa.memory_map(self.path) as source:
                self._table = pa.ipc.open_file(source).read_all()
        return self._table

    @property
    def num_sides(self) -> int:
        """The number of sides of each row: 2 for pairs, otherwise 1."""
        return sum(name.startswith("tokens_") for name in self.table.column_names)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> StoredRow:
        table = self.table
        sides = [
            StoredTokens(
                table[f"tokens_{side}"][index].values.to_numpy(),
                table[f"targets_{side}"][index].values.to_numpy(zero_copy_only=False),
                table[f"num_bytes_{side}"][index].as_py(),
            )
            for side in range(self.num_sides)
        ]
        numbers = [table[name][index].as_py() for name in ("weight", "margin")] if len(sides) == 2 else ()
        return StoredRow(table["row"][index].as_py(), table["num_prompt"][index].as_py(), sides, *numbers)

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Count the tokens of each row, of shape (rows,). The length of a pair is the sum of both sides."""
        counts = [pc.list_value_length(self.table[f"tokens_{side}"]).to_numpy() for side in range(self.num_sides)]
        return np.asarray(np.sum(counts, axis=0), dtype=np.int64)


def store_path(source: Source, *, split: str, recipe: Recipe, tokenizer: Tokenizer, cache_dir: str) -> Path:
    """Return the path of the tokenized rows of a source. The file name contains a hash of everything that they depend on.

    Args:
        source: The source of the rows.
        split: The split of a hub dataset if its name does not include one.
        recipe: How to encode the rows.
        tokenizer: The tokenizer.
        cache_dir: The folder of the stores. It also keeps the hashes of large files; see `remembered_hash`.

    Raises:
        ValueError: If the source cannot be read.
    """
    fingerprint = source_fingerprint(source, split=split, cache_dir=cache_dir)
    content = {
        "format": _FORMAT,
        "source": fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "recipe": asdict(recipe),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path = Path(cache_dir) / f"{recipe.kind}-{digest[:16]}.arrow"
    if path.exists():
        return path
    options: dict[str, Any] = {"recipe": asdict(recipe), "tokenizer": tokenizer, "cache_dir": cache_dir}
    return earlier_store(source, split=split, fingerprint=fingerprint, **options) or path


def open_store(path: Path) -> tuple[TokenStore, Ledger] | None:
    """Open the store at a path, with its ledger.

    Returns:
        The store and the ledger, or None if there is no store. A damaged store gives a warning and None.
    """
    manifest = path.with_suffix(".json")
    if not path.exists() or not manifest.exists():
        return None
    try:
        content = unsealed(json.loads(manifest.read_text(encoding="utf-8")))
        ledger = Ledger.from_dict(content["ledger"])
        store = TokenStore(str(path))
        if path.stat().st_size != content["num_bytes"] or len(store) != content["num_stored"]:
            raise ValueError("its size differs from the size when it was written")
        # Stores of release 0.1.0 have no hash.
        known = content.get("sha256")
        if known is not None and remembered_hash(str(path), file_hash, folder=path.parent / "hashes") != known:
            raise ValueError("its content differs from the content when it was written")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        warnings.warn(f"{path} is damaged and will be rebuilt ({error})", stacklevel=2)
        return None
    return store, ledger


def build_store(
    path: Path, *, source: Source, split: str, recipe: Recipe, tokenizer: Tokenizer, num_workers: int = 0
) -> tuple[TokenStore, Ledger]:
    """Tokenize a source and write the store, or open the store if it exists.

    A source of many rows is tokenized in parts, in a folder beside the store. If the process is killed, the next one continues
    after the last finished part.

    Args:
        path: The path of the store, as returned by `store_path`.
        source: The source of the rows.
        split: The split of a hub dataset if its name does not include one.
        recipe: How to encode the rows.
        tokenizer: The tokenizer.
        num_workers: The number of processes that tokenize a source of many rows. 0 is the number of cores, and 1 is this
            process alone. The bytes of the store do not depend on it.

    Raises:
        ValueError: If the source or a row is bad, no row is left, or the store cannot be written.
    """
    found = open_store(path)
    if found is not None:
        clean(path)
    else:
        Build(path, source, split, recipe, tokenizer, num_workers).run()
        found = open_store(path)
        if found is None:
            raise ValueError(f"{path} was removed while it was built. Run the same again.")
    return found


def read_forms(rows: Iterable[Row], *, recipe: Recipe, ledger: Ledger | None = None) -> Iterator[Row]:
    """Convert rows to rows of the forms, as `build_store` does. Their numbers are those of the stored rows.

    Args:
        rows: The rows, as they were read.
        recipe: How to encode the rows.
        ledger: The ledger that counts the rows that cannot be converted.
    """
    return map_rows(rows, recipe.mapping, accepted=recipe.accepted, prompts_only=recipe.prompts_only, ledger=ledger)
