"""Search of a million vectors: an index of bytes, packed codes refined by stored vectors, packed codes alone, and LanceDB.

A vector is the mean of the random vectors of 16 words of the standard library, at every few words, so that there are as many as
wanted. Queries are some of them, and must not find their own file. Recall is the share of the true nearest allowed vectors, by
distance. Each engine searches in a process of its own, with the smallest effort that finds 95 % of the two nearest of a sample.
"""

import argparse
import importlib.metadata
import json
import os
import re
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
from lightning_align.data.documents import StandardLibrary
from lightning_align.retrieval.dense import DenseSearcher
from lightning_align.retrieval.encoders import read_vectors
from lightning_align.retrieval.index import IndexConfig, build_index, open_index
from lightning_align.retrieval.neighbors import Forbidden
from lightning_align.retrieval.stages import Stage, Team, open_stage, write_bytes, write_rows
from lightning_align.retrieval.stored import split_factory

DIM, WORDS, K, QUERIES, PART = 128, 16, 8, 200, 1 << 16


ALONE = "packed alone"


def factories(lists: int) -> dict[str, str]:
    """The indexes by name. `auto` rotates packed codes too (OPQ), which takes minutes to train."""
    return {"bytes": f"IVF{lists},SQ8", "packed, stored": f"IVF{lists},PQ32,Stored"}


