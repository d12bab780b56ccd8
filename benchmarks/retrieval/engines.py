"""Search with the chunk's own document excluded: the database's index, LanceDB and Qdrant.

Chunks of the standard library, encoded as means of random vectors of their tokens. Qdrant is its local mode, which compares all
vectors in Python, or its engine in this process (qdrant-edge-py). Each engine searches the same queries in a process of its
own. Recall is the share of the true nearest allowed chunks, by distance. An index with packed codes finds candidates, which the
stored vectors compare. What the others are copied from is the database of the first index.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import common
from lightning_align.data.documents import DocumentSource, StandardLibrary
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retrieval.encoders import read_vectors
from lightning_align.retrieval.generation import open_parts
from lightning_align.retrieval.index import IndexConfig
from lightning_align.retrieval.neighbors import Forbidden, Nearest, group_of_chunks
from lightning_align.retrieval.search import Retriever
from lightning_align.retrieval.tables import ChunkTable
from lightning_align.retro.indexing import build_database, open_retriever
from lightning_align.types import Document

SIZE, K = 32, 8
SLOWER = 20
"""How many times fewer queries the local mode of Qdrant gets, which is written in Python."""
EDGE = "Qdrant Edge"
OTHERS = ("LanceDB", "LanceDB, IVF_HNSW_SQ", "Qdrant, local")
MORE = (EDGE,)
"""Engines that are not measured by default."""


class Averages:
    """Encodes a chunk as the mean of a random vector per token."""

    def __init__(self, dim: int) -> None:
        self.fingerprint = f"averages-{dim}"
        self.table = np.random.default_rng(0).normal(size=(1 << 16, dim)).astype(np.float32) / dim**0.5

    def encode(self, chunks: Any) -> np.ndarray:
        """See `Encoder`."""
        runs = [np.asarray(chunk) for chunk in chunks]
        return np.stack([self.table[run].mean(0) for run in runs])


class First(DocumentSource):
    """The first files of the standard library, repeated with other words if they are too few."""

    def __init__(self, num_characters: int) -> None:
        self.num_characters = num_characters

    def documents(self) -> Iterator[Document]:
        """See `DocumentSource.documents`."""
        left = self.num_characters
        for copy in range(1000):
            for document in StandardLibrary().documents():
                if left <= 0:
                    return
                text = document.text if copy == 0 else " ".join(f"{word}{copy}" for word in document.text.split(" "))
                left -= len(text)
                yield Document(f"{copy}/{document.id}", text)


class Nothing:
    """Finds no neighbors. Searches of every chunk would take most of the time of a build, and no engine here needs them."""

    def queries_of(self, table: ChunkTable, chunks: range) -> range:
        """See `Searcher`."""
        return chunks

    def nearest(self, queries: range, k: int, forbidden: Forbidden) -> Nearest:
        """See `Searcher`."""
        shape = (len(queries), k)
        return Nearest(np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool), np.full(shape, np.inf, dtype=np.float32))


class Known:
    """Returns the stored vectors of some chunks, so that a search does not include their encoding."""

    def __init__(self, database: RetrievalDatabase, numbers: np.ndarray) -> None:
        self.fingerprint = database.manifest["encoder"]
        stored = vectors_of(database)
        self.table = {self._key(database.chunks.chunk(int(number))): stored[number].astype(np.float32) for number in numbers}

    def encode(self, chunks: Any) -> np.ndarray:
        """See `Encoder`."""
        return np.stack([self.table[self._key(chunk)] for chunk in chunks])

    @staticmethod
    def _key(chunk: Any) -> bytes:
        return np.asarray(chunk, dtype=np.int64).tobytes()


def anonymous() -> int:
    """Memory of this process that no file backs, in MiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) // 1024


