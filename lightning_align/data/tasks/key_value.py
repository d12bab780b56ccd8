"""Key-value arithmetic: expressions over names whose values one model knows and whose arithmetic another can do.

Bansal et al. 2024, arXiv 2401.02412, section 3.2, of which these are the three sets with their tags:

- KV-SUBS ``"S abc+xy="`` asks for the values, ``"3+5"``;
- NUM-MATH ``"M 3+5="`` asks for the result, ``"8"``;
- KV-MATH ``"M abc+xy="`` asks for the result as well, which needs both.

Besides these there are rows that only train a model: text with each value behind its key, ``"abc3+xy5"`` (``inline``), of
which every character is learned, so that the value is known where the key ends, and a letter within a key promises none;
NUM-MATH with letters that mean nothing before each number, ``"M qz3+b5="`` (``lettered_math``), so that a model does not find
the numbers by their places; and copies of numbers and of letters, so that it has met every character.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from string import ascii_lowercase
from typing import Any, Literal, get_args

from lightning_align.data.rows import RowTask

Kind = Literal["subs", "num_math", "kv_math", "inline", "lettered_math", "copy_numbers", "copy_letters"]
Keys = Literal["all", "held_in", "validation", "held_out"]

_RULES = 3
"""Goes into the fingerprint: raise it when the same arguments come to mean other rows."""
_PROMPT = re.compile(r"([SM]) ((?:[a-z]+|[0-9]+)(?:[-+*](?:[a-z]+|[0-9]+))*)=")


class KeyValue(RowTask):
    """Rows of one kind or of a mixture, over a part of the keys.

    The table of keys and values depends on `num_keys`, `key_length`, `num_values` and `table_seed` alone, so that tasks that
    agree on them are about one table. No key begins another one: where a key has been read, a value can be known. The first
    keys are held in (composed in training), then come those for validation.

    Args:
        num_rows: Number of rows.
        mix: Share of each kind of row; the shares are of their sum. `kv_math` over `held_in` keys is the paper's
            composition set in its section 3.2, `subs` over them that of its section 4.1.
        keys: Which keys appear.
        num_keys: Keys of the table.
        held_in: Share of the keys that training composes.
        validation: Share of the keys for choosing settings.
        key_length: Fewest and most letters of a key.
        num_values: Values are 0 to this less 1.
        operands: Numbers of operands that appear, each as often.
        operations: Which of + - and * appear.
        seed: Chooses the rows.
        table_seed: Chooses the keys and their values.
    """

    def __init__(
        self,
        num_rows: int = 1000,
        *,
        mix: Mapping[Kind, float] | None = None,
        keys: Keys = "all",
        num_keys: int = 1000,
        held_in: float = 0.2,
        validation: float = 0.1,
        key_length: Sequence[int] = (2, 4),
        num_values: int = 10,
        operands: Sequence[int] = (2,),
        operations: str = "+-",
        seed: int = 0,
        table_seed: int = 0,
    ) -> None:
        mix = {"kv_math": 1.0} if mix is None else dict(mix)
        low, high = key_length
        shares_right = set(mix) <= set(get_args(Kind)) and min(mix.values(), default=0) > 0
        # Where no key begins another, about 1 in so many of the longest names stays free.
        most_keys = 26**high // (2 * max(1, high - low + 1))
        checks = {
            "num_rows": (num_rows, num_rows >= 1, "1 or more"),
            "mix": (mix, shares_right, f"shares above 0 of {', '.join(get_args(Kind))}"),
            "keys": (keys, keys in get_args(Keys), f"one of {', '.join(get_args(Keys))}"),
            "key_length": (key_length, 1 <= low <= high, "the fewest letters and the most, 1 or more"),
            "num_keys": (num_keys, 3 <= num_keys <= most_keys, f"3 to {most_keys}, for which there are names of that length"),
            "held_in": (held_in, 0 < held_in and held_in + validation < 1, "above 0, and with validation below 1"),
            "validation": (validation, validation >= 0, "0 or more"),
            "num_values": (num_values, num_values >= 1, "1 or more"),
            "operands": (operands, len(operands) > 0 and min(operands) >= 1, "numbers from 1"),
            "operations": (operations, bool(operations) and set(operations) <= set("+-*"), "some of + - *"),
        }
        for name, (value, right, expected) in checks.items():
            if not right:
                raise ValueError(f"KeyValue: {name} is {value}, expected {expected}")
        self.num_rows, self.mix, self.keys, self.num_keys = num_rows, mix, keys, num_keys
        self.held_in, self.validation, self.num_values = held_in, validation, num_values
        self.key_length, self.operands, self.operations = list(key_length), list(operands), operations
        self.seed, self.table_seed = seed, table_seed
        self._table = _table(num_keys, low, high, num_values, table_seed)
        if not self.names():
            raise ValueError(f"KeyValue: keys is {keys!r}, and that part of {num_keys} keys is empty: take a larger share")

    @property
    def fingerprint(self) -> str:
        """The arguments, and the number of the rules by which they make rows."""
        arguments = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return json.dumps({"rules": _RULES} | arguments, sort_keys=True)

    @property
    def table(self) -> dict[str, int]:
        """The value of every key."""
        return dict(self._table)

    def names(self) -> list[str]:
        """The keys that appear."""
        every = list(self._table)
        first, second = round(self.held_in * len(every)), round((self.held_in + self.validation) * len(every))
        parts = {"all": every, "held_in": every[:first], "validation": every[first:second], "held_out": every[second:]}
        return parts[self.keys]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields ``{"prompt", "response"}``."""
        generator = random.Random(f"rows {self.seed}")
        names, kinds, shares = self.names(), list(self.mix), list(self.mix.values())
        for _ in range(self.num_rows):
            (kind,) = generator.choices(kinds, shares)
            yield self._row(kind, names, generator)

    def _row(self, kind: Kind, names: list[str], generator: random.Random) -> dict[str, str]:
        count = generator.choice(self.operands)
        signs = ["", *(generator.choice(self.operations) for _ in range(count - 1))]
        if kind in ("subs", "kv_math", "inline"):
            words = generator.choices(names, k=count)
            values = [str(self._table[word]) for word in words]
        else:
            # Any letters, so that a model that is trained on them learns nothing about the keys; and down to a single one, so
            # that it also meets what is left of a short key where a value takes the place of its last letter.
            words = ["".join(generator.choices(ascii_lowercase, k=generator.randint(1, self.key_length[1]))) for _ in signs]
            values = [str(generator.randrange(self.num_values)) for _ in signs]
        numbers, letters = _join(signs, values), _join(signs, words)
        both = _join(signs, [word + value for word, value in zip(words, values, strict=True)])
        tag = generator.choice("SM")
        question, answer = {
            "subs": (f"S {letters}=", numbers),
            "num_math": (f"M {numbers}=", str(_evaluate(numbers))),
            "kv_math": (f"M {letters}=", str(_evaluate(numbers))),
            "inline": (f"{tag} ", f"{both}={numbers}" if tag == "S" else both),
            "lettered_math": (f"M {both}=", str(_evaluate(numbers))),
            "copy_numbers": (f"S {numbers}=", numbers),
            "copy_letters": (f"S {letters}=", letters),
        }[kind]
        return {"prompt": question, "response": answer}

    def grade(self, prompt: str, response: str) -> bool:
        """Says whether a response is right, to the character.

        Raises:
            ValueError: If the prompt is no question of this table.
        """
        match = _PROMPT.fullmatch(prompt)
        names = re.findall(r"[a-z]+", match[2]) if match else []
        if match is None or any(name not in self._table for name in names):
            raise ValueError(f"prompt={prompt!r}: expected a question such as 'M abc+xy=', over the keys of this table")
        numbers = re.sub(r"[a-z]+", lambda name: str(self._table[name[0]]), match[2])
        return response == (numbers if match[1] == "S" else str(_evaluate(numbers)))


def _join(signs: Sequence[str], terms: Sequence[str]) -> str:
    return "".join(sign + term for sign, term in zip(signs, terms, strict=True))


def _evaluate(expression: str) -> int:
    """The value of an expression in numbers, + - and *, of which * binds closer."""
    total = 0
    for sign, product in re.findall(r"([-+]?)([0-9*]+)", expression):
        value = 1
        for factor in product.split("*"):
            value *= int(factor)
        total += -value if sign == "-" else value
    return total


def _table(num_keys: int, low: int, high: int, num_values: int, seed: int) -> dict[str, int]:
    generator = random.Random(f"table {seed}")
    table: dict[str, int] = {}
    beginnings: set[str] = set()  # of the keys so far
    while len(table) < num_keys:
        key = "".join(generator.choices(ascii_lowercase, k=generator.randint(low, high)))
        shorter = [key[:length] for length in range(1, len(key))]
        if key not in table and key not in beginnings and table.keys().isdisjoint(shorter):
            table[key] = generator.randrange(num_values)
            beginnings.update(shorter)
    return table
