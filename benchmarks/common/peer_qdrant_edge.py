"""The engine of Qdrant in this process, a side of `engines.py`. It has the index and the filters of the server.

Install it with ``pip install qdrant-edge-py==0.9.0``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retrieval.encoders import Encoder, read_vectors
from lightning_align.retrieval.generation import open_parts
from lightning_align.retrieval.neighbors import group_of_chunks
from lightning_align.retrieval.search import Found, collect

ROWS = 1024


class EdgeRetriever:
    """Searches a shard for the nearest chunks, without the documents that it must not find."""

    def __init__(self, place: Path, *, encoder: Encoder, chunk_size: int) -> None:
        from qdrant_edge import EdgeShard

        self.encoder, self.chunk_size = encoder, chunk_size
        self.shard = EdgeShard.load(str(place))

    @classmethod
    def create(cls, place: Path, database: RetrievalDatabase, *, encoder: Encoder) -> Self:
        """Copy the chunks of a database and their vectors, and build the graph of Qdrant (HNSW) with its own defaults."""
        import qdrant_edge as edge

        chunks = database.chunks
        stage = open_parts(database.folder, database.manifest).vectors
        assert stage is not None
        stored = read_vectors(stage)
        groups = group_of_chunks(chunks, np.zeros(0, dtype=np.int64))
        place.mkdir(parents=True)
        vectors = edge.EdgeVectorParams(size=stored.shape[1], distance=edge.Distance.Euclid)
        shard = edge.EdgeShard.create(str(place), edge.EdgeConfig(vectors=vectors))
        for name, kind in (("group", edge.PayloadSchemaType.Integer), ("document", edge.PayloadSchemaType.Keyword)):
            shard.update(edge.UpdateOperation.create_field_index(name, kind))
        for start in range(0, len(chunks), ROWS):
            ids = np.arange(start, min(start + ROWS, len(chunks)))
            tokens, mask = chunks.gather(ids, 2 * chunks.chunk_size)
            points = [
                edge.Point(
                    int(number),
                    stored[number].astype(np.float32).tolist(),
                    {"document": chunks.document_ids[document], "group": int(groups[number]), "tokens": row[present].tolist()},
                )
                for number, document, row, present in zip(ids, chunks.document_of(ids), tokens, mask, strict=True)
            ]
            shard.update(edge.UpdateOperation.upsert_points(points))
        while shard.optimize():
            pass
        shard.flush()
        shard.close()
        return cls(place, encoder=encoder, chunk_size=chunks.chunk_size)

    def search(self, queries: Sequence[ArrayLike], k: int, exclude: Sequence[Sequence[str]] | None = None) -> Found:
        """See `Retriever`."""
        import qdrant_edge as edge

        known: dict[str, list[int]] = {}
        requests = []
        for vector, names in zip(self.encoder.encode(queries), exclude or [()] * len(queries), strict=True):
            groups = sorted({group for name in names for group in self._groups(name, known)})
            condition: Any = edge.FieldCondition("group", match=edge.MatchAny(groups)) if groups else None
            requests.append(
                edge.QueryRequest(
                    limit=k,
                    query=edge.Query.Nearest(np.asarray(vector, dtype=np.float32).tolist()),
                    filter=edge.Filter(must_not=[condition]) if groups else None,
                    with_payload=["tokens"],
                )
            )
        found = self.shard.query_batch(edge.QueryBatchRequest(requests))
        results = ([(one.id, one.score**2, one.payload["tokens"]) for one in points] for points in found)
        return collect(results, (len(queries), k, 2 * self.chunk_size), 0)

    def _groups(self, name: str, known: dict[str, list[int]]) -> list[int]:
        """Return the group of a document."""
        import qdrant_edge as edge

        if name not in known:
            condition = edge.FieldCondition("document", match=edge.MatchValue(name))
            points = self.shard.query(edge.QueryRequest(limit=1, filter=edge.Filter(must=[condition]), with_payload=["group"]))
            known[name] = [int(point.payload["group"]) for point in points]
        return known[name]
