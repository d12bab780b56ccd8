"""Rows for supervised fine-tuning."""

from typing import ClassVar

from lightning_align.data.forms import Form
from lightning_align.training.datamodule import AlignDataModule


class SFTDataModule(AlignDataModule):
    """Rows of prompt and response, of messages, or of text.

    Rows of text are packed: one after the other, an end-of-sequence token between them, cut in blocks of max_length
    tokens. To predict, rows need a prompt or messages.
    """

    kind: ClassVar[str] = "sft"
    forms: ClassVar[tuple[Form, ...]] = ("response", "messages", "text")
