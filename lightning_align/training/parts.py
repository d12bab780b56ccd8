"""What a Trainer brings along that a module cannot work with."""

import lightning as L
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.utilities import rank_zero_warn

from lightning_align.runtime.lightning_internals import callbacks_of
from lightning_align.runtime.namespaces import ADVICE, OTHER, foreign_parts


def refuse_callbacks(trainer: L.Trainer, owner: str) -> None:
    """Refuse callbacks that a module cannot work with.

    Args:
        trainer: The Trainer.
        owner: The name of the module's class, for messages.

    Raises:
        ValueError: If there is one.
    """
    if any(isinstance(callback, BackboneFinetuning) for callback in callbacks_of(trainer)):
        raise ValueError(
            f"BackboneFinetuning needs a module with a `backbone`, but {owner} trains its `policy`. Use `lora`, or a "
            "BaseFinetuning that freezes parts of `policy`."
        )


def warn_of_foreign_parts(trainer: L.Trainer) -> None:
    """Warn if callbacks or loggers are of the package with the other name."""
    if foreign := foreign_parts([*callbacks_of(trainer), *trainer.loggers]):
        rank_zero_warn(f"The Trainer is of `lightning`, but has parts of `{OTHER}`: {', '.join(foreign)}. {ADVICE}")
