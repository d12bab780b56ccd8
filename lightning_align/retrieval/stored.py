"""Refinement by stored vectors: an index with packed codes finds candidates, and the vectors of stage 2 compare them.

Only the vectors of the candidates are read from their file, so memory stays that of the packed codes. A factory string that
ends in ``,Stored`` asks for it, such as ``OPQ64_256,IVF65536_HNSW32,PQ64,Stored``. faiss has no such part: it would hold the
vectors, or write them to the file of the index again.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_align.retrieval.faiss_seam import is_ivf, load_faiss
from lightning_align.retrieval.tables import Floats, Ints

SUFFIX = ",Stored"
CANDIDATES = 32
"""Minimum number of candidates per neighbor."""
_VALUES = 1 << 22
"""Values of vectors that are compared at a time."""


class Factory(NamedTuple):
    """The parts of a factory string."""

    faiss: str
    """What faiss creates."""
    is_stored: bool
    """Whether stored vectors refine what it finds."""


def split_factory(factory: str) -> Factory:
    """Return the parts of a factory string."""
    return Factory(factory.removesuffix(SUFFIX), factory.endswith(SUFFIX))


def num_stored_candidates(index: Any, effort: int) -> int:
    """Return the number of candidates per neighbor. It grows once a search visits half of the lists."""
    if not is_ivf(index):
        return CANDIDATES * max(1, effort)
    return CANDIDATES * max(1, 4 * effort // int(load_faiss().extract_index_ivf(index).nlist))


def max_stored_effort(effort: int) -> int:
    """Return the largest effort that has an effect, given that of the index alone."""
    return 16 * effort


def stored_distances(vectors: NDArray[np.float16], queries: Floats, ids: Ints) -> Floats:
    """Compute the squared distances (n, k) of queries (n, d) to stored vectors (n, k). It is infinite for negative ids.

    Args:
        vectors: (C, d) vectors, which can be memory-mapped.
        queries: (n, d) queries.
        ids: (n, k) numbers of vectors.
    """
    result = np.full(ids.shape, np.inf, dtype=np.float32)
    step = max(1, _VALUES // max(1, ids.shape[1] * queries.shape[1]))
    for start in range(0, len(ids), step):
        part = ids[start : start + step]
        gaps = vectors[np.maximum(part, 0)].astype(np.float32)
        gaps -= queries[start : start + step, None]
        result[start : start + step] = np.where(part >= 0, np.einsum("nkd,nkd->nk", gaps, gaps), np.inf)
    return result


def search_stored(index: Any, vectors: NDArray[np.float16], queries: Floats, k: int, effort: int) -> tuple[Floats, Ints]:
    """Find the k nearest (n, k) of the candidates that an index finds. Equally near ones come in order of their numbers."""
    number = min(num_stored_candidates(index, effort) * k, len(vectors))
    _, ids = index.search(queries, number)
    distances = stored_distances(vectors, queries, ids)
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(ids, order, axis=1)
