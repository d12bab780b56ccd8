"""The data module of supervised fine-tuning."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

from lightning.pytorch.utilities import rank_zero_info

from lightning_align.data.forms import Form, first_form
from lightning_align.data.ledger import Ledger
from lightning_align.data.mixture import describe
from lightning_align.data.row_packing import PackedSampler, Sequences, collate_packed
from lightning_align.data.rows import read_rows
from lightning_align.data.store import TokenStore, read_forms
from lightning_align.training.datamodule import AlignDataModule, Loader


def _with_arguments_of(base: Callable[..., None], own: Callable[..., None]) -> inspect.Signature:
    """Return a signature with the arguments of a base class in the place of ``*args`` and ``**kwargs``, for editors."""
    added = [p for p in inspect.signature(own).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return inspect.Signature([*inspect.signature(base).parameters.values(), *added])


class SFTDataModule(AlignDataModule):
    """Data module of rows with a prompt and a response, with messages, or with text.

    Rows of text are always packed: they are joined with an end-of-sequence token between them and cut into blocks of
    `max_length` tokens. Rows for prediction need a prompt or messages.

    Args:
        packing: Whether to pack several rows into one sequence, which saves padding. Rows stay whole, attention stays within
            each row, and positions start again with each, so the loss and its gradient are those of the rows alone. A batch has
            `batch_size` sequences, so use a smaller `batch_size`. `group_by_length` then has no effect. Models with recurrent
            layers, and a few others, cannot keep rows apart and raise an error. On a CPU, packing speeds up `PaLM`. Models of
            transformers are slower with it there, because their attention computes all pairs of a sequence.
        packed_length: The largest number of tokens per sequence, with `packing`. Default is `max_length`.
    """

    kind: ClassVar[str] = "sft"
    forms: ClassVar[tuple[Form, ...]] = ("response", "messages", "text")

    def __init__(self, *args: Any, packing: bool = False, packed_length: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if packed_length is not None and not packing:
            raise ValueError(f"`packed_length` must be None without packing, but got {packed_length}. Set `packing: true`.")
        if packed_length is not None and packed_length < self.max_length:
            raise ValueError(
                f"`packed_length` must be at least `max_length` ({self.max_length}), but got {packed_length}. A sequence must "
                "have room for the longest row."
            )
        weighted = [part for part in self._parts.get("train", ()) if part.weight is not None]
        if packing and len(weighted) > 1:
            raise ValueError(
                f"`packing` must be false for a mixture with weights ({describe(weighted)}), but got true. Leave the weights "
                "out, so that an epoch has every row once, or set `packing: false`."
            )
        if packing and self.batch_tokens is not None:
            raise ValueError(
                f"`batch_tokens` must be null with `packing`, but got {self.batch_tokens}. Set `packed_length`, the tokens of "
                "a sequence, and `batch_size`, the sequences of a batch."
            )
        self.packing = packing
        self.packed_length = self.max_length if packed_length is None else packed_length

    __init__.__signature__ = _with_arguments_of(AlignDataModule.__init__, __init__)  # type: ignore[attr-defined]

    def train_dataloader(self) -> Loader:
        """Return training batches, in a new order for each epoch. A resumed run continues at the next batch."""
        if not self.packing:
            return super().train_dataloader()
        return self._packed_loader("train", self.batch_size, shuffle=True)

    def _eval_loader(self, key: str) -> Loader:
        if not self.packing or key == "predict":
            return super()._eval_loader(key)
        return self._packed_loader(key, self.eval_batch_size, shuffle=False)

    def _packed_loader(self, key: str, batch_size: int, *, shuffle: bool) -> Loader:
        store = self._store(key)
        replicas: dict[str, Any] = (self.trainer and self.trainer.distributed_sampler_kwargs) or {}
        sampler = PackedSampler(
            store.lengths(), capacity=self.packed_length, batch_size=batch_size, shuffle=shuffle, seed=self.seed, **replicas
        )
        rank_zero_info(f"{key}: {sampler.describe()}")
        collate = cast(Any, partial(collate_packed, pad_id=self.tokenizer.pad_id))
        return self._loader(cast(TokenStore, Sequences(store)), sampler, collate, resumable=shuffle)

    def _open(self, key: str) -> list[tuple[TokenStore, Ledger]]:
        if self.packing and key != "predict":
            for part in self._parts.get(key, ()):
                split = key.partition("/")[0]
                rows = read_forms(read_rows(part.rows, split=split), recipe=self._recipe(key, part))
                if first_form(rows, self.forms) == "text":
                    raise ValueError(
                        f"`packing` must be false for rows of text, but got true, and {part.name} (`{key}`) has such rows. "
                        "They are always packed, into blocks of `max_length` tokens. Set `packing: false`, or give rows of "
                        "prompt and response."
                    )
        return super()._open(key)
