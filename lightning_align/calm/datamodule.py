"""Rows for composed models: those of fine-tuning, and for augments with a tokenizer of their own the same text in their ids."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NotRequired

from torch import Tensor

from lightning_align.calm.alignment import realign_batch
from lightning_align.calm.spec import AugmentInput
from lightning_align.data.batching import collate_tokens
from lightning_align.data.forms import Form
from lightning_align.data.store import StoredRow, TokenStore
from lightning_align.data.tokenizer import Tokenizer, load_tokenizer
from lightning_align.training.datamodule import AlignDataModule
from lightning_align.types import TokenBatch


class CALMBatch(TokenBatch):
    """Token rows of the anchor, and what the augments read besides."""

    augments: NotRequired[list[AugmentInput | None]]
    """Of each augment; None where it reads the anchor's tokens or, by the prompt, a prefix."""


class CALMDataModule(AlignDataModule):
    """Rows of prompt and response, of messages, or of text (which is packed), for the anchor and its augments.

    Args:
        augment_tokenizers: Tokenizer of each augment, null where it reads the anchor's ids or a prefix; left out if all
            do. An augment that has one is set to `tokens: own`.
    """

    kind: ClassVar[str] = "calm"
    forms: ClassVar[tuple[Form, ...]] = ("response", "messages", "text")

    def __init__(self, *args: Any, augment_tokenizers: list[str | None] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.augment_tokenizers = [None if name is None else load_tokenizer(name) for name in augment_tokenizers or ()]

    def augment_inputs(self, tokens: Tensor, mask: Tensor) -> list[AugmentInput | None]:
        """What each augment reads of a batch of the anchor's ids, padded on the right."""
        return _inputs(tokens, mask, self.tokenizer, self.augment_tokenizers)

    def _collate(self, store: TokenStore) -> Callable[[Sequence[StoredRow]], Any]:
        if not any(self.augment_tokenizers):
            return super()._collate(store)
        others = self.augment_tokenizers
        return partial(_collate, pad_id=self.tokenizer.pad_id, tokenizer=self.tokenizer, others=others)


def _collate(rows: Sequence[StoredRow], *, pad_id: int, tokenizer: Tokenizer, others: Sequence[Tokenizer | None]) -> CALMBatch:
    batch = collate_tokens(rows, pad_id=pad_id)
    return {**batch, "augments": _inputs(batch["tokens"], batch["mask"], tokenizer, others)}


def _inputs(
    tokens: Tensor, mask: Tensor, tokenizer: Tokenizer, others: Sequence[Tokenizer | None]
) -> list[AugmentInput | None]:
    return [None if other is None else realign_batch(tokens, mask, tokenizer, other) for other in others]
