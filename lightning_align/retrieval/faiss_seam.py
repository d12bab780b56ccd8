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
    if is_ivf(index):
        space.set_index_parameter(index, "nprobe", effort)
        if isinstance(faiss.downcast_index(faiss.extract_index_ivf(index).quantizer), faiss.IndexHNSW):
            space.set_index_parameter(index, "quantizer_efSearch", max(16, 2 * effort))
    elif isinstance(inner(index), faiss.IndexHNSW):
        space.set_index_parameter(index, "efSearch", max(16, effort))


def max_effort(index: Any) -> int:
    """The effort from which on more of it changes nothing."""
    faiss = load_faiss()
    if is_ivf(index):
        return int(faiss.extract_index_ivf(index).nlist)
    return min(int(index.ntotal), MAX_EFFORT) if isinstance(inner(index), faiss.IndexHNSW) else 1


def inner(index: Any) -> Any:
    """The index behind a pre-transform, if there is one."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def flat_vectors(index: Any) -> NDArray[np.float32] | None:
    """(C, d) the vectors of an index that keeps them as they are and compares all of them by Euclidean distance, else None."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if type(index) not in (faiss.IndexFlat, faiss.IndexFlatL2) or index.metric_type != faiss.METRIC_L2 or not index.ntotal:
        return None
    vectors: NDArray[np.float32] = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(-1, index.d)
    return vectors


def free_neighbors(index: Any, effort: int) -> int:
    """How many neighbors a search may be asked for at no cost: the candidates of a graph, which it keeps anyway."""
    return max(16, effort) if isinstance(inner(index), load_faiss().IndexHNSW) else 0


def search_parameters(index: Any, selector: Any, effort: int) -> Any:
    """Parameters of one search that returns only what a selector allows."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=search_parameters(index.index, selector, effort))
    if is_ivf(index):
        return faiss.SearchParametersIVF(sel=selector, nprobe=effort)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=max(16, effort))
    return faiss.SearchParameters(sel=selector)
