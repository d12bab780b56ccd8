"""A finished database: the stages that belong together, and their tables."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from lightning_align.retrieval.tables import ChunkTable, Neighbors

HEAD = "database.json"
"""The head. It is written last, so a folder that has it holds a finished database."""


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
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(
                f"`folder` must be a finished retrieval database, but {folder} has no {HEAD}. Build it with the "
                "RetrievalIndexing callback. A build that was stopped resumes where it stopped."
            ) from error
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}). Delete it and build again. Finished stages are kept."
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
        leaks = json.loads((neighbors / "leaks.json").read_text(encoding="utf-8"))
        return QuerySet(ChunkTable(chunks), Neighbors(neighbors), leaks)
