"""Parsing of the content of files: names that a JSON object has twice, and CSV."""

import csv
import json
from collections.abc import Iterator
from io import TextIOWrapper
from typing import IO, Any


def doubled_name(spelled: bytes) -> str | None:
    """Return a name that an object has twice, if there is one in the outermost object."""
    pairs: list[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal pairs
        pairs = found  # the outermost object comes last
        return dict(found)

    json.loads(spelled.decode(), object_pairs_hook=keep)
    names = [name for name, _ in pairs]
    return next((name for name in names if names.count(name) > 1), None)


def csv_rows(path: str, raw: IO[bytes]) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Yield the rows of a CSV file: the line number, the fields, and what is wrong with the row, if anything.

    Table libraries are not used because they convert "12" to a number and "NA" to a missing value, and do not report line
    numbers.

    Args:
        path: The file, for error messages.
        raw: The open file.

    Raises:
        ValueError: If the file cannot be read.
    """
    # The default limit of the csv module is 128 KiB per field. It applies to the whole process.
    csv.field_size_limit(2**31 - 1)
    text = TextIOWrapper(raw, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, strict=True)
    try:
        for fields in reader:
            problem = ""
            if None in fields or None in fields.values():
                problem = f"has a different number of fields than the header ({', '.join(reader.fieldnames or ())})"
            yield reader.line_num, {} if problem else dict(fields), problem
    except (csv.Error, OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, after line {reader.line_num}: cannot be read as CSV ({error})") from error
    finally:
        text.detach()  # the caller closes the file
