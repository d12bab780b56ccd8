"""The data module of direct preference optimization."""

from typing import ClassVar

from lightning_align.data.forms import Form
from lightning_align.training.datamodule import AlignDataModule


class DPODataModule(AlignDataModule):
    """Rows of prompt, chosen and rejected. Without a prompt, the common beginning of chosen and rejected is the prompt.

    For prediction, rows of chosen and rejected are scored, and rows that have only a prompt are continued.
    """

    kind: ClassVar[str] = "dpo"
    forms: ClassVar[tuple[Form, ...]] = ("pair",)
    predict_forms: ClassVar[tuple[Form, ...]] = ("pair", "prompt", "messages")
