"""Printing of results, and storage of what a study measured."""

import json
import os
import re
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Two-sided 95 % quantile of Student's t for the mean of so many seeds."""


def heading(title: str, text: str) -> None:
    """Print the title of a section and its first paragraph.

    Args:
        title: of the section.
        text: the paragraph; it is wrapped here.
    """
    print(f"## {title}\n\n{textwrap.fill(text, 120)}\n")


def table(rows: Sequence[dict[str, str]]) -> str:
    """A markdown table.

    Args:
        rows: cells by column name. All rows have the same columns.
    """
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def claim(what: str, required: str, measured: str, met: bool) -> dict[str, str]:
    """A row of the table of claims."""
    return {"claim": what, "required": required, "measured": measured, "": "met" if met else "**missed**"}


def read_rows(path: Path | str, count: int | None = None) -> list[Any]:
    """The values of a JSONL file, or its first ones. A text may hold other line separators than a line feed."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()][:count]


def save(path: Path, results: Any) -> None:
    """Write results as JSON, atomically. Short innermost lists and objects take one line each."""

    def join(match: re.Match[str]) -> str:
        # JSON strings contain no raw newlines, so this changes only whitespace between values.
        line = re.sub(r"\s*\n\s*", " ", match[0])
        return line if len(line) <= 200 else match[0]

    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", join, json.dumps(results, indent=1))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def spread(values: list[float]) -> float:
    """Half the width of the 95 % interval of a mean over seeds. Not a number for one seed, and for more than `T_95` has."""
    return T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) in T_95 else float("nan")
