"""A retriever over LanceDB, a vector store on disk or in object storage, for corpora that exceed the memory of a machine."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retrieval.encoders import Encoder, read_vectors
from lightning_align.retrieval.generation import open_parts
from lightning_align.retrieval.neighbors import DELETED, group_of_chunks
from lightning_align.retrieval.search import Found, check_search, collect

TABLE = "chunks"
_ROWS = 16384
_QUERIES = 128
"""Queries that are searched for at a time."""
_SETTINGS = ("chunk_size", "pad_id", "tokenizer", "encoder")


class LanceRetriever:
    """A `Retriever` over a LanceDB table, which holds chunks, vectors and the columns to filter by.

    Search is exact unless the table has an index. LanceDB builds it with ``retriever.table.create_index(metric="l2")``. Use the
    functions of LanceDB to add, delete and version rows.

    Args:
        uri: Location of the table: a folder, or another URI that LanceDB supports, such as ``s3://bucket/path``.
        encoder: The encoder of the vectors.

    Raises:
        ValueError: If lancedb is not installed, there is no such table, or it was created with another encoder.
    """

    def __init__(self, uri: str | Path, *, encoder: Encoder) -> None:
        connection = _connect(uri)
        try:
            self.table = connection.open_table(TABLE)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{uri} has no table {TABLE!r} ({error}). Create it with LanceRetriever.create.") from error
        settings = {key.decode(): value.decode() for key, value in (self.table.schema.metadata or {}).items()}
        if settings["encoder"] not in (encoder.fingerprint, *getattr(encoder, "former_fingerprints", ())):
            raise ValueError(
                f"`encoder` must be the encoder that {uri} was created with, {settings['encoder']}, but got "
                f"{encoder.fingerprint}. Vectors of different encoders cannot be compared. Use that encoder, or create the "
                "table again."
            )
        self.encoder = encoder
        self.chunk_size, self.tokenizer_fingerprint = int(settings["chunk_size"]), settings["tokenizer"]
        self._pad_id = int(settings["pad_id"])

    @classmethod
    def create(cls, uri: str | Path, database: RetrievalDatabase, *, encoder: Encoder) -> Self:
        """Copy the chunks of a database and their vectors into a new table.

        Args:
            uri: Location of the table.
            database: A database that was built with the encoder. Deleted documents are not copied.
            encoder: The encoder of the vectors, which encodes queries too.

        Raises:
            ValueError: If the database has no vectors or was built with another encoder, or the table exists already.
        """
        import pyarrow as pa

        if database.manifest["encoder"] not in (encoder.fingerprint, *getattr(encoder, "former_fingerprints", ())):
            raise ValueError(
                f"`encoder` must be the encoder that {database.folder} was built with, {database.manifest['encoder']}, but got "
                f"{encoder.fingerprint}. Use that encoder. A database of bm25 alone (None) has no vectors and cannot be copied."
            )
        chunks = database.chunks
        vectors = open_parts(database.folder, database.manifest).vectors
        assert vectors is not None
        stored = read_vectors(vectors)
        groups = group_of_chunks(chunks, np.array(database.manifest["deleted"], dtype=np.int64))
        values = (str(chunks.chunk_size), str(chunks.pad_id), chunks.tokenizer_fingerprint, encoder.fingerprint)
        schema = pa.schema(
            [
                ("id", pa.int64()),
                ("document", pa.string()),
                ("group", pa.int64()),
                ("tokens", pa.list_(pa.int32())),
                ("vector", pa.list_(pa.float32(), stored.shape[1])),
            ],
            metadata=dict(zip(_SETTINGS, values, strict=True)),
        )

        def batches() -> Iterator[Any]:
            for start in range(0, len(chunks), _ROWS):
                ids = np.arange(start, min(start + _ROWS, len(chunks)))
                ids = ids[groups[ids] != DELETED]
                tokens, mask = chunks.gather(ids, 2 * chunks.chunk_size)
                columns = (
                    ids,
                    [chunks.document_ids[number] for number in chunks.document_of(ids)],
                    groups[ids],
                    [row[present].astype(np.int32) for row, present in zip(tokens, mask, strict=True)],
                    list(stored[ids].astype(np.float32)),
                )
                arrays = [pa.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)]
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)

        try:
            _connect(uri).create_table(TABLE, batches(), schema=schema)
        except ValueError as error:
            raise ValueError(f"The table {TABLE!r} cannot be created in {uri} ({error}). Use another location.") from error
        return cls(uri, encoder=encoder)

    def search(self, queries: Sequence[ArrayLike], k: int, exclude: Sequence[Sequence[str]] | None = None) -> Found:
        """See `Retriever`. If a document is excluded, its near-duplicates are too.

        Raises:
            ValueError: If `k` is not positive, or `exclude` does not have an entry per query.
        """
        check_search(len(queries), k, exclude)
        results: list[list[tuple[int, float, list[int]]]] = [[] for _ in queries]
        vectors: Any = self.encoder.encode(queries) if len(queries) else []
        # Queries that exclude the same documents are searched for together.
        alike: dict[tuple[int, ...], list[int]] = {}
        known = self._groups({name for names in exclude or () for name in names})
        for row in range(len(queries)):
            names = () if exclude is None else exclude[row]
            alike.setdefault(tuple(sorted({known[name] for name in names if name in known})), []).append(row)
        for groups, rows in alike.items():
            for start in range(0, len(rows), _QUERIES):
                some = rows[start : start + _QUERIES]
                search = self.table.search([vectors[row] for row in some] if len(some) > 1 else vectors[some[0]])
                search = search.distance_type("l2").limit(k)
                if groups:
                    search = search.where(f"group NOT IN ({', '.join(map(str, groups))})", prefilter=True)
                for found in search.select(["id", "tokens", "_distance"]).to_list():
                    results[some[found.get("query_index", 0)]].append((found["id"], found["_distance"], found["tokens"]))
        ordered = (sorted(found, key=lambda one: (one[1], one[0])) for found in results)
        return collect(ordered, (len(queries), k, 2 * self.chunk_size), self._pad_id)

    def _groups(self, names: Collection[str]) -> dict[str, int]:
        """Return the group of each of some documents that the table has."""
        if not names:
            return {}
        quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in sorted(names))
        rows = self.table.search().where(f"document IN ({quoted})").select(["document", "group"]).limit(self.table.count_rows())
        return {row["document"]: row["group"] for row in rows.to_list()}


def _connect(uri: str | Path) -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise ValueError("LanceRetriever needs lancedb. Run pip install 'lightning-align[lance]'.") from error
    return lancedb.connect(str(uri))
