"""Recommends an index for a number of vectors, with its size and build time, and checks that an index can be trained.

The factory strings follow the guidelines of faiss. Above ten million vectors they follow InstructRetro (arXiv 2310.07713).
"""

import math
import os
from typing import Any, NamedTuple

from lightning_align.retrieval.faiss_seam import load_faiss
from lightning_align.retrieval.stored import SUFFIX, split_factory

POINTS_PER_CENTROID = 39
"""Minimum number of training vectors per centroid. With fewer, faiss warns and the centroids overfit the training vectors."""
COMFORTABLE_POINTS = 64
"""Recommended number of training vectors per centroid."""
CORE_FLOPS = 5e10
"""FLOP/s of one CPU core in float32 matrix products."""


class Advice(NamedTuple):
    """A recommended index and its cost."""

    factory: str
    """Factory string, see `IndexConfig`."""
    num_bytes: int
    """Size of the file. Stored vectors are not part of it."""
    hours: float
    """Time to train and fill the index, an estimate of the order of magnitude."""


class Training(NamedTuple):
    """The number of vectors that training an index needs."""

    least: int
    """Minimum."""
    comfortable: int
    """Recommended."""


def advise(num: int, dim: int, *, memory: int | None = None, cores: int | None = None) -> Advice:
    """Choose an index. The choice does not depend on GPUs, because indexes are searched on the CPU.

    Args:
        num: The number of vectors.
        dim: Dimensions per vector.
        memory: Bytes that the index may take. Default is half of the machine's memory.
        cores: CPU cores that build the index. Default is all cores of the machine.

    Raises:
        ValueError: If no index fits into the memory.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if memory is None else memory
    cores = os.cpu_count() or 1 if cores is None else cores
    subs = max(size for size in (64, 32, 16, 8, 4, 2, 1) if 4 * size <= max(dim, 4))
    reduced = f"OPQ{subs}_{min(dim, 4 * subs)}"
    lists = 65536 if num <= 10**7 else 262144 if num <= 10**8 else 1048576 if num <= 10**9 else 4194304
    small = 2 ** round(math.log2(max(1.0, 8 * math.sqrt(num))))
    coarse = f"IVF{small}" if num < POINTS_PER_CENTROID * 65536 else f"IVF{lists}_HNSW32"
    if num <= 200_000:
        candidates = ["Flat", f"{coarse},SQ8", f"{reduced},{coarse},PQ{subs}{SUFFIX}"]
    else:
        # A byte per dimension keeps the recall that packed codes lose. With those, stored vectors restore it. Codes of four
        # bits are not chosen: faiss packs them by the sizes of the shards, so their bytes would depend on these.
        half = max(1, subs // 2)
        packed = [f"{reduced},{coarse},PQ{subs}", f"OPQ{half}_{min(dim, 4 * half)},{coarse},PQ{half}"]
        candidates = [f"{coarse},SQ8", *(f"{each}{SUFFIX}" for each in packed)]
    for factory in candidates:
        size = index_bytes(factory, num, dim)
        if size <= memory:
            return Advice(factory, size, _hours(factory, num, dim, CORE_FLOPS * cores))
    raise ValueError(
        f"`memory` must hold an index of {num:,} vectors of {dim} dimensions, but got {memory / 2**30:.1f} GiB. The smallest "
        f"index, {candidates[-1]}, takes {index_bytes(candidates[-1], num, dim) / 2**30:.1f} GiB. Pass this factory string to "
        "build it anyway, split the chunks into several databases, or use an encoder with fewer dimensions."
    )


def check_training(index: Any, factory: str, num: int, dim: int) -> None:
    """Check that there are enough vectors to train an index.

    Args:
        index: The untrained index.
        factory: Its factory string, for the message.
        num: The number of vectors.
        dim: Dimensions per vector.

    Raises:
        ValueError: If there are too few vectors. The message recommends another index.
    """
    needed = needed_to_train(index)
    if num < needed.least:
        raise ValueError(
            f"The index {factory} needs at least {needed.least:,} vectors to train ({POINTS_PER_CENTROID} per centroid), but "
            f"got {num:,}. Use {advise(num, dim).factory}, which auto chooses, or add documents."
        )


def needed_to_train(index: Any) -> Training:
    """Compute the number of training vectors that an untrained index needs, from its number of centroids."""
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
    """Compute the file size of an index in bytes, without building the index.

    Args:
        factory: Factory string of faiss.
        num: The number of vectors.
        dim: Dimensions per vector.
    """
    faiss = load_faiss()

    # Keep a reference: the parts that `_bytes` looks at belong to this object.
    index = faiss.index_factory(dim, split_factory(factory).faiss)
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
        # A node is on level l with probability M^-l. Each node stores its level (4 bytes) and an offset (8 bytes).
        upper = links[1] / max(1, links[1] - 1)
        return int(num * (4 * (links[0] + upper) + 12)) + _bytes(index.storage, num)
    if isinstance(index, faiss.IndexIVF):
        codebook = _codebook_bytes(index)
        return num * (int(index.code_size) + 8) + 8 * int(index.nlist) + codebook + _bytes(index.quantizer, index.nlist)
    return num * int(index.sa_code_size()) + _codebook_bytes(index)


def _codebook_bytes(index: Any) -> int:
    """Compute the bytes of the centroids of a product quantizer."""
    return 4 * int(index.pq.M * index.pq.ksub * index.pq.dsub) if hasattr(index, "pq") else 0


def _hours(factory: str, num: int, dim: int, flops: float) -> float:
    """Estimate the hours of k-means (20 iterations, 64 vectors per list) and of assigning each vector to a list.

    With an HNSW graph over the lists, the assignment is much cheaper.
    """
    part = next((part for part in factory.split(",") if part.startswith("IVF")), "")
    if not part:
        return num * dim / flops / 3600
    lists = int("".join(c for c in part[3:].split("_")[0] if c.isdigit()))
    training = 2.0 * COMFORTABLE_POINTS * lists * lists * dim * 20
    assigned = min(lists, 20_000) if "HNSW" in part else lists
    return (training + 2.0 * num * assigned * dim) / flops / 3600
