"""A retriever over LanceDB, an embedded vector store on disk or in object storage: for corpora beyond one machine's memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from lightning_align.retrieval.build import open_parts
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retrieval.encoders import Encoder, read_vectors
from lightning_align.retrieval.neighbors import DELETED, group_of_chunks
from lightning_align.retrieval.search import Found
from lightning_align.retrieval.tables import Tokens

TABLE = "chunks"
_ROWS = 16384
_SETTINGS = ("chunk_size", "pad_id", "tokenizer", "encoder")


class LanceRetriever:
    """A `Retriever` whose chunks, vectors and filters are rows of a LanceDB table.

    Search is exact until the table has an index, which LanceDB builds and keeps: ``retriever.table.create_index(metric="l2")``.
    Rows can be added, deleted and versioned with LanceDB's own calls.

    Args:
        uri: where the table is: a folder, or what LanceDB takes besides, such as ``s3://bucket/path``.
        encoder: that the vectors are of.

    Raises:
        ValueError: if lancedb is not installed, there is no such table, or it is of another encoder.
    """

    def __init__(self, uri: str | Path, *, encoder: Encoder) -> None:
        connection = _connect(uri)
        try:
            self.table = connection.open_table(TABLE)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{uri} has no table {TABLE!r} ({error}): make it with LanceRetriever.create") from error
        settings = {key.decode(): value.decode() for key, value in (self.table.schema.metadata or {}).items()}
        if settings["encoder"] != encoder.fingerprint:
            raise ValueError(
                f"{uri} was made with the encoder {settings['encoder']}, this one is {encoder.fingerprint}: their vectors "
                "cannot be compared; use that one, or make the table again"
            )
        self.encoder = encoder
        self.chunk_size, self.tokenizer_fingerprint = int(settings["chunk_size"]), settings["tokenizer"]
        self._pad_id = int(settings["pad_id"])

    @classmethod
    def create(cls, uri: str | Path, database: RetrievalDatabase, *, encoder: Encoder) -> Self:
        """Copy the chunks of a database and their vectors into a new table.

        Args:
            uri: of the table.
            database: built with the encoder; its deleted documents stay behind.
            encoder: for searching.

        Raises:
            ValueError: if the database has no vectors, or those of another encoder, or there is a table already.
        """
        import pyarrow as pa  # type: ignore[import-untyped]  # it ships no types

        if database.manifest["encoder"] != encoder.fingerprint:
            raise ValueError(
                f"{database.folder} was built with the encoder {database.manifest['encoder']}, this one is "
                f"{encoder.fingerprint}: expected the same; a database of bm25 alone has no vectors"
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
                    [row[there].astype(np.int32) for row, there in zip(tokens, mask, strict=True)],
                    list(stored[ids].astype(np.float32)),
                )
                arrays = [pa.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)]
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)

        try:
            _connect(uri).create_table(TABLE, batches(), schema=schema)
        except ValueError as error:
            raise ValueError(f"{uri} cannot take the table {TABLE!r} ({error}): choose another place") from error
        return cls(uri, encoder=encoder)

    def search(self, queries: Sequence[ArrayLike], k: int, exclude: Sequence[Sequence[str]] | None = None) -> Found:
        """See `Retriever`. With a document its near-duplicates are excluded.

        Raises:
            ValueError: if k is not positive, or there is not one `exclude` for each query.
        """
        if k < 1:
            raise ValueError(f"k is {k}, expected 1 or more")
        if exclude is not None and len(exclude) != len(queries):
            raise ValueError(f"exclude has {len(exclude)} lists for {len(queries)} queries, expected one for each")
        shape = len(queries), k
        ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
        distances = np.full(shape, np.inf, dtype=np.float32)
        tokens = np.full((*shape, 2 * self.chunk_size), self._pad_id, dtype=np.int64)
        there = np.zeros(tokens.shape, dtype=np.bool_)
        vectors: Any = self.encoder.encode(queries) if len(queries) else []
        for row, vector in enumerate(vectors):
            search = self.table.search(vector).distance_type("l2").limit(k)
            if exclude is not None and (groups := self._groups(exclude[row])):
                search = search.where(f"group NOT IN ({', '.join(map(str, groups))})", prefilter=True)
            for place, found in enumerate(search.select(["id", "tokens", "_distance"]).to_list()):
                ids[row, place], mask[row, place], distances[row, place] = found["id"], True, found["_distance"]
                tokens[row, place, : len(found["tokens"])] = found["tokens"]
                there[row, place, : len(found["tokens"])] = True
        return Found(ids, mask, distances, Tokens(tokens, there))

    def _groups(self, names: Sequence[str]) -> list[int]:
        if not names:
            return []
        quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in names)
        rows = self.table.search().where(f"document IN ({quoted})").select(["group"]).to_list()
        return sorted({row["group"] for row in rows})


def _connect(uri: str | Path) -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise ValueError("LanceRetriever needs lancedb: pip install 'lightning-align[lance]'") from error
    return lancedb.connect(str(uri))
