"""Self-play per iteration with a loader of the user: its rows are read once, and found again by their ids.

The loader still makes the batches. Rows that it shuffles, shards or repeats keep their responses.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from tqdm.auto import tqdm

from lightning_align.data.store import StoredRow, StoredTokens
from lightning_align.runtime.lightning_internals import new_loaders
from lightning_align.spin.batches import is_paired, on_host, real_rows, sent, split_rows
from lightning_align.spin.generations import Pairs, collate_self_play
from lightning_align.types import SelfPlayBatch, TokenBatch

Key = tuple[bytes, bytes]
"""The ids and the targets of a row."""


class LoaderRows:
    """The different rows of a loader in an order that no shuffling changes. It has the interface of a `TokenStore`.

    Args:
        batches: The batches of the loader.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        rows: dict[Key, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]] = {}
        for batch in batches:
            for ids, targets, prompt in zip(*split_rows(real_rows(batch)), strict=True):
                stored = ids.cpu().numpy().astype(np.int32), targets.cpu().numpy()
                rows.setdefault((stored[0].tobytes(), stored[1].tobytes()), (*stored, prompt))
        ordered = sorted(rows, key=lambda key: hashlib.sha256(key[0] + key[1]).digest())
        self._rows = [rows[key] for key in ordered]
        digest = hashlib.sha256(b"".join(hashlib.sha256(key[0] + key[1]).digest() for key in ordered)).hexdigest()
        self.path = f"loader-{digest[:16]}"
        """A name that identifies the rows."""
        self.table = pa.table({"num_prompt": pa.array([prompt for *_, prompt in self._rows], pa.int64())})
        self.index = {key: number for number, key in enumerate(ordered)}
        """The number of each row by its ids and targets."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> StoredRow:
        ids, targets, prompt = self._rows[index]
        return StoredRow(index, prompt, [StoredTokens(ids, targets, 0)])

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Count the tokens of each row, (rows,)."""
        return np.array([len(ids) for ids, *_ in self._rows], np.int64)


class NoTokenizer:
    """Stands for a tokenizer where the data has none: texts are lists of ids."""

    eos_id = None
    pad_id = 0

    def decode(self, ids: list[int]) -> str:
        """Write ids as text."""
        return " ".join(map(str, ids))


class OwnData:
    """What self-play needs of a data module, for data of the user.

    Args:
        module: The module, whose data may have a tokenizer.
    """

    max_length: int | None = None

    def __init__(self, module: Any) -> None:
        self.tokenizer = module.data_tokenizer or NoTokenizer()


class OwnPairs:
    """The pairs of an iteration for the batches of a loader.

    Args:
        rows: The rows of the loader.
        pairs: The pairs of real and generated responses.
        pad_id: The id of the padding.
    """

    def __init__(self, rows: LoaderRows, pairs: Pairs, *, pad_id: int) -> None:
        self.rows, self.pairs, self.pad_id = rows, pairs, pad_id
        self._of: dict[int, list[int]] = {}
        for place, number in enumerate(pairs.rows()):
            self._of.setdefault(number, []).append(place)

    def attach(self, batch: TokenBatch) -> SelfPlayBatch:
        """Pair each row of a batch with its generated responses.

        Raises:
            ValueError: If a row was not in the loader when the iteration began.
        """
        found = []
        for ids, targets, _ in zip(*split_rows(on_host(batch)), strict=True):
            number = self.rows.index.get((ids.numpy().astype(np.int32).tobytes(), targets.numpy().tobytes()))
            if number is None:
                raise ValueError(
                    "A row of the batch has no generated response, because the loader did not yield it when its rows were "
                    "read. With `generate: per_iteration`, every pass over the loader must yield the same rows, in any order. "
                    "Use `generate: per_step`, which generates the responses of each batch."
                )
            found += [self.pairs[place] for place in self._of[number]]
        paired = collate_self_play(found, pad_id=self.pad_id)
        device = batch["tokens"].device
        return {"pairs": sent(paired["pairs"], device), "opponent": paired["opponent"].to(device, non_blocking=True)}


def read_rows(trainer: L.Trainer, stage: str) -> LoaderRows:
    """Read the rows of the trainer's own loader, apart from the pass over it that trains. Every rank reads all rows.

    Args:
        trainer: The trainer, during `fit`.
        stage: The stage, `train` or `validation`.

    Raises:
        ValueError: If the loader has no rows.
    """

    def batches() -> Iterator[Any]:
        with isolate_rng():  # a loader that shuffles draws random numbers
            loader = new_loaders(trainer)[stage != "train"]
            flat = loader.flattened if isinstance(loader, CombinedLoader) else loader
            parts: Any = flat if isinstance(flat, list) else [flat]
            for part in parts:
                yield from part

    hidden = None if trainer.is_global_zero else True
    rows = LoaderRows(tqdm(batches(), desc=f"Reading the {stage} rows", unit="batch", leave=False, disable=hidden))
    if not len(rows):
        raise ValueError(f"The loader of the {stage} rows yielded no rows. Give one with rows.")
    return rows


class OwnLoaders:
    """The loaders of the user: their rows, and the pairs of the current iteration.

    Args:
        loop: The `SelfPlayGeneration` callback.
    """

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._made: dict[str, tuple[int, OwnPairs]] = {}

    def prepare(self, trainer: L.Trainer, batch: Any) -> None:
        """Generate the pairs of all loaders while the policy is the opponent, unless a data module did.

        Every rank must call this.

        Args:
            trainer: The trainer, during `fit`.
            batch: The batch that comes next.
        """
        module: Any = trainer.lightning_module
        if module.generate_mode == "per_iteration" and not is_paired(batch):
            for stage in ("train", "validation") if trainer.enable_validation else ("train",):
                self._pairs(trainer, stage)

    def attach(self, trainer: L.Trainer, batch: TokenBatch, stage: str) -> SelfPlayBatch:
        """Pair the rows of a batch with their generated responses.

        Args:
            trainer: The trainer, during `fit`.
            batch: Real rows.
            stage: The stage, `train` or `validation`.
        """
        return self._pairs(trainer, stage).attach(batch)

    def _pairs(self, trainer: L.Trainer, stage: str) -> OwnPairs:
        made = self._made.get(stage)
        if made is None or made[0] != self._loop.iteration:
            if self._loop.num_prompts is not None:
                raise ValueError(
                    f"`num_prompts` of SelfPlayGeneration must be null with a loader of your own, but got "
                    f"{self._loop.num_prompts}. Give a loader with fewer rows, or use SPINDataModule."
                )
            rows, data = read_rows(trainer, stage) if made is None else made[1].rows, OwnData(trainer.lightning_module)
            pairs = self._loop.pairs(trainer, data, stage, rows)
            made = self._made[stage] = self._loop.iteration, OwnPairs(rows, pairs, pad_id=data.tokenizer.pad_id)
        return made[1]
