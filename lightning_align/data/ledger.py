"""Counts of kept, trimmed and dropped rows, per source.

Each row has exactly one outcome, so the counts add up to the number of rows. Notes are counted separately. By default, a
bad row raises an error that names it before training starts.
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
DUPLICATE = "duplicate"
"""The note of a row with the token ids of an earlier row."""
LIMITS = ("too_long", "prompt_too_long", "response_too_long")
"""The reasons for a drop that come from the user's length limits. Such rows are not bad."""
TIED, UNPAIRED, NO_TARGET = "tied", "unpaired", "no_target"
NOT_BAD = (*LIMITS, TIED, UNPAIRED, NO_TARGET)
"""The reasons for a drop that no correction of the row would change: a limit, answers of equal rank, a labelled answer without
an answer of another label, and an answer that the row excludes from training."""
_MOST_TRIMMED = 0.1
"""The share of responses without their end, or of rows over a limit, above which a warning gives advice."""
_MOST_COLUMNS = 12
"""The number of unread columns that the table names."""
_NUM_EXAMPLES = 5
"""The number of dropped rows that are kept as examples, per reason."""
_NUM_UNREAD = 1000
"""The number of names of unread columns that are counted one by one, so that the names of any source fit into memory."""
_OTHER_COLUMNS = "(other columns)"


