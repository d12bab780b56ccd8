"""Key-value arithmetic: expressions over keys. One model knows the values of the keys, another model knows arithmetic.

The task is from Bansal et al. 2024, arXiv 2401.02412, section 3.2. The paper has three sets:

- KV-SUBS: the prompt ``"S abc+xy="`` asks for the values. The response is ``"3+5"``.
- NUM-MATH: the prompt ``"M 3+5="`` asks for the result. The response is ``"8"``.
- KV-MATH: the prompt ``"M abc+xy="`` asks for the result, which needs the values and the arithmetic.

Other kinds of rows only train a model:

- ``inline``: text with each value after its key, ``"abc3+xy5"``. Every character is a target, so the model learns that a
  value follows where a key ends, and that no value follows a letter inside a key.
- ``lettered_math``: NUM-MATH with random letters before each number, ``"M qz3+b5="``, so that the model does not locate the
  numbers by their positions.
- ``copy_numbers`` and ``copy_letters``: copies of numbers and of letters, so that the model has seen every character.
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
"""A version in the fingerprint. Increase it when the same arguments produce other rows."""
_PROMPT = re.compile(r"([SM]) ((?:[a-z]+|[0-9]+)(?:[-+*](?:[a-z]+|[0-9]+))*)=")


class KeyValue(RowTask):
    """Rows of key-value arithmetic: one kind or a mixture of kinds, over all keys or a part of them.

    The table of keys and values depends only on `num_keys`, `key_length`, `num_values` and `table_seed`. Tasks with the same
    values of these arguments share the table. No key is a prefix of another key, so a value is determined where its key
    ends. The first keys of the table are the held-in keys, the next are the validation keys, and the rest are held out.

    Args:
        num_rows: The number of rows.
        mix: The weight of each kind of row. Weights are divided by their sum. Default is ``{kv_math: 1}``. `kv_math` with
            the `held_in` keys is the composition set of the paper's section 3.2, and `subs` with them that of its section
            4.1.
        keys: Which keys occur: ``all``, ``held_in``, ``validation`` or ``held_out``.
        num_keys: The number of keys in the table.
        held_in: The fraction of the keys that the composition is trained on.
        validation: The fraction of the keys for choosing hyperparameters.
        key_length: The minimum and maximum number of letters of a key.
        num_values: The number of values. They are 0 to ``num_values - 1``.
        operands: The numbers of operands of an expression. Each is equally likely.
        operations: Which of the operations + - * occur, as a string.
        seed: The seed of the rows.
        table_seed: The seed of the keys and their values.

    Raises:
        ValueError: If an argument is out of range, or the part of the keys is empty.
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
        # No key is a prefix of another, so short keys exclude longer ones. This is a safe limit for the number of keys.
        most_keys = 26**high // (2 * max(1, high - low + 1))
        checks = {
            "num_rows": (num_rows, num_rows >= 1, "at least 1"),
            "mix": (mix, shares_right, f"positive weights of {', '.join(get_args(Kind))}"),
            "keys": (keys, keys in get_args(Keys), f"one of {', '.join(get_args(Keys))}"),
            "key_length": (key_length, 1 <= low <= high, "the minimum and maximum number of letters, at least 1"),
            "num_keys": (num_keys, 3 <= num_keys <= most_keys, f"3 to {most_keys} with this `key_length`"),
            "held_in": (held_in, 0 < held_in and held_in + validation < 1, "above 0, and below 1 together with `validation`"),
            "validation": (validation, validation >= 0, "at least 0"),
            "num_values": (num_values, num_values >= 1, "at least 1"),
            "operands": (operands, len(operands) > 0 and min(operands) >= 1, "a list of numbers that are at least 1"),
            "operations": (operations, bool(operations) and set(operations) <= set("+-*"), "one or more of + - *"),
        }
        for name, (value, right, expected) in checks.items():
            if not right:
                raise ValueError(f"`{name}` of KeyValue must be {expected}, but got {value}")
        self.num_rows, self.mix, self.keys, self.num_keys = num_rows, mix, keys, num_keys
        self.held_in, self.validation, self.num_values = held_in, validation, num_values
        self.key_length, self.operands, self.operations = list(key_length), list(operands), operations
        self.seed, self.table_seed = seed, table_seed
        self._table = _table(num_keys, low, high, num_values, table_seed)
        if not self.names():
            raise ValueError(f"`keys` of KeyValue is {keys!r}, but this part of the {num_keys} keys is empty. Use more keys.")

    @property
    def fingerprint(self) -> str:
        """The arguments and the version of the task, as JSON."""
        arguments = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return json.dumps({"rules": _RULES} | arguments, sort_keys=True)

    @property
    def table(self) -> dict[str, int]:
        """The value of each key of the table."""
        return dict(self._table)

    def names(self) -> list[str]:
        """Return the keys that occur in the rows."""
        every = list(self._table)
        first, second = round(self.held_in * len(every)), round((self.held_in + self.validation) * len(every))
        parts = {"all": every, "held_in": every[:first], "validation": every[first:second], "held_out": every[second:]}
        return parts[self.keys]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield rows ``{"prompt", "response"}``."""
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
            # Random letters, so that a model trained on these rows learns nothing about the keys. Down to a single letter, so
            # that the model also sees what is left of a short key when a value replaces its last letter.
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
        """Check whether a response equals the right response exactly.

        Raises:
            ValueError: If the prompt is not a question about the keys of the table.
        """
        match = _PROMPT.fullmatch(prompt)
        names = re.findall(r"[a-z]+", match[2]) if match else []
        if match is None or any(name not in self._table for name in names):
            raise ValueError(f"`prompt` must be a question such as 'M abc+xy=' with keys of the table, but got {prompt!r}")
        numbers = re.sub(r"[a-z]+", lambda name: str(self._table[name[0]]), match[2])
        return response == (numbers if match[1] == "S" else str(_evaluate(numbers)))


def _join(signs: Sequence[str], terms: Sequence[str]) -> str:
    return "".join(sign + term for sign, term in zip(signs, terms, strict=True))


def _evaluate(expression: str) -> int:
    """Evaluate an expression of numbers, +, - and *. Multiplication has precedence."""
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
    prefixes: set[str] = set()  # of the keys so far
    while len(table) < num_keys:
        key = "".join(generator.choices(ascii_lowercase, k=generator.randint(low, high)))
        shorter = [key[:length] for length in range(1, len(key))]
        if key not in table and key not in prefixes and table.keys().isdisjoint(shorter):
            table[key] = generator.randrange(num_values)
            prefixes.update(shorter)
    return table
