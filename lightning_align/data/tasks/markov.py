"""Symbols from a Markov chain of order two. Its distribution is known, so a model can be evaluated exactly.

A prompt is two symbols, such as ``"ck"``. The response continues them: each symbol is one of the few that can follow the two
symbols before it, and the end is random. It is certain whether the chain can generate a response. The divergence between a
model's next-symbol distribution and that of the chain is a sum over a few symbols.
"""

import json
import random
from collections.abc import Iterator
from typing import Any, Literal, get_args

from lightning_align.data.rows import RowTask

Split = Literal["train", "validation", "test"]

_RULES = 1
"""A version in the fingerprint. Increase it when the same arguments produce other rows."""
SYMBOLS = "abcdefghijklmnopqrstuvwxyz"
ORDER = 2
END = ""
"""The symbol that ends a response."""


class MarkovChain(RowTask):
    """Prompts of two symbols and responses from a random Markov chain, for the byte tokenizer.

    Args:
        num_rows: The number of rows.
        seed: The seed of the rows.
        split: The split: ``train``, ``validation`` or ``test``. The rows of the splits are drawn independently.
        chain: The seed of the chain, that is, of its transition probabilities.
        num_symbols: The number of symbols.
        num_successors: The number of symbols that can follow two given symbols.
        end: The probability that a response ends before each of its symbols except the first.
        max_symbols: The maximum number of symbols of a response.

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
            raise ValueError(f"`split` must be one of {', '.join(get_args(Split))}, but got {split!r}")
        checks = {
            "num_rows": (num_rows >= 1, "at least 1"),
            "num_symbols": (2 <= num_symbols <= len(SYMBOLS), f"2 to {len(SYMBOLS)}"),
            "num_successors": (1 <= num_successors <= num_symbols, "at least 1 and at most `num_symbols`"),
            "end": (0 <= end < 1, "a probability below 1"),
            "max_symbols": (max_symbols >= 1, "at least 1"),
        }
        self.num_rows, self.seed, self.chain, self.num_symbols = num_rows, seed, chain, num_symbols
        self.split: Split = split
        self.num_successors, self.end, self.max_symbols = num_successors, end, max_symbols
        for name, (right, expected) in checks.items():
            if not right:
                raise ValueError(f"`{name}` must be {expected}, but got {getattr(self, name)}")
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
        """The arguments and the version of the task, as JSON."""
        arguments = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return "markov:" + json.dumps({"rules": _RULES} | arguments, sort_keys=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield rows ``{"prompt", "response"}``."""
        generator = random.Random(f"{self.split} rows {self.seed} of chain {self.chain}")
        for _ in range(self.num_rows):
            prompt, response = generator.choice(list(self._next)), ""
            while symbol := _draw(generator, self.distribution(prompt, response)):
                response += symbol
            yield {"prompt": prompt, "response": response}

    def distribution(self, prompt: str, response: str) -> dict[str, float]:
        """Compute the probability of each possible next symbol. `END` stands for the end of the response.

        Args:
            prompt: The two symbols of the prompt.
            response: The symbols of the response so far. The chain must be able to generate them.
        """
        if len(response) == self.max_symbols:
            return {END: 1.0}
        end = self.end if response else 0.0
        symbols = {symbol: (1 - end) * share for symbol, share in self._next[(prompt + response)[-ORDER:]].items()}
        return {END: end, **symbols} if end else symbols

    def grade(self, prompt: str, response: str) -> bool:
        """Check whether the chain can generate the response."""
        symbols = [*response, END]
        return all(symbol in self.distribution(prompt, response[:place]) for place, symbol in enumerate(symbols))


def _shares(generator: random.Random, count: int) -> list[float]:
    weights = [generator.uniform(0.2, 1.0) for _ in range(count)]
    return [weight / sum(weights) for weight in weights]


def _draw(generator: random.Random, distribution: dict[str, float]) -> str:
    return generator.choices(list(distribution), list(distribution.values()))[0]
