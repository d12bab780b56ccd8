"""The data module of CALM: the rows of fine-tuning, encoded again for each augment that has its own tokenizer."""

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
    """Token rows of the anchor, and the inputs of the augments."""

    augments: NotRequired[list[AugmentInput | None]]
    """The input of each augment. None for an augment that reads the anchor's tokens, or the prompt as a prefix."""


class CALMDataModule(AlignDataModule):
    """Rows of prompt and response, of messages, or of text (which is packed), for the anchor and its augments.

    Args:
        augment_tokenizers: The tokenizer of each augment, in order. Use null for an augment that reads the anchor's token ids
            or a prefix. Set `tokens: own` for each augment that has a tokenizer here. By default no augment has its own
            tokenizer.
    """

    kind: ClassVar[str] = "calm"
    forms: ClassVar[tuple[Form, ...]] = ("response", "messages", "text")

    def __init__(self, *args: Any, augment_tokenizers: list[str | None] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.augment_tokenizers = [None if name is None else load_tokenizer(name) for name in augment_tokenizers or ()]

    def augment_inputs(self, tokens: Tensor, mask: Tensor) -> list[AugmentInput | None]:
        """Encode a batch of the anchor again for each augment that has its own tokenizer.

        Args:
            tokens: (B, N) token ids of the anchor, padded on the right.
            mask: (B, N) bool, true at real tokens.

        Returns:
            The input of each augment. None for an augment that has no tokenizer of its own.
        """
        return _augment_inputs(tokens, mask, self.tokenizer, self.augment_tokenizers)

    def _collate(self, store: TokenStore) -> Callable[[Sequence[StoredRow]], Any]:
        if not any(self.augment_tokenizers):
            return super()._collate(store)
        others = self.augment_tokenizers
        return partial(_collate, pad_id=self.tokenizer.pad_id, tokenizer=self.tokenizer, others=others)


def _collate(rows: Sequence[StoredRow], *, pad_id: int, tokenizer: Tokenizer, others: Sequence[Tokenizer | None]) -> CALMBatch:
    batch = collate_tokens(rows, pad_id=pad_id)
    return {**batch, "augments": _augment_inputs(batch["tokens"], batch["mask"], tokenizer, others)}


def _augment_inputs(
    tokens: Tensor, mask: Tensor, tokenizer: Tokenizer, others: Sequence[Tokenizer | None]
) -> list[AugmentInput | None]:
    return [None if other is None else realign_batch(tokens, mask, tokenizer, other) for other in others]
