"""Creates the searcher of a generation, and the retriever of a finished database."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_align.retrieval.database import VERIFIED_BYTES, RetrievalDatabase
from lightning_align.retrieval.dense import DenseQueries, DenseSearcher
from lightning_align.retrieval.encoders import read_vectors
from lightning_align.retrieval.generation import Parts, open_parts
from lightning_align.retrieval.index import open_index
from lightning_align.retrieval.lexical import Decode, HybridSearcher, LexicalSearcher
from lightning_align.retrieval.neighbors import Searcher, group_of_chunks
from lightning_align.retrieval.search import DatabaseRetriever
from lightning_align.retrieval.stages import Stage
from lightning_align.retrieval.stored import split_factory
from lightning_align.retrieval.tables import ChunkTable, Ints
from lightning_align.retrieval.tools import Kind, Tools, check_encoder


def make_searcher(
    parts: Parts,
    deleted: Ints,
    kind: Kind,
    decode: Decode,
    *,
    query_vectors: Stage | None = None,
    device: torch.device | None = None,
) -> Searcher:
    """Create the searcher of a generation.

    Args:
        parts: The finished stages of the generation.
        deleted: Numbers of the deleted documents. The searcher never returns them.
        kind: Kind of search.
        decode: Converts token ids to text.
        query_vectors: Vectors of the chunks that will be the queries, if they have been encoded.
        device: The device for exact search. What is found does not depend on it. Default is the CPU.
    """
    groups = group_of_chunks(ChunkTable(parts.chunks.folder), deleted)
    lexical = None if parts.lexical is None else LexicalSearcher(parts.lexical, groups, decode)
    if parts.index is None:
        assert lexical is not None
        return lexical
    vectors = None if query_vectors is None else read_vectors(query_vectors)
    effort = parts.index.setting("effort", int)
    stored = None
    if split_factory(parts.index.setting("factory", str)).is_stored:
        assert parts.vectors is not None
        stored = read_vectors(parts.vectors)
    dense = DenseSearcher(open_index(parts.index), groups, effort=effort, vectors=vectors, device=device, stored=stored)
    return dense if lexical is None or kind == "dense" else HybridSearcher(dense, lexical)


def make_retriever(root: Path, tools: Tools, *, device: torch.device | None = None) -> DatabaseRetriever:
    """Create a live retriever over a finished database.

    Args:
        root: Folder of the database.
        tools: The tools that it was built with.
        device: The device for exact search. Default is the CPU.

    Raises:
        ValueError: If there is no finished database, it is damaged, or it was built with another encoder.
    """
    database = RetrievalDatabase.open(root)
    head = database.manifest
    check_encoder(head, tools)
    database.verify(("chunks", "index", "lexical"), queries=(), at_most=VERIFIED_BYTES)
    parts, deleted = open_parts(root, head), np.array(head["deleted"], dtype=np.int64)
    kind: Kind = head["retriever"]
    searcher = make_searcher(parts, deleted, kind, tools.decode, device=device)
    # Databases of earlier versions have no precision.
    precision = None if parts.vectors is None else parts.vectors.setting("precision", str, default="") or None
    dim = None if parts.vectors is None else read_vectors(parts.vectors).shape[1]
    dense = None if tools.encoder is None else DenseQueries(tools.encoder, precision=precision, dim=dim)

    def queries(runs: Sequence[Any]) -> Any:
        if isinstance(searcher, HybridSearcher):
            assert dense is not None
            return dense(runs), searcher.lexical.terms(runs)
        return searcher.terms(runs) if isinstance(searcher, LexicalSearcher) else dense(runs)  # type: ignore[misc]  # not None

    return DatabaseRetriever(ChunkTable(parts.chunks.folder), searcher, queries, deleted=deleted)
