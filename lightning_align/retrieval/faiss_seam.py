"""What differs between the kinds of faiss's indexes, and between its two packages.

``import faiss`` is faiss-cpu or faiss-gpu, whichever is installed. It is imported where it is used, and never in the workers of
a loader: the threads that it has started do not survive a fork.
"""

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_EFFORT = 1 << 16
"""Candidates of a graph search; no recall worth having needs more."""
CANDIDATES = 8
"""Candidates for each neighbor wanted, at least, whose distances an index that refines (RFlat) computes from better copies."""


def load_faiss() -> ModuleType:
    """The module ``faiss``.

    Raises:
        ValueError: if neither of its packages is installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            "dense retrieval needs faiss, and neither of its packages is installed: pip install 'lightning-align[cpu]', or "
            "with a CUDA device 'lightning-align[gpu]' (never both: they overwrite each other). Without it: encoder bm25"
        ) from error
    module: ModuleType = faiss
    return module


def num_gpus() -> int:
    """GPUs that the installed faiss can use."""
    return int(getattr(load_faiss(), "get_num_gpus", lambda: 0)())


def is_ivf(index: Any) -> bool:
    """Whether vectors are kept in lists, a few of which are looked at."""
    return load_faiss().try_extract_index_ivf(index) is not None


def set_effort(index: Any, effort: int) -> None:
    """Have searches look at more of an index: lists of an IVF, candidates of a graph. Exact ones know no effort."""
    faiss = load_faiss()
    space = faiss.ParameterSpace()
    if refines(index):
        faiss.downcast_index(index).k_factor = num_candidates(
            index, effort
        )  # at 1, what faiss sets, nothing is gained by refining
    if is_ivf(index):
        space.set_index_parameter(index, "nprobe", min(effort, faiss.extract_index_ivf(index).nlist))
        if isinstance(faiss.downcast_index(faiss.extract_index_ivf(index).quantizer), faiss.IndexHNSW):
            space.set_index_parameter(index, "quantizer_efSearch", max(16, 2 * effort))
    elif isinstance(inner(index), faiss.IndexHNSW):
        space.set_index_parameter(index, "efSearch", max(16, effort))


def max_effort(index: Any) -> int:
    """The effort from which on more of it changes nothing."""
    faiss = load_faiss()
    if is_ivf(index):
        return int(faiss.extract_index_ivf(index).nlist) * (16 if refines(index) else 1)
    return min(int(index.ntotal), MAX_EFFORT) if isinstance(inner(index), faiss.IndexHNSW) else 1


def inner(index: Any) -> Any:
    """The index behind a refinement and a pre-transform, if there are any."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return inner(index.base_index)
    return inner(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def refines(index: Any) -> bool:
    """Whether candidates of one index are compared by the vectors of another, which keeps them better."""
    faiss = load_faiss()
    return isinstance(faiss.downcast_index(index), faiss.IndexRefine)


def num_candidates(index: Any, effort: int) -> int:
    """Candidates for each neighbor that an index which refines compares: more and more from a quarter of all lists on."""
    faiss = load_faiss()
    return CANDIDATES * max(1, 4 * effort // faiss.extract_index_ivf(index).nlist) if is_ivf(index) else CANDIDATES


def merge(index: Any, shard: Any) -> None:
    """Move the vectors of an index to the end of another that was trained alike.

    Raises:
        RuntimeError: if its kind cannot be put together, as graphs (HNSW).
    """
    if not refines(index):
        index.merge_from(shard, index.ntotal if is_ivf(index) else 0)
        return
    # Under names of their own: what downcast_index returns does not keep its argument alive.
    both, other = load_faiss().downcast_index(index), load_faiss().downcast_index(shard)
    merge(both.base_index, other.base_index)
    merge(both.refine_index, other.refine_index)
    both.ntotal = both.base_index.ntotal


def flat_vectors(index: Any) -> NDArray[np.float32] | None:
    """(C, d) the vectors of an index that keeps them as they are and compares all of them by Euclidean distance, else None."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if type(index) not in (faiss.IndexFlat, faiss.IndexFlatL2) or index.metric_type != faiss.METRIC_L2 or not index.ntotal:
        return None
    vectors: NDArray[np.float32] = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(-1, index.d)
    return vectors


def pair_distances(index: Any, queries: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """(n, k) squared distances of queries (n, d) to the vectors (n, k) of an index, as it keeps them."""
    faiss = load_faiss()
    if flat_vectors(index) is None:
        vectors = index.reconstruct_batch(ids.reshape(-1)).reshape(*ids.shape, -1)
        vectors -= queries[:, None]
        squares: NDArray[np.float32] = np.einsum("nkd,nkd->nk", vectors, vectors)
        return squares
    distances = np.empty(ids.shape, dtype=np.float32)
    points, numbers = np.ascontiguousarray(queries), np.ascontiguousarray(ids)
    x, result, labels = (faiss.swig_ptr(array) for array in (points, distances, numbers))
    faiss.downcast_index(index).compute_distance_subset(len(ids), x, ids.shape[1], result, labels)
    return distances


def free_neighbors(index: Any, effort: int) -> int:
    """How many neighbors a search may be asked for at no cost: the candidates of a graph, which it keeps anyway."""
    return max(16, effort) if isinstance(inner(index), load_faiss().IndexHNSW) else 0


def search_parameters(index: Any, selector: Any, effort: int) -> Any:
    """Parameters of one search that returns only what a selector allows; None if the index knows no such searches."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inside = search_parameters(index.index, selector, effort)
        return inside and faiss.SearchParametersPreTransform(index_params=inside)
    if isinstance(index, faiss.IndexRefine):
        inside = search_parameters(index.base_index, selector, effort)
        return inside and faiss.IndexRefineSearchParameters(k_factor=num_candidates(index, effort), base_index_params=inside)
    if is_ivf(index):
        return faiss.SearchParametersIVF(sel=selector, nprobe=min(effort, faiss.extract_index_ivf(index).nlist))
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=max(16, effort))
    return None if isinstance(index, faiss.IndexFastScan) else faiss.SearchParameters(sel=selector)
