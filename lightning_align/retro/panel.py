"""What was found, to look at: chunks of held-out documents beside their neighbours, as text in TensorBoard."""

from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

COLUMNS = ("query", "neighbor", "continuation", "document", "distance")


class NeighborPanel(Callback):
    """Shows chunks of the validation documents with what the database has for them, and how that goes on."""

    def __init__(self, *, num_chunks: int = 8, num_neighbors: int = 2) -> None:
        """Write at the end of the first validation of a run, and whenever the database has changed since.

        Args:
            num_chunks: chunks to show, spread evenly over the documents.
            num_neighbors: neighbours of each.
        """
        self.num_chunks, self.num_neighbors = num_chunks, num_neighbors
        self._shown: Any = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the table."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        data: Any = getattr(trainer, "datamodule", None)
        if trainer.sanity_checking or not loggers or not trainer.is_global_zero:
            return
        if not hasattr(data, "database"):
            raise ValueError(
                "NeighborPanel needs a RETRODataModule, whose database it shows: use one, or leave the callback out"
            )
        database = data.database
        if self._shown == database.manifest:
            return
        self._shown = database.manifest
        text = self.table(data, database)
        for logger in loggers:
            logger.experiment.add_text("val/neighbors", text, trainer.global_step)

    def table(self, data: Any, database: Any) -> str:
        """The table in Markdown, a line for each neighbour.

        Args:
            data: a `RETRODataModule`.
            database: its database.
        """
        queries = database.queries(data.sets["validation"])
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
    """Text as code in a cell of a Markdown table, in which neither a line break nor a bar nor a backtick may stand."""
    shown = text.replace("\n", "⏎").replace("|", "¦").replace("`", "'").strip()
    return f"`{shown}`" if shown else ""
