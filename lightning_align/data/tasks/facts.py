"""Facts that nothing but the database can know: what retrieval is worth where the right answer is known.

A fact, ``"Code of qwxzk abc is 48213907."``, is a document of one chunk. A question is a document whose first chunk names the
key and whose second gives the value, so that whoever reads the neighbours of the first chunk can write the second. Values are
random: without its fact a value costs log2(10) bits a digit, whatever a model has learned.
"""

import json
import random
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from lightning_align.data.documents import DocumentSource
from lightning_align.types import Document

Role = Literal["database", "questions"]

_RULES = 4
"""Goes into the fingerprint: raise it when the same arguments come to mean other documents."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAME_LETTERS, PLACE_LETTERS, VALUE_DIGITS = 5, 3, 8


class Facts(DocumentSource):
    """Random facts and questions about them, for the byte tokenizer.

    Args:
        role: ``database`` is the facts, and questions about those to train on; ``questions`` those about the held-out ones.
        num_facts: Facts to train on.
        num_held_out: Facts whose questions are held out.
        unanswered: Share of the questions to train on whose fact the database does not have, but one about another name at
            the same place, ``hfgde abc`` for ``qwxzk abc``, which is found in its stead: whoever believes what is found without
            looking at the key is wrong.
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
        num_facts: int = 3000,
        num_held_out: int = 300,
        unanswered: float = 0.3,
        chunk_size: int = 32,
        seed: int = 0,
        edition: int = 0,
    ) -> None:
        if role not in get_args(Role):
            raise ValueError(f"role={role!r}: expected one of {', '.join(get_args(Role))}; choose one of them")
        if num_facts < 1 or num_held_out < 1:
            raise ValueError(f"num_facts={num_facts} and num_held_out={num_held_out}: expected 1 or more of each")
        if num_facts + num_held_out > len(_LETTERS) ** PLACE_LETTERS // 2:
            raise ValueError(
                f"num_facts={num_facts} and num_held_out={num_held_out}: expected at most "
                f"{len(_LETTERS) ** PLACE_LETTERS // 2} together; there are no more places"
            )
        if not 0 <= unanswered < 1:
            raise ValueError(f"unanswered={unanswered}: expected a share; give a number from 0 to below 1")
        least = (
            len(_fact("x" * (NAME_LETTERS + 1 + PLACE_LETTERS), "0" * VALUE_DIGITS)) + 2
        )  # with the beginning and the end of the document
        if chunk_size < least:
            raise ValueError(f"chunk_size={chunk_size}: expected {least} or more, the tokens of a fact")
        self.role: Role = role
        self.num_facts, self.num_held_out, self.chunk_size = num_facts, num_held_out, chunk_size
        self.unanswered, self.seed, self.edition = unanswered, seed, edition

    @property
    def num_unanswered(self) -> int:
        """Questions to train on, the first, that the database has a fact of another name for."""
        return round(self.unanswered * self.num_facts)

    @property
    def fingerprint(self) -> str:
        """The arguments, and the number of the rules by which they make documents."""
        return "facts:" + json.dumps({"rules": _RULES} | vars(self), sort_keys=True)

    def documents(self) -> Iterator[Document]:
        """See `DocumentSource`. Ids are ``fact/qwxzk abc`` and ``question/qwxzk abc``."""
        facts = self.facts()
        if self.role == "database":
            told = [*self._beside(facts[: self.num_unanswered]), *facts[self.num_unanswered :]]
            yield from (Document(f"fact/{key}", _fact(key, value)) for key, value in told)
        asked = facts[: self.num_facts] if self.role == "database" else facts[self.num_facts :]
        yield from (Document(f"question/{key}", self.prompt(key) + value) for key, value in asked)

    def facts(self) -> list[tuple[str, str]]:
        """Keys and values, those that are held out last."""
        generator = random.Random(f"facts {self.seed}")
        places: dict[str, None] = {}
        while len(places) < self.num_facts + self.num_held_out:
            places[_letters(generator, PLACE_LETTERS)] = None
        keys = [f"{_letters(generator, NAME_LETTERS)} {place}" for place in places]
        values = random.Random(f"values {self.seed}")
        edited = random.Random(f"edition {self.edition} of {self.seed}")
        sources = [values] * self.num_facts + [edited] * self.num_held_out
        return [(key, _digits(source)) for key, source in zip(keys, sources, strict=True)]

    def prompt(self, key: str) -> str:
        """A question up to its value: with the beginning-of-sequence token exactly one chunk."""
        return f"Code of {key} is".ljust(self.chunk_size - 1)

    def _beside(self, facts: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Of each fact one of the same place, with another name and a value of its own."""
        generator = random.Random(f"beside {self.seed}")
        for key, _ in facts:
            name, place = key.split()
            while (other := _letters(generator, NAME_LETTERS)) == name:
                pass
            yield f"{other} {place}", _digits(generator)


def _letters(generator: random.Random, count: int) -> str:
    return "".join(generator.choices(_LETTERS, k=count))


def _digits(generator: random.Random) -> str:
    return "".join(generator.choices("0123456789", k=VALUE_DIGITS))


def _fact(key: str, value: str) -> str:
    return f"Code of {key} is {value}."