class Ledger:
    """A counter of the outcomes of the rows of one source.

    Args:
        source: The name of the source, for messages.
        on_bad_row: What to do with a bad row: ``fail`` raises an error that names it, ``warn`` drops it and warns once at
            the end with examples, ``skip`` drops and counts it.

    Raises:
        ValueError: If ``on_bad_row`` is unknown.
    """

    def __init__(self, source: str, *, on_bad_row: BadRow = "fail") -> None:
        if on_bad_row not in ("fail", "warn", "skip"):
            raise ValueError(f"`on_bad_row` must be 'fail', 'warn' or 'skip', but got {on_bad_row!r}")
        self.source = source
        self.on_bad_row = on_bad_row
        self.counts: Counter[str] = Counter()
        """The number of rows per outcome: ``kept``, ``prompt_trimmed``, ``response_trimmed``, ``dropped/<reason>``."""
        self.notes: Counter[str] = Counter()
        """The number of rows per note, such as ``duplicate``, ``double_bos`` or ``merged_boundary``."""
        self.examples: dict[str, list[str]] = {}
        """The first dropped rows per reason."""
        self.unread: Counter[str] = Counter()
        """The number of rows per column that had a value and was not read. After 1000 columns, others are counted as one."""

    @property
    def num_rows(self) -> int:
        """The number of rows that were counted."""
        return sum(self.counts.values())

    @property
    def num_kept(self) -> int:
        """The number of rows that are used, whole or trimmed."""
        return self.counts[KEPT] + self.counts[PROMPT_TRIMMED] + self.counts[RESPONSE_TRIMMED]

    def keep(self, outcome: str = KEPT) -> None:
        """Count a row that is used.

        Args:
            outcome: ``kept``, ``prompt_trimmed`` or ``response_trimmed``.
        """
        assert outcome in (KEPT, PROMPT_TRIMMED, RESPONSE_TRIMMED), outcome
        self.counts[outcome] += 1

    def note(self, what: str) -> None:
        """Count a note on a row. It does not depend on the outcome of the row."""
        self.notes[what] += 1

    def skip_column(self, name: str) -> None:
        """Count a column of a row that was not read."""
        self._count_unread(name, 1)

    def _count_unread(self, name: str, count: int) -> None:
        known = name in self.unread or len(self.unread) < _NUM_UNREAD
        self.unread[name if known else _OTHER_COLUMNS] += count

    def add(self, other: "Ledger") -> None:
        """Add the counts and the examples of a ledger of the rows that follow in the same source."""
        self.counts.update(other.counts)
        self.notes.update(other.notes)
        for reason, shown in other.examples.items():
            examples = self.examples.setdefault(reason, [])
            examples += shown[: _NUM_EXAMPLES - len(examples)]
        for name, count in other.unread.items():
            self._count_unread(name, count)

    def drop(self, reason: str, *, origin: str, problem: str) -> None:
        """Count a row that is dropped.

        Args:
            reason: The name under which the row is counted.
            origin: The file and line of the row.
            problem: What is wrong with the row and what was expected.

        Raises:
            ValueError: If the row is bad and ``on_bad_row`` is ``fail``. See `NOT_BAD`.
        """
        if self.on_bad_row == "fail" and reason not in NOT_BAD:
            raise ValueError(
                f"{origin} {problem}. Correct the row, or set `on_bad_row` to 'warn' or 'skip' to drop and count such "
                f"rows ({reason})."
            )
        self.counts[f"dropped/{reason}"] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(f"{origin} {problem}")

    def close(self) -> None:
        """End the count. Warn about dropped rows if ``on_bad_row`` is ``warn``.

        Raises:
            ValueError: If no row is left.
        """
        if self.num_kept == 0:
            over = any(f"dropped/{reason}" in self.counts for reason in LIMITS)
            remedy = " Increase `max_length`, or choose another `truncation`." if over else ""
            raise ValueError(f"no row of {self.source} is left.{remedy}\n{self.table()}{self._example_lines(self.examples)}")
        bad = {reason: lines for reason, lines in self.examples.items() if reason not in NOT_BAD}
        if bad and self.on_bad_row == "warn":
            num_bad = sum(self.counts[f"dropped/{reason}"] for reason in bad)
            warnings.warn(
                f"{num_bad} of {self.num_rows} rows of {self.source} were dropped:{self._example_lines(bad)}",
                stacklevel=2,
            )

    def _example_lines(self, examples: dict[str, list[str]]) -> str:
        lines = ""
        for reason, shown in examples.items():
            lines += f"\n{reason}: {self.counts[f'dropped/{reason}']}"
            lines += "".join(f"\n  {line}" for line in shown)
        return lines

    def table(self) -> str:
        """Return the counts as lines of text."""
        lines = [f"{self.source}: {self.num_rows} rows"]
        for title, counts in (("", self.counts), ("note: ", self.notes)):
            lines += [f"  {title + name:<32}{count:>10}" for name, count in sorted(counts.items()) if count]
        if self.unread:
            columns = [f"{name} ({count})" for name, count in self.unread.most_common(_MOST_COLUMNS)]
            others = len(self.unread) - len(columns)
            lines.append(f"  columns not read: {', '.join(columns)}{f' and {others} more' if others else ''}")
        return "\n".join(lines)

    def advice(self) -> str:
        """Return a warning if much of the source is lost to the length limit, or an empty text."""
        num_over = sum(self.counts[f"dropped/{reason}"] for reason in LIMITS)
        num_trimmed = self.counts[RESPONSE_TRIMMED] + self.counts[PROMPT_TRIMMED]
        losses = []
        if self.counts[RESPONSE_TRIMMED] > _MOST_TRIMMED * self.num_kept:
            losses.append(
                f"{self.counts[RESPONSE_TRIMMED]} of {self.num_kept} rows lost the end of their response and its"
                " end-of-sequence token, so the model does not learn to stop there"
            )
        elif num_trimmed and num_trimmed == self.num_kept:
            losses.append(f"all {self.num_kept} rows lost a part of their prompt")
        if num_over > _MOST_TRIMMED * self.num_rows:
            losses.append(f"{num_over} of {self.num_rows} rows were dropped because they are too long")
        if not losses:
            return ""
        return f"{self.source}: {'; '.join(losses)}. Increase `max_length`, or choose another `truncation`."

    def metrics(self) -> dict[str, int]:
        """Return the counts as a flat dictionary, for a logger."""
        return {"rows": self.num_rows, **self.counts, **{f"notes/{name}": count for name, count in self.notes.items()}}

    def to_dict(self) -> dict[str, Any]:
        """Return the ledger as a dictionary that can be written as JSON. `from_dict` reads it."""
        return {
            "source": self.source,
            "on_bad_row": self.on_bad_row,
            "rows": self.num_rows,
            "counts": dict(sorted(self.counts.items())),
            "notes": dict(sorted(self.notes.items())),
            "examples": self.examples,
            "unread": dict(sorted(self.unread.items())),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Ledger":
        """Create a ledger from the dictionary that `to_dict` returned.

        Raises:
            KeyError: If ``content`` lacks a key.
        """
        ledger = cls(content["source"], on_bad_row=content["on_bad_row"])
        ledger.counts.update(content["counts"])
        ledger.notes.update(content["notes"])
        ledger.examples.update(content["examples"])
        ledger.unread.update(content.get("unread", {}))
        return ledger


def write_ledgers(path: Path, ledgers: dict[str, Ledger]) -> None:
    """Write ledgers as one JSON file, keyed by stage. The file is written atomically.

    Raises:
        ValueError: If the file cannot be written.
    """
    content = {stage: ledger.to_dict() for stage, ledger in ledgers.items()}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    publish_text(path, text)
