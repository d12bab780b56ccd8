"""The data module of RETRO: windows of documents with their neighbors in a retrieval database."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lightning_align.data.batching import LengthGroupedSampler, RepeatedSampler, ResumableLoader
from lightning_align.data.encode import encode_rows
from lightning_align.data.forms import Form
from lightning_align.data.ledger import Ledger
from lightning_align.data.mapping import RowMapping, map_rows
from lightning_align.data.mixture import SourcePart, parts_of
from lightning_align.data.rows import RowTask, read_rows
from lightning_align.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from lightning_align.models.weights import weights_hash
from lightning_align.retrieval.database import VERIFIED_BYTES, RetrievalDatabase
from lightning_align.retrieval.encoders import LMEncoder
from lightning_align.retrieval.neighbors import warn_of_chunks_alone
from lightning_align.retrieval.search import Retriever
from lightning_align.retrieval.tables import ChunkTable
from lightning_align.retro.batch import RetrievalBatch, RetrievalWindows, count_neighbors
from lightning_align.runtime.kinds import check_kinds, hints_of
from lightning_align.runtime.lightning_internals import overfits
from lightning_align.runtime.plain import PlainNumbers
from lightning_align.training.loading import for_device
from lightning_align.types import PromptBatch

Loader = DataLoader[RetrievalBatch]


class RETRODataModule(PlainNumbers, L.LightningDataModule):
    """Windows of consecutive chunks, each with its neighbors from a retrieval database.

    The callback `RetrievalIndexing` builds the database before the first batch is loaded.

    Args:
        database: The folder of the retrieval database.
        tokenizer: The tokenizer that the database was built with: bytes, the path of a tokenizer.json, or the folder or hub
            name of a transformers tokenizer.
        train: The query set of the database to train on. Default is to train on the documents of the database, without deleted
            documents.
        validation: The query set of the database to validate on, or several. The metrics of each of several are logged as
            `val/<query set>/loss`, beside those of all windows as `val/loss`.
        test: The query set of the database to test on, or several.
        predict: Rows with a prompt to continue: any source or mixture that `AlignDataModule` accepts. A mixture is read part by
            part, each with its `columns` and `shape`.
        num_chunks: The number of chunks per window. Longer documents are cut into several windows.
        num_neighbors: The number of neighbors per chunk in training.
        random_neighbors: The share of the neighbors in training that are replaced by random chunks of other documents of the
            database. The same neighbors are replaced in each epoch. The model then learns to check whether a neighbor is
            relevant.
        eval_num_neighbors: The number of neighbors per chunk in evaluation. It must be at least the largest number that the
            module evaluates. Default is `num_neighbors`.
        batch_size: The number of windows per training batch and device.
        eval_batch_size: The number of windows or prompts per evaluation batch and device. Default is `batch_size`.
        on_leak: The action if an evaluation document has a near-duplicate in the database: fail raises an error, warn warns.
        num_workers: The number of worker processes that make batches. 0 makes them in the main process.
        seed: The seed of the order of the windows, and of the random and shuffled neighbors in evaluation.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        database: str,
        *,
        tokenizer: str = "bytes",
        train: str | None = None,
        validation: str | list[str] | None = "validation",
        test: str | list[str] | None = None,
        predict: str | list[str] | list[SourcePart] | RowTask | Path | None = None,
        num_chunks: int = 8,
        num_neighbors: int = 2,
        random_neighbors: float = 0.0,
        eval_num_neighbors: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        on_leak: str = "fail",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        check_kinds(type(self).__name__, hints_of(RETRODataModule), locals())
        super().__init__()
        self.eval_num_neighbors = num_neighbors if eval_num_neighbors is None else eval_num_neighbors
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        for name, value, least in (
            ("num_chunks", num_chunks, 1),
            ("num_neighbors", num_neighbors, 1),
            ("eval_num_neighbors", self.eval_num_neighbors, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", self.eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be {least} or more, but got {value}.")
        if not 0 <= random_neighbors <= 1:
            raise ValueError(f"`random_neighbors` must be a share from 0 to 1, but got {random_neighbors}.")
        if on_leak not in ("fail", "warn"):
            raise ValueError(f"`on_leak` must be fail or warn, but got {on_leak!r}.")
        given = {"validation": validation, "test": test}
        self.folder, self.tokenizer_name = Path(database), os.fspath(tokenizer)
        self.train_set = train
        self.sets = {stage: [name] if isinstance(name, str) else list(name or ()) for stage, name in given.items()}
        """The query sets of the validation and the test."""
        self.prompts = predict
        self.num_chunks, self.num_neighbors, self.batch_size = num_chunks, num_neighbors, batch_size
        self.random_neighbors = random_neighbors
        self.on_leak, self.num_workers, self.seed = on_leak, num_workers, seed
        self._tokenizer: Tokenizer | None = None
        self._retriever: tuple[Any, Retriever] | None = None
        self._limit_val_batches: int | float | None = None

    def setup(self, stage: str) -> None:
        """Disable validation if there is no validation set. The database may not exist yet, so it is not opened here."""
        trainer = self.trainer
        if stage == "fit" and trainer is not None and not self.sets["validation"]:
            self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def teardown(self, stage: str) -> None:
        """Restore the setting of the Trainer that `setup` changed."""
        if self.trainer is not None and self._limit_val_batches is not None:
            self.trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None

    # -- the database, which is opened at each use because a refresh replaces its generation

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer

    @property
    def database(self) -> RetrievalDatabase:
        """The current generation of the database.

        Raises:
            ValueError: If there is no database, or if its tokenizer or chunk size differ from those of the run.
        """
        database = RetrievalDatabase.open(self.folder)
        if database.chunks.tokenizer_fingerprint != self.tokenizer.fingerprint:
            raise ValueError(
                f"`tokenizer` must be the tokenizer that {self.folder} was built with, but {self.tokenizer_name!r} is another "
                "one. Use the tokenizer of RetrievalIndexing."
            )
        policy: Any = getattr(self.trainer and self.trainer.lightning_module, "policy", None)
        size = getattr(policy, "chunk_size", None)
        if size is not None and size != database.chunks.chunk_size:
            raise ValueError(
                f"`chunk_size` must be the same in the database and the model, but {self.folder} has chunks of "
                f"{database.chunks.chunk_size} tokens and the model has chunks of {size} tokens."
            )
        if isinstance(num_tokens := getattr(policy, "num_tokens", None), int):
            check_vocabulary(self.tokenizer, num_tokens=num_tokens)
        return database

    def _verify(self, database: RetrievalDatabase, name: str | None) -> None:
        """Compare the files of a loader with their hashes, if that takes seconds at most."""
        names = [] if name is None else [name]
        if not database.verify(("chunks", "neighbors"), queries=names, at_most=VERIFIED_BYTES):
            rank_zero_info(
                f"{self.folder} has more than {VERIFIED_BYTES / 1e9:.0f} GB, so its files are not compared with their hashes. "
                "Call `RetrievalDatabase.open(...).verify()` after it was copied."
            )

    @property
    def retriever(self) -> Retriever:
        """The retriever for generation. Use it in the main process only."""
        from lightning_align.retro.indexing import open_retriever  # imports faiss, which training does not need

        manifest, encoder = self.database.manifest, None
        if self._retriever is None or self._retriever[0] != manifest:
            policy: Any = getattr(self.trainer and self.trainer.lightning_module, "policy", None)
            if policy is not None and manifest["encoder"] is not None and manifest["made_with"]["encoder"] is None:
                # A refresh built the database with the policy itself. `open_retriever` raises if this policy has other weights.
                encoder = LMEncoder(policy, fingerprint=weights_hash(policy), borrowed=True)
            device = None if self.trainer is None else self.trainer.strategy.root_device
            self._retriever = manifest, open_retriever(self.folder, encoder=encoder, device=device)
        return self._retriever[1]

    # -- batches

    def train_dataloader(self) -> Loader:
        """Make the loader of the training windows. Each epoch has its own order. The loader can resume from a checkpoint."""
        database, name = self.database, self.train_set
        self._verify(database, name)
        documents = database if name is None else database.queries(name)
        if self.trainer is None or self.trainer.is_global_zero:
            warn_of_chunks_alone(
                documents.neighbors,
                documents.chunks,
                database.chunks,
                database.manifest["retriever"],
                what=f"{self.folder}, {name or 'database'}",
            )
        rows = RetrievalWindows(
            documents.chunks,
            documents.neighbors,
            database.chunks,
            num_chunks=self.num_chunks,
            num_neighbors=self.num_neighbors,
            random_neighbors=self.random_neighbors,
            deleted=database.manifest["deleted"],
        )
        rank_zero_info(f"train: {_describe(documents.chunks)}, {len(rows)} windows")
        return self._loader(rows, self.batch_size, train=True)

    def val_dataloader(self) -> Loader | dict[str, Loader]:
        """Make the loader of the validation windows, or one for each of several query sets. Each window comes once."""
        return self._eval_loaders("validation")

    def test_dataloader(self) -> Loader | dict[str, Loader]:
        """Make the loader of the test windows, or one for each of several query sets. Each window comes once."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        """Make the loader of the prompts. Prompts start with the beginning-of-sequence token, if the tokenizer has one."""
        if self.prompts is None:
            raise ValueError(
                "`predict` must name rows with a `prompt`, but got None. Use RETRODataModule(predict=...), or --data.predict "
                "on the command line."
            )
        prompts: list[list[int]] = []
        forms: tuple[Form, ...] = ("prompt", "messages")
        for part in parts_of(self.prompts):
            ledger = Ledger(part.name)
            rows = map_rows(
                read_rows(part.rows, split="test"),
                part.mapping(RowMapping()),
                accepted=forms,
                prompts_only=True,
                ledger=ledger,
            )
            encoded = encode_rows(
                rows,
                tokenizer=self.tokenizer,
                ledger=ledger,
                accepted=forms,
                max_length=sys.maxsize,
                truncation="drop",
                mask_turns="last_turn",
                prompts_only=True,
            )
            prompts += [row.sides[0].tokens for row in encoded]
        sampler = LengthGroupedSampler(
            None, num_rows=len(prompts), batch_size=self.eval_batch_size, shuffle=False, **self._replicas
        )
        batches: list[PromptBatch] = [{"prompts": [prompts[i] for i in rows], "rows": torch.tensor(rows)} for rows in sampler]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list can be used as a dataset

    def _eval_loaders(self, stage: str) -> Loader | dict[str, Loader]:
        names = self.sets[stage]
        if not names:
            raise ValueError(
                f"`{stage}` must be the name of a query set of the database, but got None. Use RETRODataModule({stage}=...)."
            )
        return self._eval_loader(names[0]) if len(names) == 1 else {name: self._eval_loader(name) for name in names}

    def _eval_loader(self, name: str) -> Loader:
        database = self.database
        self._verify(database, name)
        queries = database.queries(name)
        if queries.leaks:
            first = queries.leaks[0]
            message = (
                f"{len(queries.leaks)} documents of {name} have near-duplicates in the database, such as {first['document']}, "
                f"which is similar to {first['found']} ({first['similarity']:.2f}). The model trains on them and can copy from "
                "them as neighbors. Remove them from one of the two sets"
            )
            if self.on_leak == "fail":
                raise ValueError(
                    f"{message}, or set `on_leak` to warn. Near-duplicates are not retrieved for each other unless the "
                    "database was built with `hide_copies` set to false, which shows the effect of the leak."
                )
            rank_zero_warn(f"{message}.")
        rows = RetrievalWindows(
            queries.chunks,
            queries.neighbors,
            database.chunks,
            num_chunks=self.num_chunks,
            num_neighbors=self.eval_num_neighbors,
            deleted=database.manifest["deleted"],
            seed=self.seed,
        )
        rank_zero_info(f"{name}: {_describe(queries.chunks)}, {len(rows)} windows")
        return self._loader(rows, self.eval_batch_size, train=False)

    @property
    def _replicas(self) -> dict[str, Any]:
        return (self.trainer and self.trainer.distributed_sampler_kwargs) or {}

    def _loader(self, rows: RetrievalWindows, batch_size: int, *, train: bool) -> Loader:
        sampler = LengthGroupedSampler(
            rows.windows.lengths,
            num_rows=len(rows),
            batch_size=batch_size,
            shuffle=train,
            seed=self.seed,
            **self._replicas,
        )
        # The sampler yields whole batches. The Trainer would replace it if it were passed as the batch sampler.
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        options = for_device(self.trainer, {"batch_size": None, **workers})
        if "collate_fn" in options:
            options["collate_fn"] = partial(count_neighbors, options["collate_fn"])
        rows.batches = RepeatedSampler(sampler) if overfits(self.trainer) else None
        loader = ResumableLoader if train else DataLoader
        return loader(rows, sampler=rows.batches or sampler, **options)


def _describe(table: ChunkTable) -> str:
    return f"{table.num_documents} documents, {len(table)} chunks of {table.chunk_size} tokens"