def size_of(folder: Path) -> int:
    """Size of the files in a folder, in MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) >> 20


def vectors_of(database: RetrievalDatabase) -> np.ndarray:
    """The stored vectors of a database, mapped."""
    stored = open_parts(database.folder, database.manifest).vectors
    assert stored is not None
    return read_vectors(stored)


def make(engine: str, folder: Path, encoder: Known) -> tuple[Any, Path]:
    """Open an engine, after its data were copied to it if they were not yet. Return it and its folder."""
    if engine not in (*OTHERS, *MORE):
        return open_retriever(folder / engine, encoder=encoder), folder / engine
    database = first_of(folder)
    place = folder / engine.replace(" ", "")
    if engine.startswith("LanceDB"):
        from lightning_align.retrieval.lance import LanceRetriever

        retriever = (LanceRetriever if place.exists() else _lance(database, engine != "LanceDB"))(str(place), encoder=encoder)
        return retriever, place
    if engine == EDGE:
        from benchmarks.common.peer_qdrant_edge import EdgeRetriever

        if place.exists():
            return EdgeRetriever(place, encoder=encoder, chunk_size=database.chunks.chunk_size), place
        return EdgeRetriever.create(place, database, encoder=encoder), place
    from lightning_align.retrieval.qdrant import QdrantRetriever

    if place.exists():
        return QdrantRetriever(place, encoder=encoder), place
    return QdrantRetriever.create(place, database, encoder=encoder), place


def _lance(database: RetrievalDatabase, has_index: bool) -> Any:
    from lightning_align.retrieval.lance import LanceRetriever

    def create(place: str, *, encoder: Known) -> Any:
        retriever = LanceRetriever.create(place, database, encoder=encoder)
        if has_index:
            from lancedb.index import HnswSq

            retriever.table.create_index("vector", config=HnswSq(distance_type="l2", num_partitions=16))
        return retriever

    return create


def first_of(folder: Path) -> RetrievalDatabase:
    """Open the database of the first index."""
    return RetrievalDatabase.open(folder / (folder / "first.txt").read_text())


def true_distances(database: RetrievalDatabase, queries: list[Any], exclude: list[list[str]], encoder: Known) -> np.ndarray:
    """The distances (n, K) of the true nearest allowed chunks."""
    vectors, table = vectors_of(database), database.chunks
    groups = group_of_chunks(table, np.zeros(0, dtype=np.int64))
    numbers = {name: number for number, name in enumerate(table.document_ids)}
    result = np.full((len(queries), K), np.inf, dtype=np.float32)
    points = encoder.encode(queries)
    for start in range(0, len(vectors), 1 << 16):
        part = vectors[start : start + (1 << 16)].astype(np.float32)
        distances = (points**2).sum(1)[:, None] + (part**2).sum(1) - 2 * points @ part.T
        for row, names in enumerate(exclude):
            distances[row, np.isin(groups[start : start + len(part)], table.groups[[numbers[name] for name in names]])] = np.inf
        near = np.partition(distances, K - 1, axis=1)[:, :K] if len(part) > K else distances
        result = np.sort(np.concatenate([result, near], axis=1), axis=1)[:, :K]
    return result


def queries_of(database: RetrievalDatabase, count: int) -> tuple[list[Any], list[list[str]], Known]:
    """Return chunks of the database, for each the document that it must not find, and what encodes them."""
    table = database.chunks
    numbers = np.sort(np.random.default_rng(1).choice(len(table), count, replace=False))
    names = [table.document_ids[document] for document in table.document_of(numbers)]
    return [table.chunk(int(number)) for number in numbers], [[name] for name in names], Known(database, numbers)


def run_engine(engine: str, folder: Path, count: int) -> dict[str, Any]:
    """Copy, open and search. Return what was measured."""
    database = first_of(folder)
    queries, exclude, encoder = queries_of(database, count)
    before = time.perf_counter()
    make(engine, folder, encoder)  # copies
    copying = time.perf_counter() - before
    output = subprocess.run(
        [*command_of(engine, folder, count), "--search"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    found = json.loads(output.splitlines()[-1])
    distances, true = np.array(found.pop("distances")), true_distances(database, queries, exclude, encoder)
    # Engines round distances otherwise, and any of equally near chunks is right.
    recall = float((np.sort(distances, axis=1) <= true[:, -1:] * (1 + 1e-3) + 1e-5).mean())
    return {**found, "recall": recall, "copying": copying}


def command_of(engine: str, folder: Path, count: int) -> list[str]:
    """The command that measures an engine in a process of its own."""
    return [sys.executable, __file__, "--engine", engine, "--folder", str(folder), "--queries", str(count)]


def search(engine: str, folder: Path, count: int) -> dict[str, Any]:
    """Search in a fresh process."""
    queries, exclude, encoder = queries_of(first_of(folder), count)
    if "Lance" in engine:
        import lancedb  # noqa: F401  # its import is not counted
    elif engine == EDGE:
        import qdrant_edge  # noqa: F401
    elif "Qdrant" in engine:
        import qdrant_client  # noqa: F401
    else:
        import faiss  # noqa: F401
    start = anonymous()
    retriever: Retriever
    retriever, place = make(engine, folder, encoder)
    retriever.search(queries[:2], K, exclude[:2])
    # Time of processors, of all threads of the process: other work on the machine matters less.
    begin = time.process_time()
    found = retriever.search(queries, K, exclude)
    batched = time.process_time() - begin
    begin = time.process_time()
    retriever.search(queries, K)
    unfiltered = time.process_time() - begin
    begin = time.process_time()
    some = list(zip(queries, exclude, strict=True))[:16]
    for query, names in some:
        retriever.search([query], K, [names])
    single = (time.process_time() - begin) / len(some)
    distances = np.where(np.isfinite(found.distances), found.distances, 1e30)
    return {
        "memory": anonymous() - start,
        "disk": size_of(place),
        "batched": len(queries) / batched,
        "unfiltered": len(queries) / unfiltered,
        "single": single * 1000,
        "distances": distances.tolist(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=100_000, help="number of chunks, about")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=384, help="dimensions of the vectors")
    parser.add_argument(
        "--engines",
        nargs="+",
        metavar="ENGINE",
        help="exact, auto, factory strings (with ,Stored stored vectors refine), "
        f"{', '.join((*OTHERS, *MORE))}; the first is an index; "
        "default: exact, two factory strings and all others",
    )
    parser.add_argument("--folder", help="folder for the databases; default: a temporary one")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--search", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # of chunks without neighbors
    if arguments.engine:
        task = search if arguments.search else run_engine
        print(json.dumps(task(arguments.engine, Path(arguments.folder), arguments.queries)))
        return
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    folder = Path(arguments.folder or tempfile.mkdtemp())
    documents = First(arguments.chunks * SIZE)
    packed = f"IVF1024,PQ{arguments.dim // 4},Stored"
    engines = arguments.engines or ["exact", "IVF1024,SQ8", packed, *OTHERS]
    first = engines[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "first.txt").write_text(first)
    encoder = Averages(arguments.dim)
    others, factories = (*OTHERS, *MORE), {}
    for name in engines:
        if name in others:
            continue
        index = IndexConfig(factory="Flat" if name == "exact" else name, recall_at=K)
        if name != first and not (folder / name).exists():
            shutil.copytree(
                folder / first, folder / name, ignore=shutil.ignore_patterns("index-*", "neighbors-*", "database.json")
            )
        begin = time.process_time()
        with patch("lightning_align.retrieval.build.make_searcher", lambda *_, **__: Nothing()):
            database = build_database(folder / name, documents, encoder=encoder, chunk_size=SIZE, k=1, index=index, verify=0.0)
        found = open_parts(database.folder, database.manifest).index
        assert found is not None
        factories[name] = found.setting("factory", str)
        print(f"{name} built in {time.process_time() - begin:.0f} CPU s", file=sys.stderr, flush=True)
    num = len(database.chunks)
    rows = []
    for engine in engines:
        count = arguments.queries if engine != "Qdrant, local" else max(1, arguments.queries // SLOWER)
        command = command_of(engine, folder, count)
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        print(engine, found, file=sys.stderr, flush=True)
        rows.append(
            {
                "engine": f"auto: {factories[engine]}" if engine == "auto" else engine,
                f"recall@{K}": f"{found['recall']:.3f}",
                "queries per CPU s, in one call": f"{found['batched']:,.0f}",
                "nothing excluded": f"{found['unfiltered']:,.0f}",
                "CPU ms of one query": f"{found['single']:.1f}",
                "memory, MiB": f"{found['memory']:,}",
                "disk, MiB": f"{found['disk']:,}",
                "s to copy": f"{found['copying']:.0f}" if engine in others else "",
            }
        )
    packages = ("faiss-cpu", "lancedb", "qdrant-client", *(["qdrant-edge-py"] if EDGE in engines else []))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    common.heading(
        "Retrieval: the index of the database beside LanceDB and Qdrant",
        f"{num:,} chunks of {SIZE} bytes of the standard library, {arguments.dim} dimensions, {arguments.queries} chunks as "
        f"queries ({arguments.queries // SLOWER} for Qdrant's local mode), without their own document and its near-duplicates; "
        f"k {K}, {arguments.threads} threads, indexes with their own defaults. Memory is what opening and searching adds "
        f"without mapped files. {versions}.",
    )
    print(common.table(rows))
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
