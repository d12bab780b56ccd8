"""A language whose distribution is known: symbols drawn from a Markov chain of order two, so a model can be measured exactly.

The prompt is two symbols, ``"ck"``; the response goes on from them, each symbol one of the few that may follow the two before
it, and ends at random. Whether a response could have come from the chain can be told for certain, and how far a model's next
symbol is from the chain's is a sum over a few symbols.
"""

import json
import random
from collections.abc import Iterator
from typing import Any, Literal, get_args

from lightning_align.data.rows import RowTask

Split = Literal["train", "validation", "test"]

_RULES = 1
"""Goes into the fingerprint: raise it when the same arguments come to mean other rows."""
SYMBOLS = "abcdefghijklmnopqrstuvwxyz"
ORDER = 2
END = ""
"""The symbol that ends a response."""


class MarkovChain(RowTask):
    """Prompts of two symbols and responses of a random chain, for the byte tokenizer.

    Args:
        num_rows: Number of rows.
        seed: Chooses the rows.
        split: Of rows drawn independently of those of the other splits.
        chain: Chooses the chain itself: which symbols follow which, how often.
        num_symbols: Symbols of the language.
        num_successors: Symbols that may follow two given ones.
        end: Probability that a response ends before each of its symbols but the first.
        max_symbols: Longest response.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        num_rows: int = 1000,
        *,
        seed: int = 0,
        split: Split = "train",
        chain: int = 0,
        num_symbols: int = 16,
        num_successors: int = 3,
        end: float = 0.05,
        max_symbols: int = 24,
    ) -> None:
        if split not in get_args(Split):
            raise ValueError(f"split={split!r}: expected one of {', '.join(get_args(Split))}; choose one of them")
        checks = {
            "num_rows": (num_rows >= 1, "1 or more"),
            "num_symbols": (2 <= num_symbols <= len(SYMBOLS), f"2 to {len(SYMBOLS)}"),
            "num_successors": (1 <= num_successors <= num_symbols, "1 or more, and at most num_symbols"),
            "end": (0 <= end < 1, "a probability below 1"),
            "max_symbols": (max_symbols >= 1, "1 or more"),
        }
        self.num_rows, self.seed, self.chain, self.num_symbols = num_rows, seed, chain, num_symbols
        self.split: Split = split
        self.num_successors, self.end, self.max_symbols = num_successors, end, max_symbols
        for name, (right, expected) in checks.items():
            if not right:
                raise ValueError(f"{name}={getattr(self, name)}: expected {expected}")
        generator = random.Random(f"chain {chain} of {num_symbols}, {num_successors}")
        symbols = SYMBOLS[:num_symbols]
        self._next = {
            first + second: dict(
                zip(generator.sample(symbols, num_successors), _shares(generator, num_successors), strict=True)
            )
            for first in symbols
            for second in symbols
        }

    @property
    def fingerprint(self) -> str:
        """The arguments, and the number of the rules by which they make rows."""
        arguments = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return "markov:" + json.dumps({"rules": _RULES} | arguments, sort_keys=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields ``{"prompt", "response"}``."""
        generator = random.Random(f"{self.split} rows {self.seed} of chain {self.chain}")
        for _ in range(self.num_rows):
            prompt, response = generator.choice(list(self._next)), ""
            while symbol := _draw(generator, self.distribution(prompt, response)):
                response += symbol
            yield {"prompt": prompt, "response": response}

    def distribution(self, prompt: str, response: str) -> dict[str, float]:
        """What may come next, and how probably: symbols, and `END` for the end.

        Args:
            prompt: two symbols.
            response: what has come so far, which the chain can write.
        """
        if len(response) == self.max_symbols:
            return {END: 1.0}
        end = self.end if response else 0.0
        symbols = {symbol: (1 - end) * share for symbol, share in self._next[(prompt + response)[-ORDER:]].items()}
        return {END: end, **symbols} if end else symbols

    def grade(self, prompt: str, response: str) -> bool:
        """Says whether the chain can write the response."""
        symbols = [*response, END]
        return all(symbol in self.distribution(prompt, response[:place]) for place, symbol in enumerate(symbols))


def _shares(generator: random.Random, count: int) -> list[float]:
    weights = [generator.uniform(0.2, 1.0) for _ in range(count)]
    return [weight / sum(weights) for weight in weights]


def _draw(generator: random.Random, distribution: dict[str, float]) -> str:
    return generator.choices(list(distribution), list(distribution.values()))[0]
