"""Differences between the index types of faiss, and between its two packages.

``import faiss`` imports faiss-cpu or faiss-gpu, whichever is installed. It is imported lazily and never in data loader workers,
because the threads that it starts do not survive a fork.
"""

import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_EFFORT = 1 << 16
"""Maximum number of candidates of a graph search. No useful recall needs more."""
CANDIDATES = 8
"""Minimum number of candidates per neighbor that a refining index (RFlat) compares by its more precise vectors."""


def load_faiss() -> ModuleType:
    """Import ``faiss``.

    Raises:
        ValueError: If neither of its packages is installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            "Dense retrieval needs faiss, but neither of its packages is installed. Run pip install 'lightning-align[cpu]', or "
            "with a CUDA device 'lightning-align[gpu]' (never both: they overwrite each other). Or use the encoder bm25."
        ) from error
    module: ModuleType = faiss
    return module


def num_gpus() -> int:
    """Return the number of GPUs that the installed faiss can use."""
    return int(getattr(load_faiss(), "get_num_gpus", lambda: 0)())


def is_ivf(index: Any) -> bool:
    """Whether vectors are in inverted lists, of which a search visits a few."""
    return load_faiss().try_extract_index_ivf(index) is not None


def set_effort(index: Any, effort: int) -> None:
    """Set how much of an index a search visits: lists of an IVF index, candidates of a graph. Exact indexes ignore it."""
    faiss = load_faiss()
    space = faiss.ParameterSpace()
    if refines(index):
        # With the default of faiss, 1, refining has no effect.
        faiss.downcast_index(index).k_factor = num_candidates(index, effort)
    if is_ivf(index):
        space.set_index_parameter(index, "nprobe", min(effort, faiss.extract_index_ivf(index).nlist))
        if isinstance(faiss.downcast_index(faiss.extract_index_ivf(index).quantizer), faiss.IndexHNSW):
            space.set_index_parameter(index, "quantizer_efSearch", max(16, 2 * effort))
    elif isinstance(inner(index), faiss.IndexHNSW):
        space.set_index_parameter(index, "efSearch", max(16, effort))


def max_effort(index: Any) -> int:
    """Return the largest effort that has an effect."""
    faiss = load_faiss()
    if is_ivf(index):
        return int(faiss.extract_index_ivf(index).nlist) * (16 if refines(index) else 1)
    return min(int(index.ntotal), MAX_EFFORT) if isinstance(inner(index), faiss.IndexHNSW) else 1


def inner(index: Any) -> Any:
    """Return the index inside of a refinement and a pre-transform, if there are any."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return inner(index.base_index)
    return inner(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def refines(index: Any) -> bool:
    """Whether the candidates of a base index are compared by the more precise vectors of a second index."""
    faiss = load_faiss()
    return isinstance(faiss.downcast_index(index), faiss.IndexRefine)


def num_candidates(index: Any, effort: int) -> int:
    """Return the number of candidates per neighbor that a refining index compares.

    For an IVF index it grows with the effort once a search visits a quarter of the lists.
    """
    faiss = load_faiss()
    return CANDIDATES * max(1, 4 * effort // faiss.extract_index_ivf(index).nlist) if is_ivf(index) else CANDIDATES


def merge(index: Any, shard: Any) -> None:
    """Move the vectors of a shard to the end of an index that was trained in the same way.

    Args:
        index: Receives the vectors.
        shard: Provides the vectors.

    Raises:
        RuntimeError: If indexes of this type cannot be merged, such as graphs (HNSW).
    """
    if not refines(index):
        index.merge_from(shard, index.ntotal if is_ivf(index) else 0)
        return
    # Keep references to both: the result of downcast_index does not keep its argument alive.
    both, other = load_faiss().downcast_index(index), load_faiss().downcast_index(shard)
    merge(both.base_index, other.base_index)
    merge(both.refine_index, other.refine_index)
    both.ntotal = both.base_index.ntotal


def has_plain_lists(index: Any) -> bool:
    """Whether an index consists of inverted lists of codes, without packed codes and without vectors to refine by."""
    return is_ivf(index) and not refines(index) and not is_fast_scan(index)


def lists_on_disk(index: Any) -> bool:
    """Whether the inverted lists of an index can be written to its file list by list, see `write_merged`."""
    return has_plain_lists(index) and _head(index) is not None


def _head(index: Any) -> bytes | None:
    """Return the content of the file of an index up to its inverted lists. None if lists are not the end of the file."""
    faiss = load_faiss()
    ivf = faiss.extract_index_ivf(index)
    lists, owned = ivf.invlists, ivf.own_invlists
    empty = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    ivf.own_invlists = False  # or the lists would be deleted
    ivf.replace_invlists(empty, False)
    content: bytes = faiss.serialize_index(index).tobytes()
    ivf.replace_invlists(lists, owned)
    tail = b"ilar" + struct.pack("<QQ", ivf.nlist, ivf.code_size) + b"sprs" + struct.pack("<Q", 0)
    return content.removesuffix(tail) if content.endswith(tail) else None


def is_fast_scan(index: Any) -> bool:
    """Whether an index, or the base of a refining one, packs the codes of several vectors together."""
    faiss = load_faiss()
    ivf = faiss.try_extract_index_ivf(index)
    return isinstance(inner(index) if ivf is None else faiss.downcast_index(ivf), (faiss.IndexFastScan, faiss.IndexIVFFastScan))


def emptied(path: Path) -> Any:
    """Read an index of plain lists without what is in them."""
    faiss = load_faiss()
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    ivf = faiss.extract_index_ivf(index)
    lists = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    ivf.replace_invlists(lists, True)
    lists.this.disown()  # the index owns it
    ivf.ntotal = index.ntotal = 0
    return index


def write_merged(index: Any, shards: list[Path], path: Path) -> None:
    """Write an index whose inverted lists are those of shards one after another. Memory does not grow with the lists.

    Args:
        index: An index that was trained like the shards.
        shards: Files of the shards. They are memory-mapped. Their vectors have the numbers that they will have.
        path: The file to write.
    """
    faiss = load_faiss()
    parts = [faiss.read_index(str(shard), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY) for shard in shards]
    lists = [faiss.extract_index_ivf(part).invlists for part in parts]
    ivf = faiss.extract_index_ivf(index)
    ivf.ntotal = index.ntotal = sum(part.ntotal for part in parts)
    head = _head(index)
    assert head is not None
    sizes = np.array([[part.list_size(number) for part in lists] for number in range(ivf.nlist)], dtype=np.uint64)
    width = int(ivf.code_size)
    with path.open("wb") as file:
        file.write(head + b"ilar" + struct.pack("<QQ", ivf.nlist, width) + b"full" + struct.pack("<Q", ivf.nlist))
        file.write(sizes.sum(1).astype(np.uint64).data)
        for number, some in enumerate(sizes.tolist()):
            filled = [(part, size) for part, size in zip(lists, some, strict=True) if size]
            for part, size in filled:
                file.write(faiss.rev_swig_ptr(part.get_codes(number), size * width).data)
            for part, size in filled:
                file.write(faiss.rev_swig_ptr(part.get_ids(number), size).data)


def is_flat(index: Any) -> bool:
    """Whether an index is exact (Flat, Euclidean distance)."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    return type(index) in (faiss.IndexFlat, faiss.IndexFlatL2) and index.metric_type == faiss.METRIC_L2


def flat_vectors(index: Any) -> NDArray[np.float32] | None:
    """Return the vectors (C, d) of an exact index (Flat, Euclidean distance), or None for another index or an empty index."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if not is_flat(index) or not index.ntotal:
        return None
    vectors: NDArray[np.float32] = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(-1, index.d)
    return vectors


def pair_distances(index: Any, queries: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Compute the squared distances (n, k) of queries (n, d) to the vectors with the ids (n, k), as the index stores them."""
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
    """Return how many neighbors a search returns at no extra cost: the candidates of a graph, which it has to find anyway."""
    return max(16, effort) if isinstance(inner(index), load_faiss().IndexHNSW) else 0


def search_parameters(index: Any, selector: Any, effort: int) -> Any:
    """Create the parameters of a search that returns only what a selector allows, or None if the index does not support it."""
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
