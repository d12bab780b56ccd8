"""Sums of made-up words with values: the rows of a study, whose settings are the numbers of words and of steps."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

VALUES = range(1, 10)  # one token each
QUESTIONS, NUMBER_SHARE = 500, 0.2
VALIDATION, TABLE_SEED = 0.1, 0
BATCH, AUGMENT_BATCH = 16, 32
Row = dict[str, str]


@cache
def table(number: int) -> dict[str, int]:
    """The value of each word, the words in the order of their parts: held in, validation, held out."""
    draw, found = random.Random(f"table {TABLE_SEED}"), dict[str, int]()
    while len(found) < number:
        syllables = [draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(2)]
        found.setdefault("".join(syllables), draw.choice(VALUES))
    return found


def row(terms: list[str], answer: object) -> Row:
    """A question about terms, which are words or numbers."""
    return {"prompt": f"Sum: {' + '.join(terms)} = ", "response": str(answer)}


def number_sums() -> list[Row]:
    """All sums of two numbers."""
    return [row([str(a), str(b)], a + b) for a, b in itertools.product(VALUES, VALUES)]


@dataclass(frozen=True)
class Rows:
    """The rows of a study.

    Args:
        words: The number of words.
        held_in: The share of them that training composes.
        one_word: The share of the rows of training that add a word and a number, which are easier to learn from.
        steps: The steps of training.
        augment_steps: The steps of the augment's training.
    """

    words: int = 400
    held_in: float = 0.25
    one_word: float = 0.0
    steps: int = 400
    augment_steps: int = 320

    @property
    def table(self) -> dict[str, int]:
        """The value of each word."""
        return table(self.words)

    @cached_property
    def parts(self) -> dict[str, list[str]]:
        """The words that training composes, those for choosing settings, and those of the questions that are reported."""
        words, first, second = (
            list(self.table),
            round(self.held_in * self.words),
            round((self.held_in + VALIDATION) * self.words),
        )
        return {"held_in": words[:first], "validation": words[first:second], "held_out": words[second:]}

    def sums(self, part: str, count: int, draw: random.Random) -> Iterator[Row]:
        """Sums of two words of a part."""
        words = self.parts[part]
        for _ in range(count):
            terms = [draw.choice(words), draw.choice(words)]
            yield row(terms, sum(self.table[term] for term in terms))

    def questions(self) -> dict[str, list[Row]]:
        """The questions, which are the same for all seeds. Those of held-out words are reported."""
        draw = random.Random("questions")
        rows = {"held_out": list(self.sums("held_out", QUESTIONS, draw))}
        rows |= {name: list(self.sums(name, QUESTIONS // 2, draw)) for name in ("validation", "held_in")}
        return rows | {"numbers": number_sums(), "table": [self.value_of([word]) for word in self.table]}

    def composed(self, seed: int) -> list[Row]:
        """The rows of training: sums of held-in words, sums of numbers, and sums of a word and a number."""
        draw, numbers, rows = random.Random(f"rows {seed}"), number_sums(), []
        # All sums are drawn first, so that they do not depend on how many of them are replaced.
        for two_words in list(self.sums("held_in", self.steps * BATCH, draw)):
            place = draw.random()
            if place < NUMBER_SHARE:
                rows.append(draw.choice(numbers))
            elif place < NUMBER_SHARE + self.one_word:
                rows.append(self.word_and_number(draw))
            else:
                rows.append(two_words)
        return rows

    def word_and_number(self, draw: random.Random) -> Row:
        """A sum of a held-in word and a number in either order."""
        word, number = draw.choice(self.parts["held_in"]), draw.choice(VALUES)
        terms = [word, str(number)] if draw.random() < 0.5 else [str(number), word]
        return row(terms, self.table[word] + number)

    def of_table(self) -> list[Row]:
        """The rows of the augment: the value of the last word of a sum of one or two words. It adds nothing."""
        draw, words = random.Random("augment"), list(self.table)
        rows = range(self.augment_steps * AUGMENT_BATCH)
        return [self.value_of([draw.choice(words) for _ in range(1 + place % 2)]) for place in rows]

    def value_of(self, terms: list[str]) -> Row:
        """A row that asks for the value of the last word. It follows where the word ends, so that it is readable there."""
        return {"prompt": f"Sum: {' + '.join(terms)}", "response": str(self.table[terms[-1]])}
