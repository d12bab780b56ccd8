"""A callback that shows chunks of held-out documents and their neighbors as text in TensorBoard."""

from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

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
        """Log the table to each TensorBoard logger."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
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
        text = self.table(data, database)
        for logger in loggers:
            logger.experiment.add_text("val/neighbors", text, trainer.global_step)

    def table(self, data: Any, database: Any) -> str:
        """Make the table in Markdown, with one line per neighbor.

        Args:
            data: The `RETRODataModule`.
            database: The retrieval database of the data module.

        Returns:
            The table.
        """
        queries = database.queries(data.sets["validation"][0])
        decode = data.tokenizer.decode
        lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        for chunk in np.linspace(0, len(queries.chunks) - 1, min(self.num_chunks, len(queries.chunks))).astype(int).tolist():
            query = _cell(decode(queries.chunks.chunk(chunk).tolist()))
            ids, mask = queries.neighbors.ids[chunk], queries.neighbors.mask[chunk]
            shown = [int(number) for number, there in zip(ids, mask, strict=True) if there][: self.num_neighbors]
            for place, number in enumerate(shown):
                after = database.chunks.continuation(number)
                cells = (
                    query if place == 0 else "",
                    _cell(decode(database.chunks.chunk(number).tolist())),
                    _cell(decode(after.ids[after.mask].tolist())),
                    _cell(f"{database.chunks.document_ids[int(database.chunks.document_of(number))]}, chunk {number}"),
                    f"{float(queries.neighbors.distances[chunk][place]):.3f}",
                )
                lines.append(f"| {' | '.join(cells)} |")
            if not shown:
                lines.append(f"| {query} | (none) | | | |")
        return "\n".join(lines)


def _cell(text: str) -> str:
    """Format text as code in a cell of a Markdown table, which must not contain line breaks, bars or backticks."""
    shown = text.replace("\n", "⏎").replace("|", "¦").replace("`", "'").strip()
    return f"`{shown}`" if shown else ""
