"""Leak audit: recall and precision on planted copies of eight kinds, with three tokenizers."""

import argparse
import tempfile
import warnings
from pathlib import Path

from benchmarks import common
from lightning_align.data.tokenizer import Tokenizer, load_tokenizer
from lightning_align.retrieval.leaks import SHARE
from tests.retrieval.copies import KINDS, audit, grams_of_letters, largest_share, planted, tokenizers

GRAM = 13
"""Tokens per shingle of the comparison of ids."""


def by_ids(tokenizer: Tokenizer, queries: dict[str, str], database: dict[str, str]) -> set[str]:
    """Find the documents that have a Jaccard similarity of 0.8 on 13-grams of token ids with one of a database."""

    def grams(text: str) -> set[tuple[int, ...]]:
        ids = tokenizer.encode_batch([text])[0].ids
        return {tuple(ids[i : i + GRAM]) for i in range(max(1, len(ids) - GRAM + 1))}

    found, stored = set(), [grams(text) for text in database.values()]
    for name, text in queries.items():
        own = grams(text)
        if any(5 * len(own & other) >= 4 * len(own | other) for other in stored):
            found.add(name)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=108, help="held-out files; a ninth of them for each kind, a ninth without")
    parser.add_argument("--longest", type=int, default=8000, help="characters of a file that are used")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    held_out, database, kinds = planted(arguments.files, longest=arguments.longest)
    stored = {name: grams_of_letters(text) for name, text in database.items()}
    # A file can have a natural copy too. What counts is whether it has one, by sets of strings and no hashes.
    true = {name for name, text in held_out.items() if largest_share(text, stored.values()) >= SHARE}
    rows, totals = [], []
    with tempfile.TemporaryDirectory() as tmp:
        for name, spec in tokenizers(Path(tmp), list(database.values())[:100]).items():
            tokenizer = load_tokenizer(spec)
            found, seconds = audit(Path(tmp, name), tokenizer, held_out, database)
            old = by_ids(tokenizer, held_out, database)
            for method, flagged in (("text", found), ("raw ids", old)):
                recall = [
                    sum(name in flagged for name in kinds if kinds[name] == kind) / list(kinds.values()).count(kind)
                    for kind in KINDS
                ]
                precision = len(flagged & true) / max(1, len(flagged))
                shares = {kind: f"{share:.2f}" for kind, share in zip(KINDS, recall, strict=True)}
                rows.append({"tokenizer": name, "compared": method, **shares, "precision": f"{precision:.2f}"})
            totals.append({"tokenizer": name, "CPU seconds of the audit": f"{seconds:.2f}"})
    common.heading(
        "Leak audit: planted copies of held-out files",
        f"{len(held_out)} files of the standard library with {len(kinds)} planted copies among {len(database)} documents."
        f" Recall of each kind of copy, and precision: the share of the flagged files of which one document of the database"
        f" has {SHARE:.0%}, counted without hashes. Raw ids: Jaccard similarity of 0.8 on 13-grams of token ids, as in release"
        " 0.1.0.",
    )
    print(common.table(rows))
    print(common.table(totals))


if __name__ == "__main__":
    main()
