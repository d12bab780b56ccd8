"""Neighbor search with the chunk's own document excluded: `DenseSearcher` against raw faiss.

100,000 chunks of 384 dimensions. Raw faiss searches k neighbors and excludes nothing, which is less work. Without extra work
for the filter, some rows would lose all their neighbors. The script also counts slots without a neighbor.
"""

import argparse

import faiss
import numpy as np
import torch

from benchmarks import common
from lightning_align.retrieval.dense import DenseSearcher
from lightning_align.retrieval.faiss_seam import set_effort
from lightning_align.retrieval.index import IndexConfig
from lightning_align.retrieval.neighbors import Forbidden
from lightning_align.retrieval.recall import exact_neighbors, tune

NUM, DIM, K = 100_000, 384, 2
BLOCK = 8192


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Vectors in clusters, one per document, and the document of each vector. Documents have 2 to 500 chunks."""
    draw = np.random.default_rng(0)
    sizes: list[int] = []
    while sum(sizes) < NUM:
        sizes.append(int(np.clip(draw.lognormal(3.5, 1.2), 2, 500)))
    documents = np.repeat(np.arange(len(sizes)), sizes)[:NUM]
    low = draw.normal(size=(NUM, 24)) + 1.5 * draw.normal(size=(len(sizes), 24))[documents]
    vectors = low @ draw.normal(size=(24, DIM)) + 0.3 * draw.normal(size=(NUM, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16), documents


def search(searcher: DenseSearcher, data: np.ndarray, documents: np.ndarray | None) -> np.ndarray:
    """Search for all rows as the neighbor stage does; without documents nothing is excluded. Returns the (n, k) mask."""
    nothing = Forbidden(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    masks = []
    for start in range(0, len(data), BLOCK):
        part = data[start : start + BLOCK].astype(np.float32)
        forbidden = nothing if documents is None else Forbidden(np.arange(len(part)), documents[start : start + BLOCK])
        masks.append(searcher.nearest(part, K, forbidden).mask)
    return np.concatenate(masks)


def raw(index: faiss.Index, data: np.ndarray) -> None:
    """The same queries with faiss alone."""
    for start in range(0, len(data), BLOCK):
        index.search(data[start : start + BLOCK].astype(np.float32), K)


def starved_by_peer(index: faiss.Index, data: np.ndarray, documents: np.ndarray) -> float:
    """Share of slots without a neighbor by the rule of RETRO-pytorch 0.3.9.

    It fetches k + 11 neighbors, takes the first for the chunk itself and removes those of the same document.
    """
    found = index.search(data.astype(np.float32), K + 11)[1][:, 1:]
    allowed = (documents[found] != documents[: len(data), None]).sum(axis=1)
    return float(1 - np.minimum(allowed, K).sum() / (K * len(data)))


def recall(searcher: DenseSearcher, data: np.ndarray, documents: np.ndarray, rows: np.ndarray) -> float:
    """Share of the true allowed neighbors that the searcher finds."""
    queries = data[rows].astype(np.float32)
    found = searcher.nearest(queries, K, Forbidden(np.arange(len(rows)), documents[rows]))
    distances, ids = exact_neighbors(data, queries, 2048)
    allowed = documents[ids] != documents[rows][:, None]
    worst = np.array([row[mask][K - 1] for row, mask in zip(distances, allowed, strict=True)])
    return float((found.distances <= worst[:, None] * (1 + 1e-3) + 1e-5).mean())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--queries", type=int, default=NUM, help="number of queries, the first of the 100,000 chunks")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    data, documents = corpus()
    part = data[: arguments.queries]
    flat = faiss.IndexFlatL2(DIM)
    flat.add(data.astype(np.float32))
    graph = faiss.index_factory(DIM, "HNSW32")
    graph.hnsw.efConstruction = 80
    graph.add(data.astype(np.float32))
    lists = faiss.index_factory(DIM, "IVF1024,Flat")
    lists.train(data[:65536].astype(np.float32))
    lists.add(data.astype(np.float32))
    rows, approximate = [], {}
    sample = np.random.default_rng(1).choice(NUM, 500, replace=False)
    packed = faiss.index_factory(DIM, "IVF1024,PQ96x4fs,RFlat")
    packed.train(data[:65536].astype(np.float32))
    packed.add(data.astype(np.float32))
    for name, index in (("IVF1024,Flat", lists), ("HNSW32", graph), ("IVF1024,PQ96x4fs,RFlat", packed)):
        effort = tune(index, data, IndexConfig(min_recall=0.95, recall_at=K), factory=name)["effort"]
        while recall(DenseSearcher(index, documents, effort=effort), data, documents, sample) < 0.95:
            effort *= 2
            set_effort(index, effort)
        approximate[name] = (index, effort)
    common.heading(
        "Neighbors: `DenseSearcher` against raw faiss",
        f"{len(part):,} of {NUM:,} chunks, {DIM} dimensions, k {K}, {arguments.threads} threads. Filtered sides exclude the "
        "chunk's own document; the other sides exclude nothing, like raw faiss. Generation searches without the filter. "
        f"{arguments.rounds} alternating rounds.",
    )
    exact = DenseSearcher(flat, documents, effort=1)
    sides = {"raw Flat": lambda: raw(flat, part), "exact, filtered": lambda: search(exact, part, documents)}
    for name, (index, effort) in approximate.items():
        searcher = DenseSearcher(index, documents, effort=effort)
        sides[f"raw {name}"] = lambda index=index: raw(index, part)
        sides[name] = lambda searcher=searcher: search(searcher, part, None)
        sides[f"{name}, filtered"] = lambda searcher=searcher: search(searcher, part, documents)
    timings = common.alternate(sides, arguments.rounds)
    for name, timing in timings.items():
        seconds = common.median(t.seconds for t in timing)
        rows.append(
            {
                "side": name,
                "s": f"{seconds:.2f}",
                "queries/s": f"{len(part) / seconds:,.0f}",
                "background load": common.load(timing),
            }
        )
    print(common.table(rows))
    of_raw = common.ratio(timings["raw Flat"], timings["exact, filtered"])
    starved = int((~search(exact, part, documents)).sum())
    claims = [
        common.claim("exact search: speed / raw faiss", "≥ 0.95", f"{of_raw:.3f}", of_raw >= 0.95),
        common.claim("slots without a neighbor", "0", str(starved), starved == 0),
        common.claim(
            "slots without a neighbor by the rule of RETRO-pytorch 0.3.9",
            "",
            f"{starved_by_peer(flat, part[:BLOCK], documents):.1%}",
            True,
        ),
    ]
    fastest = 0.0
    for name, (index, effort) in approximate.items():
        found = recall(DenseSearcher(index, documents, effort=effort), data, documents, sample)
        faster = common.ratio(timings["exact, filtered"], timings[f"{name}, filtered"])
        fastest = max(fastest, faster if found >= 0.95 else 0.0)
        share = common.ratio(timings[f"raw {name}"], timings[name])
        filtered = common.ratio(timings[f"raw {name}"], timings[f"{name}, filtered"])
        claims.append(common.claim(f"{name}: speed / raw faiss", "≥ 0.95", f"{share:.2f}", share >= 0.95))
        claims.append(common.claim(f"{name}, filtered: speed / raw faiss", "", f"{filtered:.2f}", True))
        what = f"{name}, filtered, effort {effort}, recall@{K} {found:.3f}: speed / exact search"
        claims.append(common.claim(what, "", f"{faster:.1f}", found >= 0.95))
    claims.append(common.claim("fastest of these: speed / exact search", "≥ 5", f"{fastest:.1f}", fastest >= 5))
    print(common.table(claims))


if __name__ == "__main__":
    main()
