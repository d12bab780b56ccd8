"""Texts, tables and pictures to whichever loggers can show them: TensorBoard, Weights & Biases, MLflow, Comet."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


def show_table(
    loggers: Iterable[Any],
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | int | float]],
    *,
    step: int,
    markdown: Mapping[str, str],
) -> None:
    """Give rows of texts to each logger, in the form that it takes. A logger that shows no texts gets none.

    Args:
        loggers: The Trainer's loggers.
        name: The name of the table.
        columns: The names of the columns.
        rows: The rows, with a cell per column.
        step: The optimizer step, or another count.
        markdown: The same for TensorBoard: texts in Markdown by their tags.
    """
    for logger in loggers:
        data = [list(row) for row in rows]
        # The two methods of Lightning's loggers (WandbLogger) have the same arguments.
        if (write := getattr(logger, "log_table", None) or getattr(logger, "log_text", None)) is not None:
            write(key=name, columns=list(columns), data=data, step=step)
        elif _is(logger, "MLFlowLogger"):
            # MLflow appends to the table of a file that exists.
            values = {"step": [step] * len(data), **{column: [row[i] for row in data] for i, column in enumerate(columns)}}
            logger.experiment.log_table(logger.run_id, data=values, artifact_file=f"{name}.json")
        elif _is(logger, "CometLogger"):
            logger.experiment.log_table(f"{name}/{step}.csv", tabular_data=data, headers=list(columns))
        elif _is(logger, "TensorBoardLogger"):
            for tag, text in markdown.items():
                logger.experiment.add_text(tag, text, step)


def show_picture(loggers: Iterable[Any], name: str, picture: "Image", *, step: int) -> None:
    """Give a picture to each logger that shows pictures.

    Args:
        loggers: The Trainer's loggers.
        name: The name of the picture.
        picture: The picture.
        step: The optimizer step.
    """
    for logger in loggers:
        if (write := getattr(logger, "log_image", None)) is not None:
            write(key=name, images=[picture], step=step)
        elif _is(logger, "MLFlowLogger"):
            logger.experiment.log_image(logger.run_id, picture, artifact_file=f"{name}/{step:08d}.png")
        elif _is(logger, "CometLogger"):
            logger.experiment.log_image(picture, name=name, step=step)
        elif _is(logger, "TensorBoardLogger"):
            logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")


def shows(loggers: Iterable[Any]) -> list[Any]:
    """Return the loggers that show texts."""
    own = ("MLFlowLogger", "CometLogger", "TensorBoardLogger")
    return [
        logger
        for logger in loggers
        if hasattr(logger, "log_table") or hasattr(logger, "log_text") or any(_is(logger, name) for name in own)
    ]


def _is(logger: Any, name: str) -> bool:
    # By name: the loggers of pytorch_lightning are others, and have the same methods.
    return any(base.__name__ == name for base in type(logger).__mro__)
