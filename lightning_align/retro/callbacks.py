"""The callback that has the retrieval database ready before the data are needed."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_align.data.documents import DocumentSource
from lightning_align.data.tokenizer import Tokenizer
from lightning_align.models.checkpoint import weights_hash
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retrieval.encoders import Encoder, LMEncoder
from lightning_align.retrieval.index import IndexConfig
from lightning_align.retro.indexing import build_database, quiet_trainer


class RetrievalIndexing(Callback):
    """Builds the retrieval database, or what is missing of it, on all ranks before the first batch is asked for.

    What is there already and fits is used as it is; a build that was killed goes on where it was. The database is whole as
    soon as ``database.json`` is in its folder; open it where loaders are made, for `setup` of a data module is called before
    that of callbacks.

    Args:
        database: folder of the database.
        documents: what can be retrieved: a folder of text files, a file of rows with a field `text`, or a source such as
            FolderDocuments or StandardLibrary.
        queries: documents that are not in the database and whose neighbors are wanted, by a name each, such as validation.
        encoder: what chunks are found by: a checkpoint of a language model (.ckpt, .pt, .safetensors), the name of a
            sentence-transformers model, or bm25. By default the checkpoint that the module begins from.
        rerank: whether BM25 has the last word on what the encoder finds.
        tokenizer: as of the data module, which is asked for its own where none is given.
        chunk_size: tokens a chunk.
        k: neighbors of each chunk; training may use fewer.
        index: how vectors are indexed: factory (a string of faiss, or auto), min_recall, recall_at, shard_size, seed.
        hide_copies: whether the documents of `queries` may not find near-duplicates of themselves; false shows what a leak
            fakes. Documents of the database never do.
        verify: share of the blocks of each stage that are made twice and compared.
        precision: that the encoder runs in, by default the Trainer's; bf16-mixed is the fastest on most machines.
        refresh_every_n_epochs: build again with the current policy as encoder, every so many epochs; 0 never does.
            The Trainer's reload_dataloaders_every_n_epochs must divide it.
    """

    def __init__(
        self,
        database: str,
        *,
        documents: str | DocumentSource,
        queries: dict[str, str | DocumentSource] | None = None,
        encoder: str | None = None,
        rerank: bool = False,
        tokenizer: str | None = None,
        chunk_size: int = 64,
        k: int = 8,
        index: IndexConfig | None = None,
        hide_copies: bool = True,
        verify: float = 0.01,
        precision: str | None = None,
        refresh_every_n_epochs: int = 0,
    ) -> None:
        if refresh_every_n_epochs < 0:
            raise ValueError(f"refresh_every_n_epochs is {refresh_every_n_epochs}, expected 0 or more")
        if isinstance(index, Mapping):
            index = IndexConfig(**index)
        self.database, self.documents, self.queries = database, documents, queries or {}
        self.encoder, self.tokenizer = encoder, tokenizer
        self.precision, self.refresh_every_n_epochs = precision, refresh_every_n_epochs
        self._settings: dict[str, Any] = {
            "rerank": rerank,
            "chunk_size": chunk_size,
            "k": k,
            "index": index,
            "hide_copies": hide_copies,
            "verify": verify,
        }

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Build what is missing.

        Raises:
            ValueError: if there is nothing to encode with, or anything else that was given cannot be used.
        """
        if self.refresh_every_n_epochs and stage == "fit":
            self._check_refresh(trainer)
        encoder = self.encoder or getattr(pl_module, "init_from", None)
        if encoder is None:
            raise ValueError(
                "RetrievalIndexing needs something that turns chunks into vectors: give encoder, a checkpoint of a language "
                "model (such as one that configs/sft trains), the name of a sentence-transformers model, or bm25"
            )
        self._build(trainer, encoder)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Build again with the policy as it is now, if this is the epoch for it."""
        every = self.refresh_every_n_epochs
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if every and (trainer.current_epoch + 1) % every == 0 and not last:
            policy: nn.Module = pl_module.policy  # type: ignore[assignment]  # every module of the suite has one
            # It trains on: the Trainer that encodes must neither move it nor take it into evaluation mode for good.
            self._build(trainer, LMEncoder(policy, fingerprint=weights_hash(policy), borrowed=True))

    def _build(self, trainer: L.Trainer, encoder: str | Encoder) -> RetrievalDatabase:
        data = getattr(trainer, "datamodule", None)
        tokenizer: str | Tokenizer | None = (
            self.tokenizer or getattr(data, "tokenizer_name", None) or getattr(data, "tokenizer", None)
        )
        if tokenizer is None:
            raise ValueError("RetrievalIndexing: give tokenizer, for the data module has none")
        database = build_database(
            self.database,
            self.documents,
            encoder=encoder,
            queries=self.queries,
            tokenizer=tokenizer,
            trainer=partial(trainer_like, trainer, precision=self.precision),
            **self._settings,
        )
        generation = database.manifest["generation"]
        rank_zero_info(
            f"retrieval database {Path(self.database)}: {len(database.chunks):,} chunks of {database.chunks.num_documents:,} "
            f"documents, generation {generation}, {database.manifest['retriever']}, {database.neighbors.k} neighbors each"
        )
        return database

    def _check_refresh(self, trainer: L.Trainer) -> None:
        reload: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]  # set by the data connector
        if reload == 0 or self.refresh_every_n_epochs % reload:
            raise ValueError(
                f"refresh_every_n_epochs is {self.refresh_every_n_epochs}, and the Trainer's reload_dataloaders_every_n_epochs "
                f"{reload}: the loaders would go on with the old neighbors; set both alike"
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "refresh_every_n_epochs needs the whole policy on each rank, which this strategy does not have: use ddp, or 0"
            )


def trainer_like(trainer: L.Trainer, *, precision: str | None = None) -> L.Trainer:
    """A Trainer on the devices of another one, for work inside of its run.

    Args:
        trainer: the one that runs.
        precision: by default that of the other one.
    """
    return quiet_trainer(
        accelerator=type(trainer.accelerator)(),
        devices=trainer.num_devices,
        num_nodes=trainer.num_nodes,
        # Encoders are small and frozen: whatever the strategy of the training, each rank has a whole one.
        strategy="ddp" if trainer.world_size > 1 else "auto",
        precision=precision or trainer.precision,
    )
