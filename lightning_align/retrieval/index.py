"""Stage 3: a faiss index over the vectors of all chunks. It is trained on a uniform sample, filled in shards, and measured."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lightning_align.retrieval.advisor import advise, check_training, needed_to_train
from lightning_align.retrieval.encoders import read_vectors
from lightning_align.retrieval.faiss_seam import (
    emptied,
    has_plain_lists,
    is_fast_scan,
    is_flat,
    is_ivf,
    lists_on_disk,
    load_faiss,
    merge,
    num_gpus,
    set_effort,
    write_merged,
)
from lightning_align.retrieval.recall import tune
from lightning_align.retrieval.stages import Stage, Team
from lightning_align.retrieval.stored import split_factory
from lightning_align.runtime.files import publish

FORMAT = 2
"""Version of the file format. Increase it when the same settings lead to other bytes."""


_ADDED = 1 << 15
"""Vectors that are added at a time to an index in memory."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Settings of the index.

    Args:
        factory: Factory string of faiss (``index_factory``). With ``,Stored`` at its end, the stored vectors compare the
            candidates that it finds. Default is auto, which chooses by the number of vectors.
        min_recall: Fraction of the true nearest chunks that the index must find. Searches visit more of the index until it is
            reached. Default is 0.95.
        recall_at: The number of nearest chunks that the recall is measured on. Default is 2.
        shard_size: Vectors per shard. Each shard is added by one rank. Default is 262144.
        seed: Seed of the samples that the index is trained and measured on. Default is 0.
    """

    factory: str = "auto"
    min_recall: float = 0.95
    recall_at: int = 2
    shard_size: int = 1 << 18
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 <= self.min_recall <= 1:
            raise ValueError(f"`min_recall` must be from 0 to 1, but got {self.min_recall}.")
        for name in ("recall_at", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but got {getattr(self, name)}.")


def build_index(root: Path, vectors: Stage, config: IndexConfig, *, team: Team, verify: float) -> Stage:
    """Build the index ``index.faiss``, unless the finished stage exists. The manifest has the effort to search it with.

    Args:
        root: Folder of the database.
        vectors: The finished vector stage.
        config: Settings of the index.
        team: The ranks that share the work.
        verify: Fraction of the shards that are computed twice and compared.

    Raises:
        ValueError: If faiss is not installed or does not know the factory string, there are too few vectors to train the index,
            or it does not reach the recall.
    """
    load_faiss()
    data = read_vectors(vectors)
    num, dim = data.shape
    factory = config.factory
    if factory == "auto":
        # The advice depends on the memory of the machine. On nodes that differ, ranks would look for different stages.
        with team.together():
            factory = advise(num, dim).factory if team.rank == 0 else factory
        factory = team.share(factory)
    settings = {**asdict(config), "factory": factory}
    stage = Stage(root, "index", {"format": FORMAT, "vectors": vectors.key, "config": settings})
    with team.together():
        done = team.rank == 0 and stage.is_finished(verify=verify > 0)
    if team.share(done):
        return stage
    with team.together():
        if team.rank == 0 and not stage.has_block(0):
            stage.write_block(0, {"index": _dump(_train(data, split_factory(factory).faiss, config))})
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
                stage.write_block(number, {"index": _shard(trained, data[start : start + config.shard_size], start)})
            if stage.is_sampled(number, verify):
                stage.check_block(number, {"index": _shard(trained, data[start : start + config.shard_size], start)})
        bar.close()
    with team.together():
        if team.rank == 0:
            index = _load(trained)
            if mergeable and lists_on_disk(index):
                with _shard_files(stage, (stage.read_block(number)["index"] for number in range(1, len(starts) + 1))) as files:
                    _write(stage, index, data, config, factory, shards=files)
                return stage
            if mergeable:
                for number in range(1, len(starts) + 1):
                    merge(index, _load(stage.read_block(number)["index"]))
            else:
                _add(index, data, config)
            _write(stage, index, data, config, factory)
    return stage


@contextmanager
def _shard_files(stage: Stage, shards: Iterable[NDArray[np.uint8]], *, before: Path | None = None) -> Iterator[list[Path]]:
    """Write shards to files that can be mapped, after a file that exists. The files are deleted at the end."""
    files = [] if before is None else [before]
    stage.folder.mkdir(parents=True, exist_ok=True)
    try:
        for shard in shards:
            path = stage.folder / f".shard-{len(files)}.tmp"
            shard.tofile(path)
            files.append(path)
        yield files
    except OSError as error:
        raise ValueError(f"{stage.folder} cannot be written ({error.strerror or error}). Free disk space.") from error
    finally:
        for path in files[before is not None :]:
            path.unlink(missing_ok=True)


def _add(index: Any, data: NDArray[np.float16], config: IndexConfig, *, start: int = 0) -> None:
    """Add vectors to an index in memory, a part at a time."""
    step = min(config.shard_size, _ADDED)
    for first in range(start, len(data), step):
        index.add(data[first : first + step].astype(np.float32))


def append_index(root: Path, before: Stage, old: Stage, vectors: Stage, *, team: Team, verify: float) -> Stage:
    """Append vectors to an index. The index is not trained again, but its recall is measured again.

    Args:
        root: Folder of the database.
        before: The finished index stage.
        old: The vectors in it.
        vectors: The same vectors followed by the new vectors.
        team: The ranks. Rank 0 does the work and the others wait.
        verify: If above 0, the files of a finished stage are compared with their hashes.

    Raises:
        ValueError: If the index no longer reaches the recall.
    """
    faiss = load_faiss()
    stage = Stage(
        root, "index", {"format": FORMAT, "base": before.key, "vectors": vectors.key, "config": before.inputs["config"]}
    )
    with team.together():
        if team.rank == 0 and not stage.is_finished(verify=verify > 0):
            config, data = IndexConfig(**before.inputs["config"]), read_vectors(vectors)
            first = before.folder / "index.faiss"
            index = faiss.read_index(str(first), faiss.IO_FLAG_MMAP)
            if lists_on_disk(index):
                index = emptied(first)
                trained = _dump(index)
                starts = range(len(read_vectors(old)), len(data), config.shard_size)
                shards = (_shard(trained, data[start : start + config.shard_size], start) for start in starts)
                with _shard_files(stage, shards, before=first) as files:
                    _write(stage, index, data, config, config.factory, shards=files)
            else:
                index = faiss.read_index(str(first))
                _add(index, data, config, start=len(read_vectors(old)))
                _write(stage, index, data, config, config.factory)
    return stage


def _write(
    stage: Stage,
    index: Any,
    data: NDArray[np.float16],
    config: IndexConfig,
    factory: str,
    *,
    shards: list[Path] | None = None,
) -> None:
    """Write an index, measure its recall, and finish its stage.

    Args:
        stage: The stage.
        index: The index. With shards, it is trained and empty.
        data: (C, d) vectors of the index.
        config: Settings with the recall to reach.
        factory: Factory string of the index.
        shards: Files of the shards that the index consists of.
    """
    path = stage.folder / "index.faiss"

    def write(temporary: Path) -> None:
        if shards is not None:
            write_merged(index, shards, temporary)
            return
        try:
            load_faiss().write_index(index, str(temporary))
        except RuntimeError as error:  # faiss raises this if the disk is full
            raise OSError(str(error).strip().splitlines()[-1]) from error

    publish(path, write)
    filled = index if shards is None else _read(path)
    table = {"factory": factory, **tune(filled, data, config, factory=factory)}
    stage.finish(table=table, counts={"vectors": len(data)}, files=["index.faiss"])


def open_index(stage: Stage) -> Any:
    """Open a finished index with its measured search effort. It is memory-mapped if its type supports that."""
    index = _read(stage.folder / "index.faiss")
    set_effort(index, stage.setting("effort", int))
    return index


def _read(path: Path) -> Any:
    """Read an index. Flat vectors, or inverted lists, stay in the file."""
    faiss = load_faiss()
    with path.open("rb") as file:
        is_exact = file.read(4) in (b"IxF2", b"IxFI")  # these are not read twice
    index = None if is_exact else faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    if index is None or not has_plain_lists(index):
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    faiss.downcast_InvertedLists(faiss.extract_index_ivf(index).invlists).prefetch_nthread = 0
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
            f"`factory` must be a factory string of faiss, but got {factory!r}, which faiss cannot create with {dim} "
            f"dimensions ({reason}). Use auto, or another factory string."
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


def _shard(trained: NDArray[np.uint8], part: NDArray[np.float16], start: int) -> NDArray[np.uint8]:
    index, step = _load(trained), min(len(part), _ADDED)
    for first in range(0, len(part), max(step, 1)):
        some = part[first : first + step].astype(np.float32)
        if lists_on_disk(index):
            index.add_with_ids(some, np.arange(start + first, start + first + len(some)))
        else:
            index.add(some)
    return _dump(index)


def _dump(index: Any) -> NDArray[np.uint8]:
    packed: NDArray[np.uint8] = load_faiss().serialize_index(index)
    return packed


def _load(packed: NDArray[np.uint8]) -> Any:
    return load_faiss().deserialize_index(packed)


def _is_mergeable(trained: NDArray[np.uint8]) -> bool:
    """Whether shards can be merged.

    If not, rank 0 adds all vectors to one index. Graphs (HNSW) cannot be merged. A flat index is filled faster than shards are
    written. Packed codes (fast scan) would depend on the shards.
    """
    if is_flat(index := _load(trained)) or is_fast_scan(index):
        return False
    try:
        merge(_load(trained), _load(trained))
    except RuntimeError:
        return False
    return True
