"""Sources of rows: files, datasets of the Hugging Face hub, and synthetic tasks.

A row is a dictionary of fields with an origin, such as its file and line. A line that cannot be read is still returned, as
a row with a problem, so that the caller decides what to do with it and no line is lost.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning_align.data.files import SUFFIXES, SUFFIXES_TEXT, Row, expand_path, hash_file, near, read_file
from lightning_align.data.remembered import remembered_hash

__all__ = ["SUFFIXES", "Grader", "Row", "RowTask", "Source", "read_rows", "source_fingerprint", "source_name"]

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+){0,2}")


class RowTask(ABC):
    """A source that generates its rows instead of reading them.

    Subclass it for a synthetic task. A task can be used wherever the path of a file of rows is accepted. Constructor
    arguments should be primitives, so that a config file can hold them. A task that can check responses also has a method
    ``grade(prompt, response) -> bool``. See `Grader`.
    """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A string of everything that the rows depend on. The tokenized rows are cached under it."""

    @abstractmethod
    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows. Every call yields the same rows in the same order."""


@runtime_checkable
class Grader(Protocol):
    """A task that can check whether a response is right."""

    def grade(self, prompt: str, response: str) -> bool:
        """Check whether ``response`` is a right response to ``prompt``."""
        ...


Source = str | Sequence[str] | RowTask
"""A source of rows. Several paths are read one after the other."""


def read_rows(source: Source, *, split: str = "train") -> Iterator[Row]:
    """Yield the rows of a source in order.

    Args:
        source: A file, a folder of files, a pattern (``data/part-*.jsonl``), a folder that `datasets.save_to_disk` wrote, a
            dataset of the hub as ``name``, ``name:split`` or ``name:config:split``, a list of these, or a task. The files of
            a folder or a pattern are sorted by name. Blank lines of JSON-lines files are ignored.
        split: The split of a dataset if its name does not include one.

    Raises:
        ValueError: If the source is missing, empty, unreadable or of an unknown kind.
    """
    if isinstance(source, RowTask):
        return _task_rows(source)
    parts = [(path, _expand(path, split=split)) for path in _paths(source)]
    return _all_rows(source_name(source), parts, split=split)


def source_fingerprint(source: Source, *, split: str = "train", cache_dir: str | None = None) -> str:
    """Hash the content of a source. Files with the same content have the same fingerprint, regardless of their paths.

    Args:
        source: See `read_rows`.
        split: The split of a dataset if its name does not include one.
        cache_dir: The folder in which to keep the hashes of large files, so that a file is read again only if it was changed.
            See `remembered_hash`. None reads every file.

    Raises:
        ValueError: If the source is missing, unreadable or of an unknown kind.
    """
    if isinstance(source, RowTask):
        return f"{type(source).__module__}.{type(source).__qualname__}:{source.fingerprint}"
    hashes: list[str] = []
    for path in _paths(source):
        files = _expand(path, split=split)
        if files is None:
            # The fingerprint of the datasets library covers the revision and the files of a dataset. Nothing cheaper does.
            hashes.append(f"hub:{_load_hub(path, split=split)._fingerprint}")
        else:
            hashes += [_hash(file, cache_dir) for file in files]
    return hashes[0] if len(hashes) == 1 else f"{len(hashes)} parts:{hashlib.sha256(' '.join(hashes).encode()).hexdigest()}"


def _hash(path: str, cache_dir: str | None) -> str:
    return hash_file(path) if cache_dir is None else remembered_hash(path, hash_file, folder=Path(cache_dir) / "hashes")


def source_name(source: Source) -> str:
    """Return a short name of a source, for messages."""
    if isinstance(source, RowTask):
        return type(source).__name__
    first, *others = _paths(source)
    return first if not others else f"{first} and {len(others)} more"


def source_files(source: Source, *, split: str = "train") -> list[str] | None:
    """List the files of a source, in the order in which they are read. None if it is not of files alone.

    Raises:
        ValueError: If the source is missing or of an unknown kind.
    """
    if isinstance(source, RowTask):
        return None
    parts = [_expand(path, split=split) for path in _paths(source)]
    return None if None in parts else [file for files in parts for file in files or ()]


def _paths(source: str | Sequence[str]) -> list[str]:
    paths = [source] if isinstance(source, str) else list(source)
    if not paths:
        raise ValueError("the list of sources is empty: expected files, folders, patterns or datasets of the hub")
    return paths


def _all_rows(name: str, parts: Sequence[tuple[str, list[str] | None]], *, split: str) -> Iterator[Row]:
    is_empty = True
    for path, files in parts:
        for rows in [_hub_rows(path, split=split)] if files is None else map(read_file, files):
            for row in rows:
                is_empty = False
                yield row
    if is_empty:
        raise ValueError(f"{name} has no rows. Give a source with at least one row")


def _task_rows(task: RowTask) -> Iterator[Row]:
    name = type(task).__name__
    for number, fields in enumerate(task.rows(), start=1):
        yield Row(fields, f"{name}, row {number}")


def _hub_rows(name: str, *, split: str) -> Iterator[Row]:
    for number, fields in enumerate(_load_hub(name, split=split), start=1):
        yield Row(dict(fields), f"{name}, row {number}")


def _load_hub(name: str, *, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{name!r} is not a file (searched in {Path.cwd()}{near(name)}). To load it from the hub, install the package"
            " `datasets`, which the extra `hub` includes."
        ) from error

    dataset, *rest = name.split(":")
    config = rest[0] if len(rest) == 2 else None
    try:
        return load_dataset(dataset, config, split=rest[-1] if rest else split)
    except Exception as error:
        # Network, hub and builder errors have many classes, but mean the same to the user.
        raise ValueError(
            f"{name!r} is neither a file (searched in {Path.cwd()}{near(name)}) nor a dataset that could be loaded "
            f"from the hub ({type(error).__name__}: {error}). Files end in {SUFFIXES_TEXT}. Hub datasets are given as "
            "name, name:split or name:config:split."
        ) from error


def _expand(path: str, *, split: str) -> list[str] | None:
    files = expand_path(path, split=split)
    if files is None and not _HUB_NAME.fullmatch(path):
        raise ValueError(
            f"there is no file {path} (searched in {Path.cwd()}{near(path)}), and it is not the name of a hub dataset either"
        )
    return files
