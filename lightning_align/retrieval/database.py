"""A finished database: the stages that belong together, and their tables."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from lightning_align.retrieval.sealed import HEAD_KEYS, check_head, read_sealed, value_of
from lightning_align.retrieval.stages import MANIFEST, problem_of, read_manifest
from lightning_align.retrieval.tables import ChunkTable, Neighbors

HEAD = "database.json"
"""The head. It is written last, so a folder that has it holds a finished database."""
VERIFIED_BYTES = 2 << 30
"""How large the files of a database are at most that data modules and retrievers compare with their hashes by themselves."""


@dataclass(frozen=True)
class QuerySet:
    """Documents outside of the database, such as held-out documents, with their neighbors in the database."""

    chunks: ChunkTable
    neighbors: Neighbors
    leaks: list[dict[str, Any]]
    """Documents that have a near-duplicate in the database, the most similar first. Each has the keys ``"document"`` (name of
    the query document), ``"found"`` (name of the near-duplicate) and ``"similarity"``."""


@dataclass(frozen=True)
class RetrievalDatabase:
    """A folder that the retrieval stages wrote. It can be pickled and sent to workers: each process maps the tables itself."""

    folder: Path
    manifest: dict[str, Any]
    """Content of ``database.json``: the stages that belong together, the encoder, the generation, the query sets."""

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a finished database.

        Args:
            folder: Folder of the database.

        Raises:
            ValueError: If the folder has no finished database, or ``database.json`` cannot be read.
        """
        path = Path(folder) / HEAD
        try:
            manifest = read_sealed(path, HEAD_KEYS)
            check_head(manifest)
        except FileNotFoundError as error:
            raise ValueError(
                f"`folder` must be a finished retrieval database, but {folder} has no {HEAD}. Build it with the "
                "RetrievalIndexing callback. A build that was stopped resumes where it stopped."
            ) from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror or error}). Ask its owner for access.") from error
        except ValueError as error:
            raise ValueError(
                f"{path} cannot be used: {error}. It is damaged or was edited. Copy it from a backup, or delete it and build "
                "again. Finished stages are kept, but deletions and additions of documents are lost."
            ) from error
        return cls(Path(folder), manifest)

    @cached_property
    def chunks(self) -> ChunkTable:
        """The chunks of the database, which can be neighbors."""
        return ChunkTable(self.folder / self.manifest["stages"]["chunks"])

    @cached_property
    def neighbors(self) -> Neighbors:
        """The neighbors of each chunk. They are from other documents that are not near-duplicates of its own document."""
        return Neighbors(self.folder / self.manifest["stages"]["neighbors"])

    def queries(self, name: str) -> QuerySet:
        """Open a query set.

        Args:
            name: Name of the set, such as ``validation``.

        Raises:
            ValueError: If the database has no such set.
        """
        sets: dict[str, dict[str, str]] = self.manifest["queries"]
        if name not in sets:
            raise ValueError(
                f"`name` must be a query set of {self.folder} ({', '.join(sets) or 'none'}), but it has no query set {name!r}. "
                f"To add it, pass the documents to RetrievalIndexing as queries={{{name!r}: ...}}."
            )
        chunks, neighbors = self.folder / sets[name]["chunks"], self.folder / sets[name]["neighbors"]
        return QuerySet(ChunkTable(chunks), Neighbors(neighbors), _read_leaks(neighbors / "leaks.json"))

    def verify(
        self, stages: Iterable[str] | None = None, *, queries: Iterable[str] | None = None, at_most: int | None = None
    ) -> bool:
        """Compare the files of the database with the hashes that were taken when they were written.

        `open` reads no tables, because it must be fast. This reads them, at the speed of SHA-256: about a second per GB. A
        process reads a file only once for it, as long as the file is not written to.

        Args:
            stages: The stages to compare: ``chunks``, ``vectors``, ``index``, ``lexical``, ``neighbors``. Default is all.
            queries: The names of the query sets to compare. Default is all.
            at_most: The most bytes to read. If there are more, only sizes are compared.

        Returns:
            Whether the files were compared. False if they have more than `at_most` bytes.

        Raises:
            ValueError: If a file is missing or has other content than when it was written, with its name.
        """
        kinds, names = (None if given is None else set(given) for given in (stages, queries))
        folders = [folder for kind, folder in self.manifest["stages"].items() if kinds is None or kind in kinds]
        for name, parts in self.manifest["queries"].items():
            if names is None or name in names:
                folders += parts.values()
        files: dict[Path, dict[str, Any]] = {}
        for folder in dict.fromkeys(folders):
            try:
                listed = read_manifest(self.folder / folder)["files"]
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.folder / folder / MANIFEST} cannot be used: {error}. {_AGAIN}") from error
            files |= {self.folder / folder / name: written for name, written in listed.items()}
        is_small = at_most is None or sum(written["bytes"] for written in files.values()) <= at_most
        for read in (False, True) if is_small else (False,):  # sizes first, which takes no time
            for path, written in files.items():
                if problem := problem_of(path, written, verify=read):
                    raise ValueError(f"{path} {problem}. {_AGAIN}")
        return is_small


_AGAIN = "Build the database again, as it was built. Only damaged stages are made again."


def _read_leaks(path: Path) -> list[dict[str, Any]]:
    try:
        leaks = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(leaks, list):
            raise ValueError(f"it must hold a list, but holds a {type(leaks).__name__}")
        for leak in leaks:
            if not isinstance(leak, dict):
                raise ValueError(f"it must list objects, but has {leak!r:.60}")
            for name, kind in (("document", str), ("found", str), ("similarity", (int, float))):
                value_of(leak, name, kind)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used: {error}. {_AGAIN}") from error
    return leaks
