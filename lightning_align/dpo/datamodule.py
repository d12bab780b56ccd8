"""Rows for direct preference optimisation."""

from typing import ClassVar

from lightning_align.data.forms import Form
from lightning_align.training.datamodule import AlignDataModule


class DPODataModule(AlignDataModule):
    """Rows of prompt, chosen and rejected; without a prompt, it is what chosen and rejected begin with alike.

    To predict, rows of chosen and rejected are scored, and rows with a prompt only are continued.
    """

    kind: ClassVar[str] = "dpo"
    forms: ClassVar[tuple[Form, ...]] = ("pair",)
    predict_forms: ClassVar[tuple[Form, ...]] = ("pair", "prompt", "messages")
