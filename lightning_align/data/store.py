"""Memory-mapped files of tokenized rows, cached under a hash of everything that they depend on.

A store is an Arrow file and a JSON file with the ledger of its rows. The JSON file is written last, so a store that has one
is complete.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lightning_align.data.conversations import BadRowError, MaskTurns
from lightning_align.data.earlier_stores import earlier_store
from lightning_align.data.encode import EncodedRow, Truncation, encode_rows
from lightning_align.data.forms import Form, form_of
from lightning_align.data.ledger import BadRow, Ledger
from lightning_align.data.mapping import RowMapping, map_rows
from lightning_align.data.packing import encode_blocks
from lightning_align.data.rows import Row, Source, read_rows, source_fingerprint, source_name
from lightning_align.data.tokenizer import Tokenizer
from lightning_align.runtime.files import publish, publish_text

_FORMAT = 4
"""The version of the format. Increase it when the same settings produce other ids or another layout."""
_ROWS_PER_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings that the ids of a source depend on, except the tokenizer. See `encode_rows` and `map_rows`."""

    kind: str
    """What the rows are used for. It is a part of the file name."""
    accepted: tuple[Form, ...]
    max_length: int
    truncation: Truncation
    mask_turns: MaskTurns
    on_bad_row: BadRow
    prompts_only: bool = False
    mapping: RowMapping = field(default_factory=RowMapping)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


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
        cache_dir: The folder of the stores.

    Raises:
        ValueError: If the source cannot be read.
    """
    fingerprint = source_fingerprint(source, split=split)
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
        content = json.loads(manifest.read_text(encoding="utf-8"))
        ledger = Ledger.from_dict(content["ledger"])
        store = TokenStore(str(path))
        if path.stat().st_size != content["num_bytes"] or len(store) != content["num_stored"]:
            raise ValueError("its size differs from the size when it was written")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        warnings.warn(f"{path} is damaged and will be rebuilt ({error})", stacklevel=2)
        return None
    return store, ledger


def build_store(path: Path, *, source: Source, split: str, recipe: Recipe, tokenizer: Tokenizer) -> tuple[TokenStore, Ledger]:
    """Tokenize a source and write the store, or open the store if it exists.

    Args:
        path: The path of the store, as returned by `store_path`.
        source: The source of the rows.
        split: The split of a hub dataset if its name does not include one.
        recipe: How to encode the rows.
        tokenizer: The tokenizer.

    Raises:
        ValueError: If the source or a row is bad, no row is left, or the store cannot be written.
    """
    found = open_store(path)
    if found is not None:
        return found
    name = source_name(source)
    ledger = Ledger(name, on_bad_row=recipe.on_bad_row)
    rows = tqdm(read_rows(source, split=split), desc=f"tokenizing {name}", unit=" rows", leave=False, disable=None)
    mapped = read_forms(rows, recipe=recipe, ledger=ledger)
    encoded = _encode(mapped, recipe=recipe, tokenizer=tokenizer, ledger=ledger)
    num_stored = 0

    def write(temporary: Path) -> None:
        nonlocal num_stored
        num_stored = _write(temporary, encoded)
        # This raises before the file is published if the source has no usable row.
        ledger.close()

    publish(path, write)
    content = {"ledger": ledger.to_dict(), "num_stored": num_stored, "num_bytes": path.stat().st_size}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    publish_text(path.with_suffix(".json"), text)
    return TokenStore(str(path)), ledger


def read_forms(rows: Iterable[Row], *, recipe: Recipe, ledger: Ledger | None = None) -> Iterator[Row]:
    """Convert rows to rows of the forms, as `build_store` does. Their numbers are those of the stored rows.

    Args:
        rows: The rows, as they were read.
        recipe: How to encode the rows.
        ledger: The ledger that counts the rows that cannot be converted.
    """
    return map_rows(rows, recipe.mapping, accepted=recipe.accepted, prompts_only=recipe.prompts_only, ledger=ledger)


def _encode(rows: Iterable[Row], *, recipe: Recipe, tokenizer: Tokenizer, ledger: Ledger) -> Iterator[EncodedRow]:
    rows = iter(rows)
    if "text" in recipe.accepted:
        # Plain text is packed and other rows are not, so a source cannot mix them. The first row that has an accepted form
        # decides.
        first: list[Row] = []
        form = None
        for row in islice(rows, _ROWS_PER_BATCH):
            first.append(row)
            try:
                form = form_of(row.fields, accepted=recipe.accepted)
                break
            except BadRowError:
                continue
        rows = chain(first, rows)
        if form == "text":
            return encode_blocks(rows, tokenizer=tokenizer, ledger=ledger, max_length=recipe.max_length)
    return encode_rows(
        rows,
        tokenizer=tokenizer,
        ledger=ledger,
        accepted=[form for form in recipe.accepted if form != "text"],
        max_length=recipe.max_length,
        truncation=recipe.truncation,
        mask_turns=recipe.mask_turns,
        prompts_only=recipe.prompts_only,
        chat_template_kwargs=recipe.chat_template_kwargs,
    )


def _write(path: Path, rows: Iterator[EncodedRow]) -> int:
    """Write rows to an Arrow file and return their number."""
    first = next(rows, None)
    num_sides = 1 if first is None else len(first.sides)
    schema = _schema(num_sides)
    rows = rows if first is None else chain([first], rows)
    num_rows = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while batch := list(islice(rows, _ROWS_PER_BATCH)):
            num_rows += len(batch)
            columns: dict[str, list[Any]] = {
                "row": [row.row for row in batch],
                "num_prompt": [row.num_prompt for row in batch],
            }
            if num_sides == 2:
                columns["weight"] = [row.weight for row in batch]
                columns["margin"] = [row.margin for row in batch]
            for side in range(num_sides):
                columns[f"tokens_{side}"] = [row.sides[side].tokens for row in batch]
                columns[f"targets_{side}"] = [row.sides[side].targets for row in batch]
                columns[f"num_bytes_{side}"] = [row.sides[side].num_bytes for row in batch]
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
    return num_rows


def _schema(num_sides: int) -> pa.Schema:
    fields = [("row", pa.int64()), ("num_prompt", pa.int32())]
    if num_sides == 2:
        fields += [("weight", pa.float64()), ("margin", pa.float64())]
    for side in range(num_sides):
        fields.append((f"tokens_{side}", pa.list_(pa.int32())))
        fields.append((f"targets_{side}", pa.list_(pa.bool_())))
        fields.append((f"num_bytes_{side}", pa.int64()))
    return pa.schema(fields)
