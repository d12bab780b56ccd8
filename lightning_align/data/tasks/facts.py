"""Facts that nothing but the database can know: what retrieval is worth where the right answer is known.

A fact, ``"qwxz: 48213907"``, is a document of one chunk; so is a note, three words that say nothing. A question is a document
whose first chunk names the key and whose second gives the value, so that whoever reads the neighbours of the first chunk can
write the second. Values are random: without its fact a value costs log2(10) bits a digit, whatever a model has learned.
"""

import json
import random
from collections.abc import Iterator
from typing import Literal, get_args

from lightning_align.data.documents import DocumentSource
from lightning_align.types import Document

Role = Literal["database", "train", "validation"]

_RULES = 7
"""Goes into the fingerprint: raise it when the same arguments come to mean other documents."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
KEY_LETTERS, VALUE_DIGITS = 4, 8


class Facts(DocumentSource):
    """Random facts and questions about them, for the byte tokenizer.

    Args:
        role: ``database`` is all facts; ``train`` questions about some of them, ``validation`` about the held-out ones, which
            no text to train on mentions.
        num_facts: Facts to train on.
        num_held_out: Facts whose questions are held out.
        num_notes: Other documents of the database, words without any fact, that no question asks for.
        chunk_size: Tokens a chunk, of which a question fills the first exactly.
        seed: Chooses keys and values.
        edition: Editions of the database differ in the values of the held-out facts, and in nothing else.

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
            raise ValueError(f"role={role!r}: expected one of {', '.join(get_args(Role))}; choose one of them")
        if num_facts < 1 or num_held_out < 1 or num_notes < 0:
            raise ValueError(
                f"num_facts={num_facts}, num_held_out={num_held_out} and num_notes={num_notes}: expected 1 or more facts of "
                "each kind, and no negative number of notes"
            )
        if num_facts + num_held_out > (most := len(_LETTERS) ** KEY_LETTERS // 2):
            raise ValueError(
                f"num_facts={num_facts} and num_held_out={num_held_out}: expected at most {most} together; there are no more "
                "keys"
            )
        least = len(_fact("x" * KEY_LETTERS, "0" * VALUE_DIGITS)) + 2  # with the beginning and the end of the document
        if chunk_size < least:
            raise ValueError(f"chunk_size={chunk_size}: expected {least} or more, the tokens of a fact")
        self.role: Role = role
        self.num_facts, self.num_held_out, self.num_notes = num_facts, num_held_out, num_notes
        self.chunk_size, self.seed, self.edition = chunk_size, seed, edition

    @property
    def fingerprint(self) -> str:
        """The arguments, and the number of the rules by which they make documents."""
        return "facts:" + json.dumps({"rules": _RULES} | vars(self), sort_keys=True)

    def documents(self) -> Iterator[Document]:
        """See `DocumentSource`. Ids are ``fact/qwxz`` and ``question/qwxz``."""
        facts = self.facts()
        if self.role == "database":
            yield from (Document(f"fact/{key}", _fact(key, value)) for key, value in facts)
            generator = random.Random(f"notes {self.seed}")
            # Words of other lengths than a key, so that none is one.
            words = ([_letters(generator, length) for length in (5, 2, 5)] for _ in range(self.num_notes))
            yield from (Document(f"note/{number}", " ".join(note)) for number, note in enumerate(words))
        else:
            asked = facts[: self.num_facts] if self.role == "train" else facts[self.num_facts :]
            yield from (Document(f"question/{key}", self.prompt(key) + value) for key, value in asked)

    def facts(self) -> list[tuple[str, str]]:
        """Keys and values, those that are held out last."""
        generator = random.Random(f"facts {self.seed}")
        keys: dict[str, None] = {}
        while len(keys) < self.num_facts + self.num_held_out:
            keys[_letters(generator, KEY_LETTERS)] = None
        values = random.Random(f"values {self.seed}")
        edited = random.Random(f"edition {self.edition} of {self.seed}")
        sources = [values] * self.num_facts + [edited] * self.num_held_out
        return [(key, _digits(source)) for key, source in zip(keys, sources, strict=True)]

    def prompt(self, key: str) -> str:
        """A question up to its value: with the beginning-of-sequence token exactly one chunk."""
        return f"{key}:".ljust(self.chunk_size - 1)


def _letters(generator: random.Random, count: int) -> str:
    return "".join(generator.choices(_LETTERS, k=count))


def _digits(generator: random.Random) -> str:
    return "".join(generator.choices("0123456789", k=VALUE_DIGITS))


def _fact(key: str, value: str) -> str:
    return f"{key}: {value}"
