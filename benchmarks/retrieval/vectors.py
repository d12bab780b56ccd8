"""Embedding of chunks with MiniLM in bfloat16 against RETRO-pytorch 0.3.9, which embeds 16 at a time in float32."""

import argparse
import contextlib
import io
import tempfile
import warnings
from pathlib import Path

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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--held_out", type=float, default=0.02, help="share of the standard library to embed")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    from benchmarks.common.peer_retro_pytorch import PEER, packaged_model, retrieval

    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    model = packaged_model()
    tokenizer = load_tokenizer(f"{model}/tokenizer.json?bos=[CLS]&eos=[SEP]&pad=[PAD]")
    root, team = Path(tempfile.mkdtemp()), Team()
    source = StandardLibrary(part="held_out", held_out=arguments.held_out)
    chunks = build_chunks(root, source, DocumentTokenizer(tokenizer), chunk_size=64, team=team, verify=0.0)
    table, encoder = ChunkTable(chunks.folder), SentenceEncoder(model, decode=tokenizer.decode)
    runs = [table.chunk(number) for number in range(len(table))]
    retrieval.MODEL = AutoModel.from_pretrained(model).eval()
    # The format of the peer's chunks: a chunk and the first token of the next one, padded with 0.
    ids = np.memmap(root / "peer.chunks", dtype=np.int32, mode="w+", shape=(len(runs), 65))
    for row, run in zip(ids, runs, strict=True):
        row[: len(run)] = run
    ids.flush()
    stages: list[Stage] = []

    def stage() -> None:
        folder = Path(tempfile.mkdtemp(dir=root))
        options = {"team": team, "verify": 0.0, "trainer": lambda: quiet_trainer(precision="bf16-mixed")}
        stages.append(build_vectors(folder, chunks, encoder, **options))

    def peer() -> None:
        paths = {"chunks_memmap_path": str(root / "peer.chunks"), "embeddings_memmap_path": str(root / "peer.vectors")}
        with contextlib.redirect_stdout(io.StringIO()):
            retrieval.chunks_to_embeddings_(num_chunks=len(runs), embed_dim=384, **paths)

    common.heading(
        f"Embedding: bfloat16 against {PEER}",
        f"{len(table):,} chunks of 64 tokens, MiniLM-L6, two threads, {arguments.rounds} alternating rounds.",
    )
    timings = common.alternate({PEER: peer, "vector stage": stage}, arguments.rounds)
    rows = [
        {
            "side": name,
            "chunks/s": f"{len(table) / common.median(t.seconds for t in timing):.0f}",
            "background load": common.load(timing),
        }
        for name, timing in timings.items()
    ]
    print(common.table(rows))
    exact = encoder.encode(runs)
    stored = read_vectors(stages[-1]).astype(np.float32)
    nearness = float((exact * stored).sum(1).min())
    faster = common.ratio(timings[PEER], timings["vector stage"])
    claims = [
        common.claim("chunks/s / peer", "≥ 3", f"{faster:.2f}", faster >= 3),
        common.claim("lowest cosine similarity to float32", "≥ 0.99", f"{nearness:.4f}", nearness >= 0.99),
    ]
    print(common.table(claims))


if __name__ == "__main__":
    main()
