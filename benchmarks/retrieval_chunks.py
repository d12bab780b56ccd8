"""Chunking: the chunk stage against the tokenizer alone, in batches."""

import argparse
import json
import shutil
import tempfile
import warnings
from pathlib import Path

import _common as common
import torch
from tokenizers import Tokenizer

from lightning_align.data.documents import DocumentTokenizer, FolderDocuments, StandardLibrary
from lightning_align.data.tokenizer import FileTokenizer, train_tokenizer
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
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[::5]), encoding="utf-8")
    train_tokenizer(str(folder / "rows.jsonl"), output=str(folder / "t.json"), vocab_size=8192)
    plain = Tokenizer.from_file(str(folder / "t.json"))
    ours = DocumentTokenizer(FileTokenizer(str(folder / "t.json")))

    def alone() -> None:
        for start in range(0, len(texts), 64):
            for encoding in plain.encode_batch(texts[start : start + 64], add_special_tokens=False):
                encoding.ids  # noqa: B018  # Python's numbers, without which nobody has the ids

    def chunks() -> None:
        shutil.rmtree(folder / "db", ignore_errors=True)
        build_chunks(folder / "db", source, ours, chunk_size=64, team=Team(), verify=0.0)

    common.heading(
        "Chunking: the chunk stage against the tokenizer alone",
        f"{len(texts)} files, {megabytes:.1f} MB, a byte-level BPE of 8,192, chunks of 64; the stage reads, hashes, tokenises, "
        f"signs for near-duplicates and writes; two threads, {arguments.rounds} rounds, alternating.",
    )
    timings = common.alternate({"tokenizer alone": alone, "chunk stage": chunks}, arguments.rounds)
    speeds = {name: megabytes / common.median(t.seconds for t in timing) for name, timing in timings.items()}
    rows = [{"side": n, "MB/s": f"{speed:.2f}", "load": common.load(timings[n])} for n, speed in speeds.items()]
    print(common.table(rows))
    share = common.ratio(timings["tokenizer alone"], timings["chunk stage"])
    print(common.table([common.claim("speed of the tokenizer alone", "≥ 0.9", f"{share:.2f}", share >= 0.9)]))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
