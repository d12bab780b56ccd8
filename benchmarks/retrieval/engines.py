"""Search with the chunk's own document excluded: the database's index, LanceDB and Qdrant in its local mode.

Chunks of the standard library, encoded as means of random vectors of their tokens. Each engine searches the same queries in a
process of its own. Recall is the share of the true nearest allowed chunks, by distance.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from lightning_align.data.documents import DocumentSource, StandardLibrary
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retrieval.index import IndexConfig
from lightning_align.retrieval.search import Retriever
from lightning_align.retro.indexing import build_database, open_retriever
from lightning_align.types import Document

DIM, SIZE, K = 384, 32, 8
LISTS = "IVF1024,SQ8"
SLOWER = 20
"""How many times fewer queries the local mode of Qdrant gets, which is written in Python."""
ENGINES = ("exact", LISTS, "LanceDB", "LanceDB, IVF_HNSW_SQ", "Qdrant, local")


class Averages:
    """Encodes a chunk as the mean of a random vector per token."""

    fingerprint = f"averages-{DIM}"

    def __init__(self) -> None:
        self.table = np.random.default_rng(0).normal(size=(1 << 16, DIM)).astype(np.float32) / DIM**0.5

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


def anonymous() -> int:
    """Memory of this process that no file backs, in MiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) // 1024


def size_of(folder: Path) -> int:
    """Size of the files in a folder, in MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) >> 20


def make(engine: str, folder: Path, encoder: Averages) -> tuple[Any, Path]:
    """Open an engine, after its data were copied to it if they were not yet. Return it and its folder."""
    root = folder / ("lists" if engine == LISTS else "exact")
    if engine in ("exact", LISTS):
        return open_retriever(root, encoder=encoder), root
    database = RetrievalDatabase.open(root)
    place = folder / engine.replace(" ", "")
    if engine.startswith("LanceDB"):
        from lightning_align.retrieval.lance import LanceRetriever

        retriever = (LanceRetriever if place.exists() else _lance(database, engine != "LanceDB"))(str(place), encoder=encoder)
        return retriever, place
    from lightning_align.retrieval.qdrant import QdrantRetriever

    if place.exists():
        return QdrantRetriever(place, encoder=encoder), place
    return QdrantRetriever.create(place, database, encoder=encoder), place


def _lance(database: RetrievalDatabase, has_index: bool) -> Any:
    from lightning_align.retrieval.lance import LanceRetriever

    def create(place: str, *, encoder: Averages) -> Any:
        retriever = LanceRetriever.create(place, database, encoder=encoder)
        if has_index:
            from lancedb.index import HnswSq

            retriever.table.create_index("vector", config=HnswSq(distance_type="l2", num_partitions=16))
        return retriever

    return create


def queries_of(database: RetrievalDatabase, count: int) -> tuple[list[Any], list[list[str]]]:
    """Return chunks of the database, and for each the document that it must not find."""
    table = database.chunks
    numbers = np.sort(np.random.default_rng(1).choice(len(table), count, replace=False))
    names = [table.document_ids[document] for document in table.document_of(numbers)]
    return [table.chunk(int(number)) for number in numbers], [[name] for name in names]


def run_engine(engine: str, folder: Path, count: int) -> dict[str, Any]:
    """Copy, open and search. Return what was measured."""
    encoder = Averages()
    before = time.perf_counter()
    make(engine, folder, encoder)  # copies
    copying = time.perf_counter() - before
    database = RetrievalDatabase.open(folder / "exact")
    queries, exclude = queries_of(database, count)
    output = subprocess.run(
        [sys.executable, __file__, "--engine", engine, "--folder", str(folder), "--queries", str(count), "--search"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    found = json.loads(output.splitlines()[-1])
    true = np.array(found.pop("distances"))
    exact = open_retriever(folder / "exact", encoder=encoder).search(queries, K, exclude).distances
    # Engines round distances otherwise, and any of equally near chunks is right.
    recall = float((np.sort(true, axis=1) <= exact[:, -1:] * (1 + 1e-3) + 1e-5).mean())
    return {**found, "recall": recall, "copying": copying}


def search(engine: str, folder: Path, count: int) -> dict[str, Any]:
    """Search in a fresh process."""
    encoder = Averages()
    queries, exclude = queries_of(RetrievalDatabase.open(folder / "exact"), count)
    if "Lance" in engine:
        import lancedb  # noqa: F401  # its import is not counted
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
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--folder", help="folder for the databases; default: a temporary one")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--search", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.engine:
        task = search if arguments.search else run_engine
        print(json.dumps(task(arguments.engine, Path(arguments.folder), arguments.queries)))
        return
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    folder = Path(arguments.folder or tempfile.mkdtemp())
    documents = First(arguments.chunks * SIZE)
    for name, factory in (("exact", "Flat"), ("lists", LISTS)):
        index = IndexConfig(factory=factory, recall_at=K)
        if name == "lists":
            shutil.copytree(folder / "exact", folder / name, dirs_exist_ok=True)
        database = build_database(folder / name, documents, encoder=Averages(), chunk_size=SIZE, k=1, index=index, verify=0.0)
    num = len(database.chunks)
    rows = []
    for engine in arguments.engines:
        count = arguments.queries if "Qdrant" not in engine else max(1, arguments.queries // SLOWER)
        command = [sys.executable, __file__, "--engine", engine, "--folder", str(folder), "--queries", str(count)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        print(engine, found, file=sys.stderr, flush=True)
        rows.append(
            {
                "engine": engine,
                f"recall@{K}": f"{found['recall']:.3f}",
                "queries per CPU s, in one call": f"{found['batched']:,.0f}",
                "nothing excluded": f"{found['unfiltered']:,.0f}",
                "CPU ms of one query": f"{found['single']:.1f}",
                "memory, MiB": f"{found['memory']:,}",
                "disk, MiB": f"{found['disk']:,}",
                "s to copy": "" if engine in ("exact", LISTS) else f"{found['copying']:.0f}",
            }
        )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("faiss-cpu", "lancedb", "qdrant-client"))
    common.heading(
        "Retrieval: the index of the database beside LanceDB and Qdrant",
        f"{num:,} chunks of {SIZE} bytes of the standard library, {DIM} dimensions, {arguments.queries} chunks as queries "
        f"({arguments.queries // SLOWER} for Qdrant), without their own document and its near-duplicates; k {K}, "
        f"{arguments.threads} threads, indexes with their own defaults. Memory is what opening and "
        f"searching adds without mapped files. {versions}.",
    )
    print(common.table(rows))
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
