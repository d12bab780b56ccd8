"""Stage 3: a faiss index over the vectors of all chunks, trained on a uniform sample, filled in shards, measured."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its stubs are a package of their own

from lightning_align.retrieval.advisor import advise, check_training, needed_to_train
from lightning_align.retrieval.encoders import read_vectors
from lightning_align.retrieval.faiss_seam import is_ivf, load_faiss, max_effort, merge, num_gpus, set_effort
from lightning_align.retrieval.stages import Stage, Team
from lightning_align.retrieval.tables import Floats, Ints
from lightning_align.runtime.files import publish

FORMAT = 1
"""Raise it when the same settings come to mean other bytes."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """How chunks are found again.

    Args:
        factory: string of faiss's index_factory, or auto: what suits the number of vectors.
        min_recall: share of the true nearest chunks that the index must find; how much of it a search looks at is raised
            until it does.
        recall_at: of how many nearest chunks.
        shard_size: vectors that are added at a time, each shard by one rank.
        seed: of the samples that the index is trained and measured on.
    """

    factory: str = "auto"
    min_recall: float = 0.95
    recall_at: int = 2
    shard_size: int = 1 << 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 <= self.min_recall <= 1:
            raise ValueError(f"min_recall is {self.min_recall}, expected a share from 0 to 1")
        for name in ("recall_at", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")


def build_index(root: Path, vectors: Stage, config: IndexConfig, *, team: Team, verify: float) -> Stage:
    """Index all vectors, unless that is done already: ``index.faiss``, with how to search it in the manifest.

    Args:
        root: folder of the database.
        vectors: finished stage.
        config: the index wanted.
        team: the ranks that share the work.
        verify: share of the shards that are made twice and compared.

    Raises:
        ValueError: if faiss is missing or does not know the factory string, there are too few vectors to train it, or it does
            not reach the recall wanted.
    """
    load_faiss()
    data = read_vectors(vectors)
    num, dim = data.shape
    factory = advise(num, dim, num_gpus=num_gpus()).factory if config.factory == "auto" else config.factory
    settings = {**asdict(config), "factory": factory}
    stage = Stage(root, "index", {"format": FORMAT, "vectors": vectors.key, "config": settings})
    with team.together():
        done = team.rank == 0 and stage.is_finished(verify=verify > 0)
    if team.tell(done):
        return stage
    with team.together():
        if team.rank == 0 and not stage.has_block(0):
            stage.write_block(0, {"index": _dump(_train(data, factory, config))})
    starts = range(0, num, config.shard_size)
    with team.together():
        trained = stage.read_block(0)["index"]
        mergeable = _is_mergeable(trained)
        bar = tqdm(total=len(starts), desc="index", unit=" shards", disable=None if team.rank == 0 else True, leave=False)
        for number, start in enumerate(starts, start=1):
            bar.update()
            if not mergeable or number % team.size != team.rank:
                continue
            if not stage.has_block(number):
                stage.write_block(number, {"index": _shard(trained, data[start : start + config.shard_size])})
            if stage.is_sampled(number, verify):
                stage.check_block(number, {"index": _shard(trained, data[start : start + config.shard_size])})
        bar.close()
    with team.together():
        if team.rank == 0:
            index = _load(trained)
            for number, start in enumerate(starts, start=1):
                if mergeable:
                    shard = _load(stage.read_block(number)["index"])
                    merge(index, shard)
                else:
                    index.add(data[start : start + config.shard_size].astype(np.float32))
            _write(stage, index, data, config, factory)
    return stage


def append_index(root: Path, before: Stage, old: Stage, vectors: Stage, *, team: Team, verify: float) -> Stage:
    """An index with further vectors behind its own; it is not trained again, but its recall is measured again.

    Args:
        root: folder of the database.
        before: the finished index.
        old: the vectors it has.
        vectors: these and the further ones.
        team: the ranks that wait for it.
        verify: whether a finished result is read and compared with its hashes: above 0.

    Raises:
        ValueError: if the index no longer reaches the recall wanted.
    """
    faiss = load_faiss()
    stage = Stage(
        root, "index", {"format": FORMAT, "base": before.key, "vectors": vectors.key, "config": before.inputs["config"]}
    )
    with team.together():
        if team.rank == 0 and not stage.is_finished(verify=verify > 0):
            config, data = IndexConfig(**before.inputs["config"]), read_vectors(vectors)
            index = faiss.read_index(str(before.folder / "index.faiss"))
            for start in range(len(read_vectors(old)), len(data), config.shard_size):
                index.add(data[start : start + config.shard_size].astype(np.float32))
            _write(stage, index, data, config, config.factory)
    return stage


def _write(stage: Stage, index: Any, data: NDArray[np.float16], config: IndexConfig, factory: str) -> None:
    """Measure an index, write it and finish its stage."""
    table = {"factory": factory, **tune(index, data, config, factory=factory)}

    def write(temporary: Path) -> None:
        try:
            load_faiss().write_index(index, str(temporary))
        except RuntimeError as error:  # what faiss makes of a full disk
            raise OSError(str(error).strip().splitlines()[-1]) from error

    publish(stage.folder / "index.faiss", write)
    stage.finish(table=table, counts={"vectors": len(data)}, files=["index.faiss"])


def open_index(stage: Stage) -> Any:
    """The finished index, memory-mapped where its type allows that, set to the search effort that was measured."""
    faiss = load_faiss()
    manifest = stage.manifest()
    assert manifest is not None, f"{stage.folder} is not finished"
    index = faiss.read_index(str(stage.folder / "index.faiss"), faiss.IO_FLAG_MMAP_IFC)
    set_effort(index, manifest["table"]["effort"])
    return index


# -- training and filling


def _train(data: NDArray[np.float16], factory: str, config: IndexConfig) -> Any:
    faiss = load_faiss()
    num, dim = data.shape
    try:
        index = faiss.index_factory(dim, factory)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"faiss cannot make an index {factory!r} of {dim} dimensions ({reason}): use auto, or another factory string"
        ) from error
    if not index.is_trained:
        check_training(index, factory, num, dim)
        wanted = min(num, max(needed_to_train(index).comfortable, 1))
        sample = np.sort(np.random.default_rng(config.seed).choice(num, wanted, replace=False))
        if num_gpus() and is_ivf(index):
            ivf = faiss.extract_index_ivf(index)
            ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(ivf.d))
        index.train(data[sample].astype(np.float32))
    return index


def _shard(trained: NDArray[np.uint8], part: NDArray[np.float16]) -> NDArray[np.uint8]:
    index = _load(trained)
    index.add(part.astype(np.float32))
    return _dump(index)


def _dump(index: Any) -> NDArray[np.uint8]:
    packed: NDArray[np.uint8] = load_faiss().serialize_index(index)
    return packed


def _load(packed: NDArray[np.uint8]) -> Any:
    return load_faiss().deserialize_index(packed)


def _is_mergeable(trained: NDArray[np.uint8]) -> bool:
    """Whether shards can be put together; graphs (HNSW) cannot, and are filled at once."""
    try:
        merge(_load(trained), _load(trained))
    except RuntimeError:
        return False
    return True


# -- recall


def exact_neighbors(data: NDArray[np.float16], queries: Floats, k: int, *, block: int = 1 << 16) -> tuple[Floats, Ints]:
    """(n, k) distances and numbers of the nearest vectors of all, by comparing with each.

    Args:
        data: (C, d), read a block at a time.
        queries: (n, d).
        k: at most C.
        block: vectors in memory at a time.
    """
    faiss = load_faiss()
    heap = faiss.ResultHeap(len(queries), k)
    for start in range(0, len(data), block):
        part = np.ascontiguousarray(data[start : start + block], dtype=np.float32)
        distances, ids = faiss.knn(queries, part, min(k, len(part)))
        heap.add_result(distances, np.where(ids >= 0, ids + start, -1))
    heap.finalize()
    return heap.D, heap.I


def tune(
    index: Any, data: NDArray[np.float16], config: IndexConfig, *, factory: str, num_queries: int = 1000
) -> dict[str, Any]:
    """Raise the effort of a search until the index finds the share of true neighbors that is wanted.

    Args:
        index: filled.
        data: (C, d) its vectors.
        config: what is wanted.
        factory: string that it was made of.
        num_queries: vectors of the index that are looked for; they do not count as their own neighbors.

    Returns:
        ``effort``, for `set_effort`, and the ``recall`` that was measured.

    Raises:
        ValueError: if no effort is enough.
    """
    num = len(data)
    k = min(config.recall_at, num - 1)
    if k == 0:
        return {"effort": 1, "recall": 1.0}
    sample = np.sort(np.random.default_rng(config.seed + 1).choice(num, min(num, num_queries), replace=False))
    queries = data[sample].astype(np.float32)
    distances, ids = exact_neighbors(data, queries, k + 1)
    truth, _ = without_self(distances, ids, sample)
    recall, effort = 0.0, 1
    while True:
        set_effort(index, effort)
        distances, ids = index.search(queries, k + 1)
        found, _ = without_self(distances, ids, sample, data=data)
        # By distance: of equally near chunks, copies often, any will do.
        recall = float((found <= truth[:, -1:] * (1 + 1e-4) + 1e-6).mean())
        if recall >= config.min_recall or effort >= max_effort(index):
            break
        effort *= 2
    if recall < config.min_recall:
        raise ValueError(
            f"the index {factory} finds {recall:.3f} of the {k} nearest chunks at most, min_recall is {config.min_recall}: "
            "take a factory string that keeps more of the vectors (such as SQ8 for PQ, or Flat), or ask for less"
        )
    return {"effort": effort, "recall": round(recall, 4)}


def without_self(distances: Floats, ids: Ints, selves: Ints, *, data: NDArray[np.float16] | None = None) -> tuple[Floats, Ints]:
    """(n, k) of (n, k + 1) found neighbors, each row without its own number, or without its last where that is not there.

    Args:
        distances: (n, k + 1).
        ids: (n, k + 1); negative where nothing was found, whose distance becomes infinite.
        selves: (n,).
        data: where given, the vectors to compute the true distances from; an index may have rounded them.
    """
    keep = ids != selves[:, None]
    keep[keep.all(1), -1] = False
    shape = (len(ids), ids.shape[1] - 1)
    ids, distances = ids[keep].reshape(shape), distances[keep].reshape(shape)
    if data is not None:
        own, found = data[selves].astype(np.float32), data[np.maximum(ids, 0)].astype(np.float32)
        distances = np.square(own[:, None] - found).sum(-1)
    return np.where(ids >= 0, distances, np.inf).astype(np.float32), ids
