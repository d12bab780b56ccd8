"""Texts in Markdown as they are, for TensorBoard: nothing in them is taken as a mark, a tag or a break of the table."""

from collections.abc import Iterable, Sequence
from textwrap import wrap

_KEPT = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")


def block(text: str) -> str:
    """Format text as a code block, with lines that fit the page: such a block does not wrap."""
    lines = [part for line in text.splitlines() for part in wrap(line, width=110, drop_whitespace=False) or [""]]
    if not text.strip():
        lines = [repr(text) if text else "(nothing)"]  # white space would be invisible
    return "\n".join("    " + line for line in lines)


def cell(text: str) -> str:
    """Format text as a cell of a table: in code type, with line breaks and runs of spaces as they are."""
    if not text:
        return "(nothing)"
    return f"<code>{'<br>'.join(_line(line) for line in text.split(chr(10)))}</code>"


def _line(text: str) -> str:
    # Punctuation as numbers of characters: Markdown has no way to write a bar in a table, and reads * and _ within a tag.
    text = text.replace("  ", " \N{NO-BREAK SPACE}")
    if text.startswith(" "):
        text = "\N{NO-BREAK SPACE}" + text[1:]
    return "".join(c if c in _KEPT or c == " " else f"&#{ord(c)};" for c in text)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format rows of cells, which are Markdown already, as a table."""
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
