"""The ledger: what became of every row of a source.

Each row ends in exactly one place, so the counts add up to the number of rows; notes are counted besides. A row that is
broken stops the run by default, named, before anything is trained.
"""

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from lightning_align.runtime.files import publish_text

BadRow = Literal["fail", "warn", "skip"]

KEPT = "kept"
PROMPT_TRIMMED = "prompt_trimmed"
RESPONSE_TRIMMED = "response_trimmed"
LIMITS = ("too_long", "prompt_too_long", "response_too_long")
"""Reasons that follow from the limits that the user set, and are no fault of a row."""
_NUM_EXAMPLES = 5


class Ledger:
    """Counts what becomes of the rows of one source.

    Args:
        source: What the rows are from, for messages.
        on_bad_row: What a broken row does: ``fail`` raises an error that names it, ``warn`` drops it and warns once at
            the end with examples, ``skip`` drops and counts it.
    """

    def __init__(self, source: str, *, on_bad_row: BadRow = "fail") -> None:
        if on_bad_row not in ("fail", "warn", "skip"):
            raise ValueError(f"on_bad_row is {on_bad_row!r}, expected 'fail', 'warn' or 'skip'")
        self.source = source
        self.on_bad_row = on_bad_row
        self.counts: Counter[str] = Counter()
        """Rows by outcome: ``kept``, ``prompt_trimmed``, ``response_trimmed``, ``dropped/<reason>``."""
        self.notes: Counter[str] = Counter()
        """Rows by what else is to be said of them: ``duplicate``, ``double_bos``, ``merged_boundary`` and the like."""
        self.examples: dict[str, list[str]] = {}
        """The first few dropped rows of each reason."""

    @property
    def num_rows(self) -> int:
        """Rows seen."""
        return sum(self.counts.values())

    @property
    def num_kept(self) -> int:
        """Rows that go on to training, trimmed or whole."""
        return self.counts[KEPT] + self.counts[PROMPT_TRIMMED] + self.counts[RESPONSE_TRIMMED]

    def keep(self, outcome: str = KEPT) -> None:
        """Counts a row that goes on: whole, ``prompt_trimmed`` or ``response_trimmed``."""
        assert outcome in (KEPT, PROMPT_TRIMMED, RESPONSE_TRIMMED), outcome
        self.counts[outcome] += 1

    def note(self, what: str) -> None:
        """Counts a remark on a row, whatever becomes of it."""
        self.notes[what] += 1

    def drop(self, reason: str, *, origin: str, problem: str) -> None:
        """Counts a row that does not go on.

        Args:
            reason: The name it is counted under.
            origin: The row.
            problem: What is wrong with it and what was expected.

        Raises:
            ValueError: If the row is broken and ``on_bad_row`` is ``fail``. Rows over a limit never are.
        """
        if self.on_bad_row == "fail" and reason not in LIMITS:
            raise ValueError(
                f"{origin} {problem}. Correct the row, or set on_bad_row to 'warn' or 'skip' to drop and count such "
                f"rows ({reason})"
            )
        self.counts[f"dropped/{reason}"] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(f"{origin} {problem}")

    def close(self) -> None:
        """Ends the count: warns of dropped rows where the policy says so.

        Raises:
            ValueError: If no row is left.
        """
        if self.num_kept == 0:
            over = any(f"dropped/{reason}" in self.counts for reason in LIMITS)
            remedy = " Raise max_length, or choose another truncation." if over else ""
            raise ValueError(f"no row of {self.source} is left.{remedy}\n{self.table()}{self._example_lines(self.examples)}")
        broken = {reason: lines for reason, lines in self.examples.items() if reason not in LIMITS}
        if broken and self.on_bad_row == "warn":
            num_broken = sum(self.counts[f"dropped/{reason}"] for reason in broken)
            warnings.warn(
                f"{num_broken} of {self.num_rows} rows of {self.source} are dropped:{self._example_lines(broken)}",
                stacklevel=2,
            )

    def _example_lines(self, examples: dict[str, list[str]]) -> str:
        lines = ""
        for reason, shown in examples.items():
            lines += f"\n{reason}: {self.counts[f'dropped/{reason}']}"
            lines += "".join(f"\n  {line}" for line in shown)
        return lines

    def table(self) -> str:
        """The counts as lines of text, for a person."""
        lines = [f"{self.source}: {self.num_rows} rows"]
        for title, counts in (("", self.counts), ("note: ", self.notes)):
            lines += [f"  {title + name:<32}{count:>10}" for name, count in sorted(counts.items()) if count]
        return "\n".join(lines)

    def metrics(self) -> dict[str, int]:
        """The counts as a flat dictionary, for a logger."""
        return {"rows": self.num_rows, **self.counts, **{f"notes/{name}": count for name, count in self.notes.items()}}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it; `from_dict` reads it back."""
        return {
            "source": self.source,
            "on_bad_row": self.on_bad_row,
            "rows": self.num_rows,
            "counts": dict(sorted(self.counts.items())),
            "notes": dict(sorted(self.notes.items())),
            "examples": self.examples,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Ledger":
        """Reads back what `to_dict` gave.

        Raises:
            KeyError: If ``content`` is something else.
        """
        ledger = cls(content["source"], on_bad_row=content["on_bad_row"])
        ledger.counts.update(content["counts"])
        ledger.notes.update(content["notes"])
        ledger.examples.update(content["examples"])
        return ledger


def write_ledgers(path: Path, ledgers: dict[str, Ledger]) -> None:
    """Writes ledgers as one JSON file, keyed by stage, in one step.

    Raises:
        ValueError: If the folder cannot be written to.
    """
    content = {stage: ledger.to_dict() for stage, ledger in ledgers.items()}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    publish_text(path, text)
