"""The data module of CALM: the rows of fine-tuning, encoded again for each augment that has its own tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NotRequired, cast

import pyarrow.compute as pc
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_align.calm.alignment import Alignment, pad_readings
from lightning_align.calm.context import check_rows
from lightning_align.calm.prepared import AugmentedRow, AugmentedRows, readings_path, write_readings
from lightning_align.calm.spec import AugmentInput
from lightning_align.calm.templates import has_conversations, own_store, turns_of_rows
from lightning_align.data.batching import LengthGroupedSampler, collate_tokens
from lightning_align.data.forms import Form
from lightning_align.data.ledger import Ledger
from lightning_align.data.mixture import MixedStore, SourcePart
from lightning_align.data.store import StoredRow, TokenStore
from lightning_align.data.tokenizer import Tokenizer, load_tokenizer
from lightning_align.training.datamodule import SPLITS, AlignDataModule
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
        augment_chat_templates: Whether an augment whose own tokenizer has a chat template reads conversations as this template
            writes them. Both models then read the same messages, aligned turn by turn. If false, if there is no template, or
            with `mask_turns: all`, it reads the text of the anchor's row.
    """

    kind: ClassVar[str] = "calm"
    forms: ClassVar[tuple[Form, ...]] = ("response", "messages", "text")

    def __init__(
        self,
        *args: Any,
        augment_tokenizers: list[str | None] | None = None,
        augment_chat_templates: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.augment_tokenizers = [None if name is None else load_tokenizer(name) for name in augment_tokenizers or ()]
        self.augment_chat_templates = augment_chat_templates
        self._alignment: Alignment | None = None
        self._readings: dict[str, str] = {}

    @property
    def alignment(self) -> Alignment | None:
        """The conversion of rows to what the augments read. None if no augment has its own tokenizer."""
        if self._alignment is None and any(self.augment_tokenizers):
            self._alignment = Alignment(self.tokenizer, self.augment_tokenizers)
        return self._alignment

    def augment_inputs(self, tokens: Tensor, mask: Tensor) -> list[AugmentInput | None]:
        """Encode a batch of the anchor again for each augment that has its own tokenizer.

        Args:
            tokens: (B, N) token ids of the anchor, padded on the right.
            mask: (B, N) bool, true at real tokens.

        Returns:
            The input of each augment. None for an augment that has no tokenizer of its own.
        """
        return [None] * len(self.augment_tokenizers) if self.alignment is None else self.alignment.inputs(tokens, mask)

    def _open(self, key: str) -> list[tuple[TokenStore, Ledger]]:
        """Open the stores of a stage, and write what the augments read of their rows, once and beside them."""
        opened = super()._open(key)
        if self.alignment is None:
            return opened
        own = self.alignment.own
        for part, (store, _) in zip(self._parts.get(key, ()), opened, strict=True):
            others = self._own_stores(key, part)
            self.alignment.prompts.add(store, others, own)
            if key != "predict":
                path = readings_path(store, own, [None if other is None else Path(other.path).stem for other in others])
                pairs = zip(others, own, strict=True)
                turns: list[Any] = [
                    {} if o is None or one is None else partial(turns_of_rows, store, o, one) for o, one in pairs
                ]
                write_readings(path, store, own, turns)
                self._readings[store.path] = str(path)
        return opened

    def _own_stores(self, key: str, part: SourcePart) -> list[TokenStore | None]:
        """Encode the rows of a source for each augment whose chat template writes them."""
        recipe = self._recipe(key, part)
        split = SPLITS[key.partition("/")[0]]
        templated = [other is not None and other.has_template for other in self.augment_tokenizers]
        wanted = self.augment_chat_templates and self.mask_turns != "all" and any(templated)
        if not wanted or not has_conversations(part.rows, split=split, recipe=recipe):
            return [None] * len(templated)
        options: Any = {"split": split, "cache_dir": self.cache_dir, "num_workers": self.preparation_workers}
        recipe = replace(recipe, accepted=tuple(form for form in recipe.accepted if form != "text"))
        return [
            own_store(part.rows, recipe=recipe, tokenizer=cast(Tokenizer, other), **options) if has else None
            for has, other in zip(templated, self.augment_tokenizers, strict=True)
        ]

    def _store(self, key: str) -> TokenStore:
        store = super()._store(key)
        readers = getattr(getattr(self.trainer and self.trainer.lightning_module, "policy", None), "readers", None)
        if readers and key != "predict" and len(store):
            rows = self._augmented(store)
            own = [] if rows is None else [rows.longest(number) for number in range(len(self.augment_tokenizers))]
            check_rows(readers, int(store.lengths().max()), pc.max(store.table["num_prompt"]).as_py(), own)
        return store

    def _augmented(self, store: TokenStore) -> AugmentedRows | None:
        parts = store.stores if isinstance(store, MixedStore) else [store]
        paths = [self._readings[part.path] for part in parts if part.path in self._readings]
        return AugmentedRows(store, paths) if paths else None

    def _loader(
        self,
        store: TokenStore,
        sampler: LengthGroupedSampler,
        collate: Callable[[Sequence[StoredRow]], Any],
        *,
        resumable: bool = False,
    ) -> DataLoader[list[StoredRow]]:
        rows = cast(TokenStore, self._augmented(store) or store)
        return super()._loader(rows, sampler, collate, resumable=resumable)

    def _collate(self, store: TokenStore) -> Callable[[Sequence[StoredRow]], Any]:
        if self._augmented(store) is None:
            return super()._collate(store)
        pad_ids = [None if other is None else other.pad_id for other in self.augment_tokenizers]
        return partial(_collate, pad_id=self.tokenizer.pad_id, pad_ids=pad_ids)


def _collate(rows: Sequence[AugmentedRow], *, pad_id: int, pad_ids: Sequence[int | None]) -> CALMBatch:
    batch = collate_tokens(cast("Sequence[StoredRow]", rows), pad_id=pad_id)
    inputs = [
        None
        if pad is None
        else pad_readings([cast(Any, row.readings[number]) for row in rows], width=batch["tokens"].shape[1], pad_id=pad)
        for number, pad in enumerate(pad_ids)
    ]
    return {**batch, "augments": inputs}
