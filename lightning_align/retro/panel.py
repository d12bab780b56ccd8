"""A callback that shows chunks of held-out documents and their neighbors as a table."""

from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback

from lightning_align.training.markdown import cell, table
from lightning_align.training.panels import show_table, shows

COLUMNS = ("query", "neighbor", "continuation", "document", "distance")


class NeighborPanel(Callback):
    """Logs a table of chunks of the validation documents, their neighbors in the database and the continuations of these.

    The table is logged at the end of the first validation of a run, and again whenever the database has changed.
    """

    def __init__(self, *, num_chunks: int = 8, num_neighbors: int = 2) -> None:
        """Set up the callback.

        Args:
            num_chunks: The number of chunks to show. They are spread evenly over the documents.
            num_neighbors: The maximum number of neighbors to show per chunk.
        """
        self.num_chunks, self.num_neighbors = num_chunks, num_neighbors
        self._shown: Any = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the table to each logger that shows texts."""
        loggers = shows(trainer.loggers)
        data: Any = getattr(trainer, "datamodule", None)
        if trainer.sanity_checking or not loggers or not trainer.is_global_zero:
            return
        if not hasattr(data, "database"):
            raise ValueError(
                f"NeighborPanel shows the database of a RETRODataModule, but the data module is a {type(data).__name__}. Use a "
                "RETRODataModule, or remove the callback."
            )
        database = data.database
        if self._shown == database.manifest:
            return
        self._shown = database.manifest
        rows = self.rows(data, database)
        markdown = {"val/neighbors": self.table(data, database, rows=rows)}
        show_table(loggers, "val/neighbors", COLUMNS, rows, step=trainer.global_step, markdown=markdown)

    def rows(self, data: Any, database: Any) -> list[list[str]]:
        """Return the cells of the table, with one row per neighbor.

        Args:
            data: The `RETRODataModule`.
            database: The retrieval database of the data module.

        Returns:
            Rows of texts, in the order of `COLUMNS`.
        """
        queries = database.queries(data.sets["validation"][0])
        decode = data.tokenizer.decode
        rows = []
        for chunk in np.linspace(0, len(queries.chunks) - 1, min(self.num_chunks, len(queries.chunks))).astype(int).tolist():
            query = decode(queries.chunks.chunk(chunk).tolist())
            ids, mask = queries.neighbors.ids[chunk], queries.neighbors.mask[chunk]
            shown = [int(number) for number, there in zip(ids, mask, strict=True) if there][: self.num_neighbors]
            for place, number in enumerate(shown):
                after = database.chunks.continuation(number)
                document = f"{database.chunks.document_ids[int(database.chunks.document_of(number))]}, chunk {number}"
                distance = f"{float(queries.neighbors.distances[chunk][place]):.3f}"
                neighbor = decode(database.chunks.chunk(number).tolist())
                rows.append([query, neighbor, decode(after.ids[after.mask].tolist()), document, distance])
            if not shown:
                rows.append([query, "(none)", "", "", ""])
        return rows

    def table(self, data: Any, database: Any, *, rows: list[list[str]] | None = None) -> str:
        """Make the table in Markdown, with one line per neighbor.

        Args:
            data: The `RETRODataModule`.
            database: The retrieval database of the data module.
            rows: The rows, if they are known.

        Returns:
            The table. A query is written once, beside its first neighbor.
        """
        lines, before = [], None
        for query, *others, distance in self.rows(data, database) if rows is None else rows:
            lines.append(["" if query == before else cell(query), *(cell(text) if text else "" for text in others), distance])
            before = query
        return table(COLUMNS, lines)
