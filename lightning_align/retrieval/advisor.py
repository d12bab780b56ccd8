"""Which index suits how many vectors: a factory string, its size, the time it takes; and a refusal of what cannot be trained.

The strings follow faiss's guidelines and, above ten million vectors, what InstructRetro (arXiv 2310.07713) used.
"""

import math
import os
from typing import Any, NamedTuple

from lightning_align.retrieval.faiss_seam import load_faiss

POINTS_PER_CENTROID = 39
"""Below it faiss warns; centroids are then nearly the training points themselves."""
COMFORTABLE_POINTS = 64
CORE_FLOPS = 5e10
"""Of one CPU core in float32 matrix products."""
GPU_FLOPS = 2e13


class Advice(NamedTuple):
    """What to build, and what it costs."""

    factory: str
    num_bytes: int
    """Of the file."""
    hours: float
    """To train and fill it; an estimate of the order of magnitude."""


class Training(NamedTuple):
    """Vectors that training takes."""

    least: int
    comfortable: int


def advise(num: int, dim: int, *, memory: int | None = None, cores: int | None = None, num_gpus: int = 0) -> Advice:
    """Choose an index.

    Args:
        num: vectors.
        dim: of each.
        memory: bytes that the index may take; by default half of the machine's memory.
        cores: that build it; by default those of the machine.
        num_gpus: that train it.

    Raises:
        ValueError: if none fits into the memory.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if memory is None else memory
    cores = os.cpu_count() or 1 if cores is None else cores
    subs = max(size for size in (64, 32, 16, 8, 4, 2, 1) if 4 * size <= max(dim, 4))
    squashed = f"OPQ{subs}_{min(dim, 4 * subs)}"
    lists = 65536 if num <= 10**7 else 262144 if num <= 10**8 else 1048576 if num <= 10**9 else 4194304
    small = 2 ** round(math.log2(max(1.0, 8 * math.sqrt(num))))
    coarse = f"IVF{small}" if num < POINTS_PER_CENTROID * 65536 else f"IVF{lists}_HNSW32"
    if num <= 200_000 or (num_gpus and num <= 2_000_000):
        candidates = ["Flat", f"{coarse},SQ8", f"{squashed},{coarse},PQ{subs}"]
    elif num <= 2_000_000:
        candidates = [f"{coarse},SQ8", f"{squashed},{coarse},PQ{subs}"]
    else:
        candidates = [f"{squashed},{coarse},PQ{subs}", f"{squashed},{coarse},PQ{subs}x4fsr"]
    for factory in candidates:
        size = index_bytes(factory, num, dim)
        if size <= memory:
            flops = GPU_FLOPS * num_gpus or CORE_FLOPS * cores
            return Advice(factory, size, _hours(factory, num, dim, flops))
    raise ValueError(
        f"no index of {num:,} vectors of {dim} dimensions fits into {memory / 2**30:.1f} GiB: {candidates[-1]} takes "
        f"{index_bytes(candidates[-1], num, dim) / 2**30:.1f} GiB; give the factory string to build it all the same, spread "
        "the chunks over several databases, or use an encoder with fewer dimensions"
    )


def check_training(index: Any, factory: str, num: int, dim: int) -> None:
    """Refuse an index that there are too few vectors to train.

    Raises:
        ValueError: saying which to take.
    """
    need = needed_to_train(index)
    if num < need.least:
        raise ValueError(
            f"the index {factory} needs {need.least:,} vectors to train ({POINTS_PER_CENTROID} a centroid), there are {num:,}: "
            f"take {advise(num, dim).factory}, which auto chooses, or add documents"
        )


def needed_to_train(index: Any) -> Training:
    """Vectors that an untrained index needs: so many for each of its centroids."""
    faiss = load_faiss()

    index = faiss.downcast_index(index)
    centroids = 0
    if isinstance(index, faiss.IndexPreTransform):
        transforms = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
        opq = [256 for transform in transforms if isinstance(transform, faiss.OPQMatrix)]
        inside = needed_to_train(index.index)
        centroids = max([inside.least // POINTS_PER_CENTROID, *opq])
    elif (ivf := faiss.try_extract_index_ivf(index)) is not None:
        centroids = ivf.nlist
    pq = getattr(index, "pq", None)
    if pq is not None:
        centroids = max(centroids, 1 << pq.nbits)
    return Training(POINTS_PER_CENTROID * centroids, max(COMFORTABLE_POINTS * centroids, 1 << 16))


def index_bytes(factory: str, num: int, dim: int) -> int:
    """Bytes of the file of an index, without building it.

    Args:
        factory: a factory string.
        num: vectors.
        dim: of each.
    """
    faiss = load_faiss()

    index = faiss.index_factory(dim, factory)  # by name, for what `_bytes` looks at belongs to it
    return _bytes(index, num)


def _bytes(index: Any, num: int) -> int:
    faiss = load_faiss()

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        transforms = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
        return sum(4 * int(transform.d_in * transform.d_out) for transform in transforms) + _bytes(index.index, num)
    if isinstance(index, faiss.IndexIDMap):
        return 8 * num + _bytes(index.index, num)
    if isinstance(index, faiss.IndexRefine):
        return _bytes(index.base_index, num) + _bytes(index.refine_index, num)
    if isinstance(index, faiss.IndexHNSW):
        links = index.hnsw.nb_neighbors(0), index.hnsw.nb_neighbors(1)
        # A node is on level l with probability M^-l; each has its level (4 bytes) and an offset (8).
        upper = links[1] / max(1, links[1] - 1)
        return int(num * (4 * (links[0] + upper) + 12)) + _bytes(index.storage, num)
    if isinstance(index, faiss.IndexIVF):
        codebook = _codebook(index)
        return num * (int(index.code_size) + 8) + 8 * int(index.nlist) + codebook + _bytes(index.quantizer, index.nlist)
    return num * int(index.sa_code_size()) + _codebook(index)


def _codebook(index: Any) -> int:
    """Bytes of the centroids of a product quantiser."""
    return 4 * int(index.pq.M * index.pq.ksub * index.pq.dsub) if hasattr(index, "pq") else 0


def _hours(factory: str, num: int, dim: int, flops: float) -> float:
    """k-means of 20 rounds and 64 points a list, then the assignment of each vector; through a graph that is far cheaper."""
    part = next((part for part in factory.split(",") if part.startswith("IVF")), "")
    if not part:
        return num * dim / flops / 3600
    lists = int("".join(c for c in part[3:].split("_")[0] if c.isdigit()))
    training = 2.0 * COMFORTABLE_POINTS * lists * lists * dim * 20
    assigned = min(lists, 20_000) if "HNSW" in part else lists
    return (training + 2.0 * num * assigned * dim) / flops / 3600
