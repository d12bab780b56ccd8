"""A retriever over Qdrant, a vector database that runs on servers, for corpora and users that exceed a machine."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retrieval.encoders import Encoder, read_vectors
from lightning_align.retrieval.generation import open_parts
from lightning_align.retrieval.neighbors import DELETED, group_of_chunks
from lightning_align.retrieval.search import Found, check_search, collect

COLLECTION = "chunks"
_ROWS = 1024
"""Chunks that are sent at a time."""
_QUERIES = 128
"""Queries that are sent at a time."""


class QdrantRetriever:
    """A `Retriever` over a collection of Qdrant, which holds chunks, vectors and the fields to filter by.

    The server filters while it searches, so excluded documents cost no neighbors. It builds a graph (HNSW) over the vectors,
    whose settings are its own: pass them to ``retriever.client.update_collection``. A folder or ``:memory:`` is Qdrant's local
    mode, which compares all vectors: for tests and up to some 20,000 chunks.

    Args:
        location: The URL of a server, a folder, ``:memory:``, or a ``QdrantClient``.
        encoder: The encoder of the vectors.
        collection: The name of the collection. Default is chunks.
        **options: Further arguments of ``QdrantClient``, such as ``api_key``.

    Raises:
        ValueError: If qdrant-client is not installed, there is no such collection, or it was created with another encoder.
    """

    def __init__(self, location: str | Path | Any, *, encoder: Encoder, collection: str = COLLECTION, **options: Any) -> None:
        self.client, self.collection, self.encoder = _connect(location, options), collection, encoder
        if not self.client.collection_exists(collection):
            raise ValueError(f"{location} has no collection {collection!r}. Create it with QdrantRetriever.create.")
        settings = dict(self.client.get_collection(collection).config.metadata or {})
        if settings.get("encoder") != encoder.fingerprint:
            raise ValueError(
                f"`encoder` must be the encoder that {location} was created with, {settings.get('encoder')}, but got "
                f"{encoder.fingerprint}. Vectors of different encoders cannot be compared. Use that encoder, or create the "
                "collection again."
            )
        self.chunk_size, self.tokenizer_fingerprint = int(settings["chunk_size"]), str(settings["tokenizer"])
        self._pad_id = int(settings["pad_id"])

    @classmethod
    def create(
        cls,
        location: str | Path | Any,
        database: RetrievalDatabase,
        *,
        encoder: Encoder,
        collection: str = COLLECTION,
        **options: Any,
    ) -> Self:
        """Copy the chunks of a database and their vectors into a new collection.

        Args:
            location: See the class.
            database: A database that was built with the encoder. Deleted documents are not copied.
            encoder: The encoder of the vectors, which encodes queries too.
            collection: The name of the collection.
            **options: Further arguments of ``QdrantClient``.

        Raises:
            ValueError: If the database has no vectors or was built with another encoder, or the collection exists already.
        """
        client = _connect(location, options)
        from qdrant_client import models

        if database.manifest["encoder"] != encoder.fingerprint:
            raise ValueError(
                f"`encoder` must be the encoder that {database.folder} was built with, {database.manifest['encoder']}, but got "
                f"{encoder.fingerprint}. Use that encoder. A database of bm25 alone (None) has no vectors and cannot be copied."
            )
        if client.collection_exists(collection):
            raise ValueError(f"{location} has a collection {collection!r} already. Use another name, or delete it first.")
        chunks = database.chunks
        vectors = open_parts(database.folder, database.manifest).vectors
        assert vectors is not None
        stored = read_vectors(vectors)
        groups = group_of_chunks(chunks, np.array(database.manifest["deleted"], dtype=np.int64))
        client.create_collection(
            collection,
            vectors_config=models.VectorParams(size=stored.shape[1], distance=models.Distance.EUCLID),
            metadata={
                "chunk_size": chunks.chunk_size,
                "pad_id": chunks.pad_id,
                "tokenizer": chunks.tokenizer_fingerprint,
                "encoder": encoder.fingerprint,
            },
        )
        if _is_remote(client):  # local mode has no indexes
            client.create_payload_index(collection, "group", models.PayloadSchemaType.INTEGER)
            client.create_payload_index(collection, "document", models.PayloadSchemaType.KEYWORD)
        for start in range(0, len(chunks), _ROWS):
            ids = np.arange(start, min(start + _ROWS, len(chunks)))
            ids = ids[groups[ids] != DELETED]
            tokens, mask = chunks.gather(ids, 2 * chunks.chunk_size)
            payload = [
                {"document": chunks.document_ids[document], "group": int(groups[number]), "tokens": row[present].tolist()}
                for number, document, row, present in zip(ids, chunks.document_of(ids), tokens, mask, strict=True)
            ]
            if len(ids):
                batch = models.Batch(ids=ids.tolist(), vectors=stored[ids].astype(np.float32).tolist(), payloads=payload)
                client.upsert(collection, points=batch, wait=True)
        return cls(client, encoder=encoder, collection=collection)

    def search(self, queries: Sequence[ArrayLike], k: int, exclude: Sequence[Sequence[str]] | None = None) -> Found:
        """See `Retriever`. If a document is excluded, its near-duplicates are too.

        Raises:
            ValueError: If `k` is not positive, or `exclude` does not have an entry per query.
        """
        check_search(len(queries), k, exclude)
        # The score is the distance, not its square.
        results = (
            [(found.id, found.score**2, found.payload["tokens"]) for found in points]
            for points in self._points(queries, k, exclude)
        )
        return collect(results, (len(queries), k, 2 * self.chunk_size), self._pad_id)

    def _points(self, queries: Sequence[ArrayLike], k: int, exclude: Sequence[Sequence[str]] | None) -> Iterator[list[Any]]:
        """Yield what is found for each query, nearest first. Queries are sent in batches."""
        from qdrant_client import models

        known: dict[str, list[int]] = {}
        for start in range(0, len(queries), _QUERIES):
            some = slice(start, start + _QUERIES)
            names = exclude[some] if exclude is not None else [()] * len(queries[some])
            requests = []
            for vector, excluded in zip(self.encoder.encode(queries[some]), names, strict=True):
                groups = sorted({group for name in excluded for group in self._groups(name, known)})
                condition = models.FieldCondition(key="group", match=models.MatchAny(any=groups))
                requests.append(
                    models.QueryRequest(
                        query=np.asarray(vector, dtype=np.float32).tolist(),
                        filter=models.Filter(must_not=[condition]) if groups else None,
                        limit=k,
                        with_payload=["tokens"],
                    )
                )
            responses = self.client.query_batch_points(self.collection, requests)
            yield from (sorted(one.points, key=lambda point: (point.score, point.id)) for one in responses)

    def _groups(self, name: str, known: dict[str, list[int]]) -> list[int]:
        """Return the group of a document, in a list that is empty if there is no such document."""
        from qdrant_client import models

        if name not in known:
            condition = models.FieldCondition(key="document", match=models.MatchValue(value=name))
            points, _ = self.client.scroll(
                self.collection, scroll_filter=models.Filter(must=[condition]), limit=1, with_payload=["group"]
            )
            known[name] = [int(point.payload["group"]) for point in points]
        return known[name]


def _is_remote(client: Any) -> bool:
    return type(client._client).__name__ == "QdrantRemote"


def _connect(location: str | Path | Any, options: dict[str, Any]) -> Any:
    try:
        from qdrant_client import QdrantClient
    except ImportError as error:
        raise ValueError("QdrantRetriever needs qdrant-client. Run pip install 'lightning-align[qdrant]'.") from error
    if isinstance(location, QdrantClient):
        return location
    if str(location) == ":memory:":
        return QdrantClient(":memory:", **options)
    if "://" in str(location):
        return QdrantClient(url=str(location), **options)
    return QdrantClient(path=str(location), **options)