def write_vectors(root: Path, num: int) -> Stage:
    """Write the vectors, and the number of the file of each."""
    table = np.random.default_rng(0).normal(size=(1 << 16, DIM)).astype(np.float32) / DIM**0.5
    known: dict[str, int] = {}
    runs = []
    for document in StandardLibrary().documents():
        words = re.findall(r"\w+|[^\w\s]", document.text)
        runs.append(np.array([known.setdefault(word, len(known)) % len(table) for word in words], dtype=np.int64))
    places = sum(max(0, len(run) - WORDS) for run in runs)
    step, spans, groups, left = max(1, places // num), [], [], num
    for number, run in enumerate(runs):
        starts = np.arange(0, max(0, len(run) - WORDS), step)[:left]
        left -= len(starts)
        spans.append((run, starts))
        groups.append(np.full(len(starts), number))
    total = sum(len(starts) for _, starts in spans)

    def parts() -> Iterator[np.ndarray]:
        for run, starts in spans:
            for first in range(0, len(starts), PART):
                some = starts[first : first + PART]
                yield sum(table[run[some + word]] for word in range(WORDS)) / WORDS  # type: ignore[misc]

    stage = Stage(root, "vectors", {"benchmark": total})
    write_rows(stage.folder / "vectors.npy", parts(), dtype=np.float16, shape=(total, DIM))
    write_rows(root / "groups.npy", groups, dtype=np.int64, shape=(total,))
    stage.finish(table={"dim": DIM}, counts={}, files=["vectors.npy"])
    return stage


def anonymous() -> int:
    """Memory of this process that no file backs, in MiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) // 1024


def run_engine(name: str, root: Path, lists: int) -> dict[str, Any]:
    """Search in this process, and return what was measured."""
    vectors = read_vectors(next(open_stage(path) for path in root.glob("vectors-*")))
    groups = np.load(root / "groups.npy")
    rows = np.sort(np.random.default_rng(1).choice(len(vectors), QUERIES, replace=False))
    queries = vectors[rows].astype(np.float32)
    true = np.load(root / "true.npy")
    if name.startswith("LanceDB"):
        import lancedb

        start = anonymous()
        table = lancedb.connect(str(root / "lance")).open_table("vectors")

        def search(some: np.ndarray, own: np.ndarray) -> list[np.ndarray]:
            found = []
            for query, group in zip(some, own, strict=True):
                search = table.search(query).distance_type("l2").where(f"file != {group}", prefilter=True).limit(K)
                found.append(search.nprobes(64).refine_factor(32).select(["number"]).to_arrow()["number"].to_numpy())
            return found
    else:
        start = anonymous()
        stage = open_stage(root / json.loads((root / "indexes.json").read_text())[name])
        stored = vectors if split_factory(stage.setting("factory", str)).is_stored and name != ALONE else None
        searcher = DenseSearcher(open_index(stage), groups, effort=stage.setting("effort", int), stored=stored)

        def search(some: np.ndarray, own: np.ndarray) -> list[np.ndarray]:
            return list(searcher.nearest(some, K, Forbidden(np.arange(len(some)), own)).ids)

    search(queries[:2], groups[rows[:2]])
    begin = time.process_time()
    ids = search(queries, groups[rows])
    batched = time.process_time() - begin
    begin = time.process_time()
    for query, row in list(zip(queries, rows, strict=True))[:32]:
        search(query[None], groups[[row]])
    single = (time.process_time() - begin) / 32
    found = np.full((QUERIES, K), np.inf)
    for place, some in enumerate(ids):
        gaps = vectors[np.asarray(some)].astype(np.float64) - queries[place]
        found[place, : len(some)] = np.sort((gaps**2).sum(1))
    recall = [float((found[:, :k] <= true[:, k - 1 : k] * (1 + 1e-4) + 1e-6).mean()) for k in (2, K)]
    return {"recall": recall, "batched": QUERIES / batched, "single": 1000 * single, "memory": anonymous() - start}


def prepare(root: Path, num: int, lists: int) -> dict[str, dict[str, Any]]:
    """Write vectors, true neighbors and indexes. Return the seconds and the size of each."""
    stage = write_vectors(root, num)
    vectors, groups = read_vectors(stage), np.load(root / "groups.npy")
    rows = np.sort(np.random.default_rng(1).choice(len(vectors), QUERIES, replace=False))
    queries, best = vectors[rows].astype(np.float32), np.full((QUERIES, 0), np.inf)
    for start in range(0, len(vectors), PART):
        part = vectors[start : start + PART].astype(np.float32)
        scores = ((queries**2).sum(1)[:, None] - 2 * queries @ part.T + (part**2).sum(1)).astype(np.float64)
        scores[groups[rows][:, None] == groups[start : start + PART]] = np.inf
        best = np.sort(np.concatenate([best, np.sort(scores, axis=1)[:, : K + 8]], axis=1), axis=1)[:, : K + 8]
    np.save(root / "true.npy", best[:, :K])
    made, names = {}, {}
    for name, factory in factories(lists).items():
        begin = time.process_time()
        config = IndexConfig(factory=factory, min_recall=0.95)
        index = build_index(root, stage, config, team=Team(), verify=0.0)
        names[name] = index.folder.name
        size = (index.folder / "index.faiss").stat().st_size >> 20
        made[name] = {"seconds": time.process_time() - begin, "disk": size, **(index.manifest() or {})["table"]}
        print(name, made[name], file=sys.stderr, flush=True)
    names[ALONE], made[ALONE] = names["packed, stored"], {**made["packed, stored"], "recall": 0.0}
    write_bytes(root / "indexes.json", json.dumps(names).encode())
    import lancedb
    import pyarrow as pa
    from lancedb.index import IvfPq

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(vectors), PART):
            part = np.asarray(vectors[start : start + PART])
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), DIM)
            numbers, files = pa.array(np.arange(start, start + len(part))), pa.array(groups[start : start + PART])
            yield pa.RecordBatch.from_arrays([numbers, files, column], names=["number", "file", "vector"])

    begin = time.process_time()
    schema = pa.schema({"number": pa.int64(), "file": pa.int64(), "vector": pa.list_(pa.float16(), DIM)})
    table = lancedb.connect(str(root / "lance")).create_table("vectors", batches(), schema=schema)
    table.create_index("vector", config=IvfPq(distance_type="l2", num_partitions=lists, num_sub_vectors=32))
    files = (path for path in (root / "lance").rglob("*") if path.is_file())
    made["LanceDB, IVF_PQ, refined"] = {
        "seconds": time.process_time() - begin,
        "disk": sum(path.stat().st_size for path in files) >> 20,
    }
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--lists", type=int, default=1024, help="inverted lists")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="folder for the files; default: a temporary one")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.engine:
        print(json.dumps(run_engine(arguments.engine, Path(arguments.folder), arguments.lists)))
        return
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    root = Path(arguments.folder or tempfile.mkdtemp())
    made = prepare(root, arguments.vectors, arguments.lists)
    rows = []
    for name, costs in made.items():
        command = [sys.executable, __file__, "--engine", name, "--folder", str(root), "--lists", str(arguments.lists)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        print(name, found, file=sys.stderr, flush=True)
        rows.append(
            {
                "engine": name,
                "index": factories(arguments.lists).get(name, ""),
                "recall of the gate": f"{costs['recall']:.3f}" if costs.get("recall") else "",
                "effort": str(costs.get("effort", "")),
                "recall@2": f"{found['recall'][0]:.3f}",
                f"recall@{K}": f"{found['recall'][1]:.3f}",
                "queries per CPU s, in one call": f"{found['batched']:,.0f}",
                "CPU ms of one query": f"{found['single']:.2f}",
                "memory, MiB": f"{found['memory']:,}",
                "disk, MiB": f"{costs['disk']:,}",
                "CPU s to build": f"{costs['seconds']:.0f}",
            }
        )
    num = len(np.load(root / "groups.npy", mmap_mode="r"))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("faiss-cpu", "lancedb"))
    common.heading(
        "Retrieval: a million vectors",
        f"{num:,} vectors of {DIM} dimensions, means of the random vectors of {WORDS} words of the standard library. "
        f"{QUERIES} of them as queries, without those of their own file; {arguments.threads} threads. Memory is what opening "
        f"and searching adds without mapped files. The disk of the first rows is without the stored vectors, "
        f"{num * DIM * 2 >> 20} MiB, and that of LanceDB with them. {versions}.",
    )
    print(common.table(rows))
    if arguments.folder is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
