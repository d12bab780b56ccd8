"""The data module of self-play fine-tuning: demonstrations, paired with responses of an opponent to their prompts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_align.data.forms import Form
from lightning_align.data.mixture import MixedStore
from lightning_align.data.store import StoredRow, TokenStore
from lightning_align.runtime.lightning_internals import callbacks_of
from lightning_align.spin.batches import split_rows
from lightning_align.spin.callbacks import SelfPlayGeneration
from lightning_align.spin.generations import Pairs, collate_self_play, join_pairs
from lightning_align.training.datamodule import AlignDataModule, Loader
from lightning_align.types import SelfPlayBatch


class SPINDataModule(AlignDataModule):
    """Data module for rows of prompt and response, or of messages. It pairs each row with a response of the opponent.

    The responses of an iteration are generated when the trainer requests its data loader. At this point, a checkpoint is
    already restored, and the iteration has not trained yet.
    """

    kind: ClassVar[str] = "spin"
    forms: ClassVar[tuple[Form, ...]] = ("response", "messages")

    def train_dataloader(self) -> Loader:
        """Return the loader of the iteration's pairs. With `generate: per_step`, it loads real rows only."""
        store = self._pairs("train")
        if store is None:
            return super().train_dataloader()
        for key in self._keys("validation"):
            self._pairs(key)  # now, while the policy is still the opponent of the iteration
        sampler = self._sampler(store, self.batch_size, shuffle=True, grouped=self.group_by_length)
        return self._loader(store, sampler, self._collate_pairs(), resumable=True)

    def trial_batch(self) -> SelfPlayBatch:
        """Return a batch to measure a step with: real rows, each paired with itself, because nothing is generated yet."""
        batch = next(iter(super().train_dataloader()))
        rows, targets, prompts = split_rows(batch)
        pairs = join_pairs(rows, targets, rows, prompts, pad_id=self.tokenizer.pad_id)
        return {"pairs": pairs, "opponent": torch.zeros(2 * len(rows))}

    def _eval_loader(self, key: str) -> Loader:
        # The pairs of the iteration within `fit`, and after it in the same process. Otherwise real rows only.
        store = None if key in ("test", "predict") else self._pairs(key)
        if store is None:
            return super()._eval_loader(key)
        sampler = self._sampler(store, self.eval_batch_size, shuffle=False)
        return self._loader(store, sampler, self._collate_pairs())

    def _pairs(self, key: str) -> TokenStore | None:
        """Return the pairs of the iteration, or None if there are none. Sampler and loader use them like a `TokenStore`."""
        trainer = self.trainer
        loops = [] if trainer is None else [c for c in callbacks_of(trainer) if isinstance(c, SelfPlayGeneration)]
        if trainer is None or not loops:
            return None
        fitting = trainer.state.fn == TrainerFn.FITTING
        pairs = loops[0].pairs(trainer, self, key, self._store(key)) if fitting else loops[0].made_pairs(key)
        return cast("TokenStore | None", pairs)

    def _parts_of_rows(self, store: TokenStore) -> dict[str, Any]:
        """Divide the pairs by the sources of their real responses."""
        if not isinstance(store, Pairs):
            return super()._parts_of_rows(store)
        real = cast(MixedStore, self._stores["train"])
        sources = np.searchsorted(np.cumsum(real.sizes), store.store_rows(), side="right")
        members = [np.flatnonzero(sources == number) for number in range(len(real.sizes))]
        for part, rows in zip(self._parts["train"], members, strict=True):
            if not len(rows):
                raise ValueError(
                    f"{part.name} has a weight in `train`, but no pairs, because `num_prompts` of SelfPlayGeneration takes the "
                    "first rows of all sources. Remove `num_prompts`, or make the sources smaller instead."
                )
        return {"sizes": [len(rows) for rows in members], "members": members}

    def _collate_pairs(self) -> Callable[[Sequence[StoredRow]], Any]:
        return cast("Callable[[Sequence[StoredRow]], Any]", partial(collate_self_play, pad_id=self.tokenizer.pad_id))
