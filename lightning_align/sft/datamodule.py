"""The data module of supervised fine-tuning."""

from typing import ClassVar

from lightning_align.data.forms import Form
from lightning_align.training.datamodule import AlignDataModule


class SFTDataModule(AlignDataModule):
    """Data module of rows with a prompt and a response, with messages, or with text.

    Rows of text are packed: they are joined with an end-of-sequence token between them and cut into blocks of `max_length`
    tokens. Rows for prediction need a prompt or messages.
    """

    kind: ClassVar[str] = "sft"
    forms: ClassVar[tuple[Form, ...]] = ("response", "messages", "text")
