"""The settings of tokenized rows."""

from dataclasses import dataclass, field
from typing import Any

from lightning_align.data.conversations import MaskTurns
from lightning_align.data.encode import Truncation
from lightning_align.data.forms import Form
from lightning_align.data.ledger import BadRow
from lightning_align.data.mapping import RowMapping


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings that the ids of a source depend on, except the tokenizer. See `encode_rows` and `map_rows`."""

    kind: str
    """What the rows are used for. It is a part of the file name."""
    accepted: tuple[Form, ...]
    max_length: int
    truncation: Truncation
    mask_turns: MaskTurns
    on_bad_row: BadRow
    prompts_only: bool = False
    mapping: RowMapping = field(default_factory=RowMapping)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
