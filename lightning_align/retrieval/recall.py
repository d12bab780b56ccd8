"""The recall of an index: the true neighbors by brute force, and the search effort that finds enough of them."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_align.retrieval.faiss_seam import load_faiss, max_effort, set_effort
from lightning_align.retrieval.stored import max_stored_effort, search_stored, split_factory
from lightning_align.retrieval.tables import Floats, Ints
from lightning_align.runtime.mapped import release_pages


class Gate(Protocol):
    """The recall that an index must reach, see `IndexConfig`."""

    @property
    def min_recall(self) -> float: ...  # noqa: D102

    @property
    def recall_at(self) -> int: ...  # noqa: D102

    @property
    def seed(self) -> int: ...  # noqa: D102


def exact_neighbors(data: NDArray[np.float16], queries: Floats, k: int, *, block: int = 1 << 16) -> tuple[Floats, Ints]:
    """Find the nearest vectors by brute force.

    Args:
        data: (C, d) vectors, read a block at a time.
        queries: (n, d) queries.
        k: The number of neighbors per query, at most C.
        block: Vectors in memory at a time.

    Returns:
        (n, k) distances and (n, k) numbers of the vectors.
    """
    faiss = load_faiss()
    heap = faiss.ResultHeap(len(queries), k)
    for start in range(0, len(data), block):
        part = np.ascontiguousarray(data[start : start + block], dtype=np.float32)
        distances, ids = faiss.knn(queries, part, min(k, len(part)))
        heap.add_result(distances, np.where(ids >= 0, ids + start, -1))
        if isinstance(data, np.memmap) and data.filename is not None:
            release_pages(Path(data.filename).parent)
    heap.finalize()
    return heap.D, heap.I


def tune(index: Any, data: NDArray[np.float16], config: Gate, *, factory: str, num_queries: int = 1000) -> dict[str, Any]:
    """Increase the search effort until the index reaches the recall.

    Args:
        index: The filled index.
        data: (C, d) vectors of the index.
        config: Settings with the recall to reach.
        factory: Factory string of the index, for the message.
        num_queries: The number of vectors of the index that are searched for. A vector is not its own neighbor.

    Returns:
        ``effort``, for `set_effort`, and the measured ``recall``.

    Raises:
        ValueError: If no effort reaches the recall.
    """
    num = len(data)
    k = min(config.recall_at, num - 1)
    if k == 0:
        return {"effort": 1, "recall": 1.0}
    sample = np.sort(np.random.default_rng(config.seed + 1).choice(num, min(num, num_queries), replace=False))
    queries = data[sample].astype(np.float32)
    distances, ids = exact_neighbors(data, queries, k + 1)
    truth, _ = without_self(distances, ids, sample)
    recall, effort, is_stored = 0.0, 1, split_factory(factory).is_stored
    most = max_stored_effort(max_effort(index)) if is_stored else max_effort(index)
    while True:
        set_effort(index, effort)
        if is_stored:
            distances, ids = search_stored(index, data, queries, k + 1, effort)
        else:
            distances, ids = index.search(queries, k + 1)
        found, _ = without_self(distances, ids, sample, data=data)
        # Compare by distance, because any of equally near chunks, which are often copies, is correct.
        recall = float((found <= truth[:, -1:] * (1 + 1e-4) + 1e-6).mean())
        if recall >= config.min_recall or effort >= most:
            break
        effort *= 2
    if recall < config.min_recall:
        raise ValueError(
            f"The index {factory} finds at most {recall:.3f} of the {k} nearest chunks, but `min_recall` is "
            f"{config.min_recall}. Use a factory string that compresses less (such as SQ8 instead of PQ, or Flat), or a lower "
            "`min_recall`."
        )
    return {"effort": effort, "recall": round(recall, 4)}


def without_self(distances: Floats, ids: Ints, selves: Ints, *, data: NDArray[np.float16] | None = None) -> tuple[Floats, Ints]:
    """Remove each query itself from its neighbors. If it is not among them, remove the last neighbor.

    Args:
        distances: (n, k + 1) distances.
        ids: (n, k + 1) numbers of the neighbors, negative where nothing was found. The distance becomes infinite there.
        selves: (n,) numbers of the queries.
        data: Vectors to compute the true distances from, because the index may have rounded them. By default the given
            distances are kept.

    Returns:
        (n, k) distances and (n, k) numbers.
    """
    keep = ids != selves[:, None]
    keep[keep.all(1), -1] = False
    shape = (len(ids), ids.shape[1] - 1)
    ids, distances = ids[keep].reshape(shape), distances[keep].reshape(shape)
    if data is not None:
        own, found = data[selves].astype(np.float32), data[np.maximum(ids, 0)].astype(np.float32)
        distances = np.square(own[:, None] - found).sum(-1)
    return np.where(ids >= 0, distances, np.inf).astype(np.float32), ids
