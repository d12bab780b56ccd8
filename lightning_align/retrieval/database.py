"""A finished database: which stages of a folder belong together, and the tables they made."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from lightning_align.retrieval.tables import ChunkTable, Neighbors

HEAD = "database.json"
"""Written last: a folder that has one is a whole database."""


@dataclass(frozen=True)
class QuerySet:
    """Documents that are not in the database, such as held-out ones, with their neighbors in it."""

    chunks: ChunkTable
    neighbors: Neighbors
    leaks: list[dict[str, Any]]
    """Documents of which the database has a near-duplicate: ``{"document", "found", "similarity"}``, most similar first."""


@dataclass(frozen=True)
class RetrievalDatabase:
    """A folder that the retrieval stages wrote. It can be sent to workers: tables are mapped where they are read."""

    folder: Path
    manifest: dict[str, Any]
    """The stages that belong together, the encoder, the generation, the query sets."""

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a finished database.

        Raises:
            ValueError: if there is none, or it is of another version of this library.
        """
        path = Path(folder) / HEAD
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(
                f"{folder} has no {HEAD}, so it is no finished retrieval database: build it with the RetrievalIndexing "
                "callback; a build that was stopped goes on where it was"
            ) from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}): delete it and build again; finished stages are kept") from error
        return cls(Path(folder), manifest)

    @cached_property
    def chunks(self) -> ChunkTable:
        """The chunks that can be neighbors."""
        return ChunkTable(self.folder / self.manifest["stages"]["chunks"])

    @cached_property
    def neighbors(self) -> Neighbors:
        """For each chunk its neighbors in other documents, near-duplicates of its own left out."""
        return Neighbors(self.folder / self.manifest["stages"]["neighbors"])

    def queries(self, name: str) -> QuerySet:
        """A query set by its name, such as ``validation``.

        Raises:
            ValueError: if the database has no such set.
        """
        sets: dict[str, dict[str, str]] = self.manifest["queries"]
        if name not in sets:
            raise ValueError(
                f"{self.folder} has no query set {name!r} (it has {', '.join(sets) or 'none'}): give RetrievalIndexing "
                f"queries={{{name!r}: ...}} with the documents"
            )
        chunks, neighbors = self.folder / sets[name]["chunks"], self.folder / sets[name]["neighbors"]
        leaks = json.loads((neighbors / "leaks.json").read_text(encoding="utf-8"))
        return QuerySet(ChunkTable(chunks), Neighbors(neighbors), leaks)
