"""Random facts that only the retrieval database contains, to measure exactly how much retrieval helps.

A fact, such as ``"qwxz: 48213907"``, is a document of one chunk. A note, three random words without a fact, is also a document
of one chunk. A question is a document with the key in its first chunk and the value in its second chunk. A model that reads
the neighbors of the first chunk can therefore predict the second. Values are random: without its fact, a value costs
log2(10) bits per digit, regardless of what the model has learned.
"""

import random
from collections.abc import Iterator
from typing import Literal, get_args

from lightning_align.data.documents import DocumentSource
from lightning_align.types import Document

Role = Literal["database", "train", "validation"]

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
KEY_LETTERS, VALUE_DIGITS = 4, 8


class Facts(DocumentSource):
    """Random facts and questions about them, for the byte tokenizer.

    Args:
        role: Which documents to generate. ``database`` is all facts and notes. ``train`` is the questions about the training
            facts. ``validation`` is the questions about the held-out facts, which do not occur in the training documents.
        num_facts: The number of training facts.
        num_held_out: The number of held-out facts.
        num_notes: The number of notes in the database. A note is random words without a fact. No question asks for it.
        chunk_size: The number of tokens per chunk. The part of a question before its value fills the first chunk exactly.
        seed: The seed of the keys and values.
        edition: The edition of the database. Editions differ only in the values of the held-out facts.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        role: Role = "database",
        *,
        num_facts: int = 6000,
        num_held_out: int = 300,
        num_notes: int = 8000,
        chunk_size: int = 16,
        seed: int = 0,
        edition: int = 0,
    ) -> None:
        if role not in get_args(Role):
            raise ValueError(f"`role` must be one of {', '.join(get_args(Role))}, but got {role!r}")
        if num_facts < 1 or num_held_out < 1 or num_notes < 0:
            raise ValueError(
                "`num_facts` and `num_held_out` must be at least 1 and `num_notes` at least 0, but got"
                f" num_facts={num_facts}, num_held_out={num_held_out} and num_notes={num_notes}"
            )
        if num_facts + num_held_out > (most := len(_LETTERS) ** KEY_LETTERS // 2):
            raise ValueError(
                f"`num_facts` plus `num_held_out` must be at most {most}, because there are no more keys, but got"
                f" {num_facts} and {num_held_out}"
            )
        least = len(_fact("x" * KEY_LETTERS, "0" * VALUE_DIGITS)) + 2  # with the first and last special token of the document
        if chunk_size < least:
            raise ValueError(f"`chunk_size` must be at least {least}, the number of tokens of a fact, but got {chunk_size}")
        self.role: Role = role
        self.num_facts, self.num_held_out, self.num_notes = num_facts, num_held_out, num_notes
        self.chunk_size, self.seed, self.edition = chunk_size, seed, edition

    def documents(self) -> Iterator[Document]:
        """See `DocumentSource.documents`. The names are ``fact/<key>``, ``note/<number>`` and ``question/<key>``."""
        facts = self.facts()
        if self.role == "database":
            yield from (Document(f"fact/{key}", _fact(key, value)) for key, value in facts)
            generator = random.Random(f"notes {self.seed}")
            # No word has the length of a key, so no word is a key.
            words = ([_letters(generator, length) for length in (5, 2, 5)] for _ in range(self.num_notes))
            yield from (Document(f"note/{number}", " ".join(note)) for number, note in enumerate(words))
        else:
            asked = facts[: self.num_facts] if self.role == "train" else facts[self.num_facts :]
            yield from (Document(f"question/{key}", self.prompt(key) + value) for key, value in asked)

    def facts(self) -> list[tuple[str, str]]:
        """Return the keys and values of all facts. The held-out facts are last."""
        generator = random.Random(f"facts {self.seed}")
        keys: dict[str, None] = {}
        while len(keys) < self.num_facts + self.num_held_out:
            keys[_letters(generator, KEY_LETTERS)] = None
        values = random.Random(f"values {self.seed}")
        edited = random.Random(f"edition {self.edition} of {self.seed}")
        sources = [values] * self.num_facts + [edited] * self.num_held_out
        return [(key, _digits(source)) for key, source in zip(keys, sources, strict=True)]

    def prompt(self, key: str) -> str:
        """Return the text of a question before its value. With the beginning-of-sequence token, it is exactly one chunk."""
        return f"{key}:".ljust(self.chunk_size - 1)


def _letters(generator: random.Random, count: int) -> str:
    return "".join(generator.choices(_LETTERS, k=count))


def _digits(generator: random.Random) -> str:
    return "".join(generator.choices("0123456789", k=VALUE_DIGITS))


def _fact(key: str, value: str) -> str:
    return f"{key}: {value}"
