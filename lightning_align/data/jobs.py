"""Encoding of one block of rows, independently of all other blocks, in any process."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa

from lightning_align.data.blocks import Block, RowBlock
from lightning_align.data.columns import to_batch
from lightning_align.data.conversations import BadRowError
from lightning_align.data.encode import encode_rows
from lightning_align.data.forms import form_of
from lightning_align.data.ledger import Ledger
from lightning_align.data.mapping import map_rows
from lightning_align.data.packing import encode_texts, texts_to_batch
from lightning_align.data.recipe import Recipe
from lightning_align.data.rows import Row
from lightning_align.data.tokenizer import Tokenizer

_MOST_UNFORMED = 1024
"""The number of rows among which one has to have an accepted form."""


class LabelledRowError(Exception):
    """A row is labelled, so it has to be paired with a row that may be in another block."""


class Encoded(NamedTuple):
    """The rows of a block as token ids."""

    batch: pa.RecordBatch | None
    """The rows that are used, with their numbers in the block. See `to_batch` and `texts_to_batch`. None without rows."""
    num_read: int
    """The number of rows that were read."""
    num_mapped: int
    """The number of rows of the forms, which is what the rows of a store are numbered by."""
    ledger: Ledger

    def pack(self) -> dict[str, Any]:
        """Return a dictionary that is cheap to send to another process. `unpack` reads it."""
        data = None
        if self.batch is not None:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, self.batch.schema) as writer:
                writer.write_batch(self.batch)
            data = sink.getvalue().to_pybytes()
        return {"data": data, "read": self.num_read, "mapped": self.num_mapped, "ledger": self.ledger.to_dict()}

    @classmethod
    def unpack(cls, content: dict[str, Any]) -> "Encoded":
        """Create the object from the dictionary that `pack` returned."""
        data = content["data"]
        batch = None if data is None else pa.ipc.open_stream(data).read_next_batch()
        return cls(batch, content["read"], content["mapped"], Ledger.from_dict(content["ledger"]))


@dataclass(frozen=True)
class Job:
    """How to encode the blocks of a source."""

    name: str
    """The name of the source."""
    recipe: Recipe
    tokenizer: Tokenizer
    is_text: bool
    """Whether the rows are plain texts, which are packed. Other rows are not, so a source cannot mix them."""
    is_mapped: bool = False
    """Whether the rows have been converted to rows of the forms already."""

    def run(self, block: Block) -> Encoded:
        """Encode the rows of a block.

        Raises:
            ValueError: If a row is bad and has to be reported.
            LabelledRowError: If a row has to be paired, and `is_mapped` is false.
        """
        recipe, ledger = self.recipe, Ledger(self.name, on_bad_row=self.recipe.on_bad_row)
        counts = [0, 0]
        rows = _counting(block.rows(), counts, 0)
        if not self.is_mapped:
            rows = map_rows(
                rows,
                recipe.mapping,
                accepted=recipe.accepted,
                prompts_only=recipe.prompts_only,
                ledger=ledger,
                on_labelled=_refuse,
            )
        rows = _counting(rows, counts, 1)
        if self.is_text:
            texts = list(encode_texts(rows, tokenizer=self.tokenizer, ledger=ledger))
            batch = texts_to_batch(texts, vocab_size=self.tokenizer.vocab_size)
        else:
            encoded = encode_rows(
                rows,
                tokenizer=self.tokenizer,
                ledger=ledger,
                accepted=[form for form in recipe.accepted if form != "text"],
                max_length=recipe.max_length,
                truncation=recipe.truncation,
                mask_turns=recipe.mask_turns,
                prompts_only=recipe.prompts_only,
                chat_template_kwargs=recipe.chat_template_kwargs,
                note_duplicates=False,
            )
            batch = to_batch(list(encoded), vocab_size=self.tokenizer.vocab_size)
        return Encoded(batch, counts[0], counts[1], ledger)


def _refuse() -> None:
    raise LabelledRowError


def _counting(rows: Iterable[Row], counts: list[int], index: int) -> Iterator[Row]:
    for row in rows:
        counts[index] += 1
        yield row


def has_plain_texts(blocks: Iterable[Block], recipe: Recipe) -> bool:
    """Check whether a source has plain texts. The first row that has an accepted form decides.

    Args:
        blocks: The first blocks of the source.
        recipe: How to encode the rows.
    """
    if "text" not in recipe.accepted:
        return False
    rows = (row for block in blocks for row in block.rows())
    mapped = map_rows(rows, recipe.mapping, accepted=recipe.accepted, prompts_only=recipe.prompts_only)
    for row in islice(mapped, _MOST_UNFORMED):
        try:
            return form_of(row.fields, accepted=recipe.accepted) == "text"
        except BadRowError:
            continue
    return False


def mapped_blocks(rows: Iterable[Row], recipe: Recipe, ledger: Ledger) -> Iterator[RowBlock]:
    """Convert all rows of a source in order, and yield them in blocks, for a job that `is_mapped`."""
    mapped = map_rows(rows, recipe.mapping, accepted=recipe.accepted, prompts_only=recipe.prompts_only, ledger=ledger)
    while block := list(islice(mapped, _MOST_UNFORMED)):
        yield RowBlock(block)
