"""Embedding of chunks with MiniLM by precision of the Trainer, against RETRO-pytorch 0.3.9, which embeds 16 at a time.

A precision of the Trainer is one of the encoder: the key of the vectors has it, and live queries are encoded in it. How much
bfloat16 helps depends on the processor: AMX and AVX512-BF16 multiply it faster than float32, AVX2 does not.
"""

import argparse
import contextlib
import io
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

from benchmarks import common
from lightning_align.data.documents import DocumentTokenizer, StandardLibrary
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.retrieval.chunks import build_chunks
from lightning_align.retrieval.encoders import SentenceEncoder, build_vectors, read_vectors
from lightning_align.retrieval.stages import Stage, Team
from lightning_align.retrieval.tables import ChunkTable
from lightning_align.retro.indexing import quiet_trainer

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def units() -> str:
    """Name the processor's units that multiply vectors and matrices."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    return ", ".join(name for name in UNITS if name in flags) or "none of " + ", ".join(UNITS)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--held_out", type=float, default=0.02, help="share of the standard library to embed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    from benchmarks.common.peer_retro_pytorch import PEER, packaged_model, retrieval

    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    model = packaged_model()
    tokenizer = load_tokenizer(f"{model}/tokenizer.json?bos=[CLS]&eos=[SEP]&pad=[PAD]")
    root, team = Path(tempfile.mkdtemp()), Team()
    source = StandardLibrary(part="held_out", held_out=arguments.held_out)
    chunks = build_chunks(root, source, DocumentTokenizer(tokenizer), chunk_size=64, team=team, verify=0.0)
    table = ChunkTable(chunks.folder)
    # A Trainer converts the weights of an encoder, so each precision has its own.
    encoders = {precision: SentenceEncoder(model, decode=tokenizer.decode) for precision in PRECISIONS}
    exact = SentenceEncoder(model, decode=tokenizer.decode)
    key = exact.fingerprint
    runs = [table.chunk(number) for number in range(len(table))]
    retrieval.MODEL = AutoModel.from_pretrained(model).eval()
    # The format of the peer's chunks: a chunk and the first token of the next one, padded with 0.
    ids = np.memmap(root / "peer.chunks", dtype=np.int32, mode="w+", shape=(len(runs), 65))
    for row, run in zip(ids, runs, strict=True):
        row[: len(run)] = run
    ids.flush()
    stages: dict[str, Stage] = {}

    def stage(precision: Any) -> None:
        folder = Path(tempfile.mkdtemp(dir=root))
        options: dict[str, Any] = {"team": team, "verify": 0.0, "key": key}
        options["trainer"] = lambda: quiet_trainer(accelerator="cpu", devices=1, precision=precision)
        stages[precision] = build_vectors(folder, chunks, encoders[precision], **options)

    def peer() -> None:
        paths = {"chunks_memmap_path": str(root / "peer.chunks"), "embeddings_memmap_path": str(root / "peer.vectors")}
        with contextlib.redirect_stdout(io.StringIO()):
            retrieval.chunks_to_embeddings_(num_chunks=len(runs), embed_dim=384, **paths)

    common.heading(
        f"Embedding: bfloat16 against float32 and {PEER}",
        f"{len(table):,} chunks of 64 tokens, MiniLM-L6, {arguments.threads} threads, {arguments.rounds} alternating rounds. "
        f"Processor with {units()}. Seconds are those of processors, of all threads, which other work changes less. Cosine "
        "similarity is the lowest of all chunks, the product of a stored vector with the unit vector of float32.",
    )
    sides = {PEER: peer, **{precision: partial(stage, precision) for precision in PRECISIONS}}
    timings = common.alternate(sides, arguments.rounds, cpu=True)
    truth = exact.encode(runs)
    nearness = {name: float((truth * read_vectors(one).astype(np.float32)).sum(1).min()) for name, one in stages.items()}
    rows = [
        {
            "side": name if name == PEER else f"vector stage, {name}",
            "chunks per CPU s": f"{len(table) / common.median(t.seconds for t in timing):.0f}",
            "lowest cosine similarity": f"{nearness[name]:.4f}" if name in nearness else "",
            "background load": common.load(timing),
        }
        for name, timing in timings.items()
    ]
    print(common.table(rows))
    wide, *narrow = PRECISIONS
    best = max(narrow, key=lambda name: common.ratio(timings[wide], timings[name]))
    faster, fastest = common.ratio(timings[PEER], timings[best]), common.ratio(timings[wide], timings[best])
    least = min(nearness[name] for name in narrow)
    claims = [
        common.claim(f"chunks per CPU s / peer, {best}", "≥ 3", f"{faster:.2f}", faster >= 3),
        common.claim(f"chunks per CPU s / {wide}, {best}", "≥ 2", f"{fastest:.2f}", fastest >= 2),
        common.claim("lowest cosine similarity to float32", "≥ 0.99", f"{least:.4f}", least >= 0.99),
    ]
    print(common.table(claims))


if __name__ == "__main__":
    main()
