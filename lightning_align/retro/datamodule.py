"""Rows for RETRO: windows of a retrieval database's own documents, or of others, with their neighbours in it."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lightning_align.data.batching import LengthGroupedSampler, ResumableLoader
from lightning_align.data.rows import RowTask, read_rows
from lightning_align.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from lightning_align.models.weights import weights_hash
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retrieval.encoders import LMEncoder
from lightning_align.retrieval.search import Retriever
from lightning_align.retrieval.tables import ChunkTable
from lightning_align.retro.batch import RetrievalBatch, RetrievalWindows
from lightning_align.runtime.lightning_internals import overfits
from lightning_align.types import PromptBatch


class RETRODataModule(L.LightningDataModule):
    """Windows of consecutive chunks with the neighbours of each chunk, out of a finished retrieval database.

    The callback `RetrievalIndexing` builds the database before the first batch is asked for.

    Args:
        database: Folder of the retrieval database.
        tokenizer: What the database was built with: bytes, the path of a tokenizer.json, or a folder or hub name of a
            transformers tokenizer.
        train: Query set of the database to train on; by default the documents of the database themselves, without those that
            were deleted from it.
        validation: Query set of the database to validate on.
        test: Query set of the database to test on.
        predict: Rows with a prompt to continue: a file, a dataset of the hub, or a task.
        num_chunks: Chunks of a window; a longer document is cut into several.
        num_neighbors: Neighbours of each chunk in training.
        random_neighbors: Share of the neighbours in training, always the same ones, in whose place random chunks of other
            documents of the database are read, so that the model learns to look at what was found before it believes it.
        eval_num_neighbors: In evaluation, at least as many as the module compares; as num_neighbors where it is not given.
        batch_size: Windows of a training batch of each device.
        eval_batch_size: Windows of an evaluation batch, or prompts; as batch_size where it is not given.
        on_leak: What an evaluation document that stands in the database too does: fail stops and names it, warn names it.
        num_workers: Processes that make batches ahead of time; 0 makes them in the training process.
        seed: Where the order of the windows, and the random and shuffled neighbours, start from.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        database: str,
        *,
        tokenizer: str = "bytes",
        train: str | None = None,
        validation: str | None = "validation",
        test: str | None = None,
        predict: str | RowTask | None = None,
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
                raise ValueError(f"{name} is {value}, expected {least} or more")
        if not 0 <= random_neighbors <= 1:
            raise ValueError(f"random_neighbors is {random_neighbors}, expected a share from 0 to 1")
        if on_leak not in ("fail", "warn"):
            raise ValueError(f"on_leak is {on_leak!r}, expected fail or warn")
        self.folder, self.tokenizer_name = Path(database), tokenizer
        self.sets = {"train": train, "validation": validation, "test": test}
        self.prompts = predict
        self.num_chunks, self.num_neighbors, self.batch_size = num_chunks, num_neighbors, batch_size
        self.random_neighbors = random_neighbors
        self.on_leak, self.num_workers, self.seed = on_leak, num_workers, seed
        self._tokenizer: Tokenizer | None = None
        self._retriever: tuple[Any, Retriever] | None = None
        self._limit_val_batches: int | float | None = None

    def setup(self, stage: str) -> None:
        """Lets a fit without a validation set go without validation. The database may not be built yet."""
        trainer = self.trainer
        if stage == "fit" and trainer is not None and self.sets["validation"] is None:
            self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def teardown(self, stage: str) -> None:
        """Leaves the trainer as it was."""
        if self.trainer is not None and self._limit_val_batches is not None:
            self.trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None

    # -- the database, opened anew at each use: a refresh puts another generation in its place

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded when it is first used."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer

    @property
    def database(self) -> RetrievalDatabase:
        """The database as it now is.

        Raises:
            ValueError: If there is none, or it was built with another tokenizer or for chunks of another size.
        """
        database = RetrievalDatabase.open(self.folder)
        if database.chunks.tokenizer_fingerprint != self.tokenizer.fingerprint:
            raise ValueError(
                f"{self.folder} was built with another tokenizer than {self.tokenizer_name!r}: give the data module the one of "
                "RetrievalIndexing"
            )
        policy: Any = getattr(self.trainer and self.trainer.lightning_module, "policy", None)
        size = getattr(policy, "chunk_size", None)
        if size is not None and size != database.chunks.chunk_size:
            raise ValueError(
                f"{self.folder} has chunks of {database.chunks.chunk_size} tokens and the model of {size}: give both the same "
                "chunk_size"
            )
        if isinstance(num_tokens := getattr(policy, "num_tokens", None), int):
            check_vocabulary(self.tokenizer, num_tokens=num_tokens)
        return database

    @property
    def retriever(self) -> Retriever:
        """Live retrieval, for generation; in the main process only."""
        from lightning_align.retro.indexing import open_retriever  # faiss comes with it, and training needs none

        manifest, encoder = self.database.manifest, None
        if self._retriever is None or self._retriever[0] != manifest:
            policy: Any = getattr(self.trainer and self.trainer.lightning_module, "policy", None)
            if policy is not None and manifest["encoder"] is not None and manifest["made_with"]["encoder"] is None:
                # A refresh built it with the policy, which no file has; another one is refused.
                encoder = LMEncoder(policy, fingerprint=weights_hash(policy), borrowed=True)
            self._retriever = manifest, open_retriever(self.folder, encoder=encoder)
        return self._retriever[1]

    # -- batches

    def train_dataloader(self) -> DataLoader[RetrievalBatch]:
        """Windows of the documents to train on, in an order of each epoch's own; resumes where a checkpoint was taken."""
        database, name = self.database, self.sets["train"]
        documents = database if name is None else database.queries(name)
        rows = RetrievalWindows(
            documents.chunks,
            documents.neighbors,
            database.chunks,
            num_chunks=self.num_chunks,
            num_neighbors=self.num_neighbors,
            random_neighbors=self.random_neighbors,
            deleted=database.manifest["deleted"],
        )
        rank_zero_info(f"train: {_size(documents.chunks)}, {len(rows)} windows")
        return self._loader(rows, self.batch_size, train=True)

    def val_dataloader(self) -> DataLoader[RetrievalBatch]:
        """Every window of the validation documents once."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader[RetrievalBatch]:
        """Every window of the test documents once."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        """Prompts, beginning as documents do."""
        if self.prompts is None:
            raise ValueError(
                "there are no prompts to continue: give RETRODataModule(predict=...), on the command line --data.predict: rows "
                "with a `prompt`"
            )
        texts = []
        for row in read_rows(self.prompts, split="test"):
            prompt = row.fields.get("prompt")
            if row.problem or not isinstance(prompt, str):
                raise ValueError(f"{row.origin}: {row.problem or 'there is no text `prompt`'}; each row to continue needs one")
            texts.append(prompt)
        start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        prompts = [[*start, *encoding.ids] for encoding in self.tokenizer.encode_batch(texts)]
        sampler = LengthGroupedSampler(
            None, num_rows=len(prompts), batch_size=self.eval_batch_size, shuffle=False, **self._replicas
        )
        batches: list[PromptBatch] = [{"prompts": [prompts[i] for i in rows], "rows": torch.tensor(rows)} for rows in sampler]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset

    def _eval_loader(self, stage: str) -> DataLoader[RetrievalBatch]:
        name = self.sets[stage]
        if name is None:
            raise ValueError(
                f"there is no {stage} set: give RETRODataModule({stage}=...) the name of a query set of the database"
            )
        database = self.database
        queries = database.queries(name)
        if queries.leaks:
            first = queries.leaks[0]
            message = (
                f"{len(queries.leaks)} documents of {name} stand in the database too, such as {first['document']}, which is "
                f"like {first['found']} ({first['similarity']:.2f}): training reads them, and a neighbor among them is copied "
                "from, not predicted with. Take them out of one of the two"
            )
            if self.on_leak == "fail":
                raise ValueError(
                    f"{message}, or set on_leak: warn; they are no neighbors of each other unless the database was built with "
                    "hide_copies: false, which shows what they fake"
                )
            rank_zero_warn(message)
        rows = RetrievalWindows(
            queries.chunks,
            queries.neighbors,
            database.chunks,
            num_chunks=self.num_chunks,
            num_neighbors=self.eval_num_neighbors,
            deleted=database.manifest["deleted"],
            seed=self.seed,
        )
        rank_zero_info(f"{name}: {_size(queries.chunks)}, {len(rows)} windows")
        return self._loader(rows, self.eval_batch_size, train=False)

    @property
    def _replicas(self) -> dict[str, Any]:
        return {} if self._overfits else (self.trainer and self.trainer.distributed_sampler_kwargs) or {}

    @property
    def _overfits(self) -> bool:
        return overfits(self.trainer)

    def _loader(self, rows: RetrievalWindows, batch_size: int, *, train: bool) -> DataLoader[RetrievalBatch]:
        sampler = LengthGroupedSampler(
            rows.windows.lengths,
            num_rows=len(rows),
            batch_size=batch_size,
            shuffle=train,
            seed=self.seed,
            **self._replicas,
        )
        # The sampler yields whole batches: were it given as batch sampler, the trainer would put its own in its place.
        options: dict[str, Any] = {
            "batch_size": None,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
        }
        if self._overfits:
            # The trainer then takes the first batches of a plain sampler, and deals them out to the ranks itself.
            rows.batches = list(sampler)
            return DataLoader(rows, **options)
        loader = ResumableLoader if train else DataLoader
        return loader(rows, sampler=sampler, **options)


def _size(table: ChunkTable) -> str:
    return f"{table.num_documents} documents, {len(table)} chunks of {table.chunk_size} tokens"
