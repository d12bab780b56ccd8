"""The callback that builds and refreshes the retrieval database."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_align.data.documents import DocumentSource
from lightning_align.data.tokenizer import Tokenizer
from lightning_align.models.weights import weights_hash
from lightning_align.retrieval.build import publish_head
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retrieval.encoders import Encoder, LMEncoder
from lightning_align.retrieval.index import IndexConfig
from lightning_align.retrieval.words import WordsConfig
from lightning_align.retro.indexing import build_database, quiet_trainer
from lightning_align.runtime.lightning_internals import reload_interval


class RetrievalIndexing(Callback):
    """Builds the retrieval database on all ranks before the first batch is loaded.

    Only missing stages are built, and an interrupted build is resumed. The database is complete when its folder contains
    ``database.json``. Open it where the data loaders are made, because Lightning calls `setup` of the data module before
    `setup` of the callbacks.

    Args:
        database: The folder of the database. Default is that of the data module.
        documents: The documents that can be retrieved: a folder of text files, a text file, a file of rows with a field
            `text`, or a source such as FolderDocuments or FileDocuments.
        queries: Further documents that are not in the database but need neighbors, such as validation documents. Each source
            has a name.
        encoder: The encoder that retrieves the neighbors: a checkpoint of a language model (.ckpt, .pt, .safetensors), the name
            of a sentence-transformers model, or bm25. Default is the checkpoint in `init_from` of the module.
        rerank: Whether BM25 reranks the neighbors that the encoder finds.
        tokenizer: The tokenizer, in the same form as in the data module. Default is the tokenizer of the data module.
        chunk_size: The number of tokens per chunk. Default is that of the model, or 64 if the model has none.
        k: The number of neighbors per chunk. Training can use fewer.
        index: How the vectors are indexed: factory (a faiss factory string, or auto), min_recall, recall_at, shard_size, seed.
        words: How BM25 finds the terms of a text: language, stop_words, stemming, identifiers, segmenter. Default is a setting
            for any language and script.
        hide_copies: Whether near-duplicates of a document of `queries` are excluded from its neighbors. False shows the effect
            of a leak. For documents of the database they are always excluded.
        verify: The share of the blocks of each stage that are computed twice and compared.
        max_chunks: The most chunks that `documents` may have. With more, the run ends before anything is encoded. Default is
            any number.
        rebuild: Whether `fit` makes vectors, index and neighbors again, also if they are finished. A run that is resumed makes
            them once more, so set it back to false first. Evaluation and refreshes use what is finished.
        precision: The precision of the encoder. Default is the precision of the Trainer. bf16-mixed is the fastest on most
            machines, and bf16-true on processors with AMX.
        refresh_every_n_epochs: Rebuild the database with the current policy as encoder every this many epochs. 0 never does.
            `reload_dataloaders_every_n_epochs` of the Trainer must divide it. A checkpoint stores the generation of the
            database that it was trained on, so that a resumed run or an evaluation uses the same neighbors. `predict` encodes
            new text, so it rebuilds the database with the policy of the checkpoint.

    Raises:
        ValueError: If `refresh_every_n_epochs` is negative.
    """

    def __init__(
        self,
        database: str | None = None,
        *,
        documents: str | DocumentSource,
        queries: dict[str, str | DocumentSource] | None = None,
        encoder: str | None = None,
        rerank: bool = False,
        tokenizer: str | None = None,
        chunk_size: int | None = None,
        k: int = 8,
        index: IndexConfig | None = None,
        words: WordsConfig | None = None,
        hide_copies: bool = True,
        verify: float = 0.01,
        max_chunks: int | None = None,
        rebuild: bool = False,
        precision: str | None = None,
        refresh_every_n_epochs: int = 0,
    ) -> None:
        if refresh_every_n_epochs < 0:
            raise ValueError(
                f"`refresh_every_n_epochs` must be 0 or more, but got {refresh_every_n_epochs}. Use 0 to never refresh."
            )
        if isinstance(index, Mapping):
            index = IndexConfig(**index)
        if isinstance(words, Mapping):
            words = WordsConfig(**words)
        self._database, self.documents, self.queries = database, documents, queries or {}
        self.encoder, self.tokenizer = encoder, tokenizer
        self.precision, self.refresh_every_n_epochs = precision, refresh_every_n_epochs
        self._settings: dict[str, Any] = {
            "rerank": rerank,
            "chunk_size": chunk_size,
            "k": k,
            "index": index,
            "words": words,
            "hide_copies": hide_copies,
            "verify": verify,
            "max_chunks": max_chunks,
        }
        self._rebuild = rebuild
        self._refreshed: dict[str, Any] | None = None
        """The last refresh: the number of ``epochs`` before it and the ``head`` (manifest) of the database. None if none."""

    @property
    def state_key(self) -> str:
        """A key that differs per database, because a run can have several."""
        return self._generate_state_key(database=self._database)

    @property
    def database(self) -> str:
        """The folder of the database."""
        if self._database is None:
            raise ValueError("RetrievalIndexing: `database` is required, because the data module has no folder of a database.")
        return self._database

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Build the missing stages of the database. Evaluation does not change a refreshed database.

        Args:
            trainer: The Trainer.
            pl_module: The module. Its `init_from` is the default encoder.
            stage: The stage: fit, validate, test or predict.

        Raises:
            ValueError: If there is no encoder, or if another argument is invalid.
        """
        if self.refresh_every_n_epochs and stage == "fit":
            self._check_refresh(trainer)
        folder = getattr(getattr(trainer, "datamodule", None), "folder", None)
        self._database = self._database or (None if folder is None else str(folder))
        if self._settings["chunk_size"] is None:
            self._settings["chunk_size"] = _chunk_size_of(pl_module) or 64
        encoder = self.encoder or getattr(pl_module, "init_from", None)
        if encoder is None:
            raise ValueError(
                "RetrievalIndexing: `encoder` is required, because the module has no `init_from`. Use a checkpoint of a "
                "language model (such as one trained with configs/sft), the name of a sentence-transformers model, or bm25."
            )
        if stage != "fit" and self.refresh_every_n_epochs and self._is_refreshed():
            return
        self._refreshed = None
        self._build(trainer, encoder, rebuild=self._rebuild and stage == "fit")

    def state_dict(self) -> dict[str, Any]:
        """Return the generation of the database that the run uses, if the policy was its encoder."""
        return {} if self._refreshed is None else dict(self._refreshed)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the database that the checkpoint was trained on. If it is gone, build it with the checkpoint's policy."""
        every = self.refresh_every_n_epochs
        if not every:
            return
        state = checkpoint["callbacks"].get(self.state_key) or {"epochs": 0, "head": None}
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {})
        # The number of completed epochs. A checkpoint is written after the refresh at the end of an epoch, or before that end.
        done = progress.get("current", {}).get("processed", checkpoint.get("epoch", 0))
        fits, due = trainer.state.fn == "fit", done - done % every
        if not fits and state["head"] is None:
            return
        wanted = max(due, state["epochs"]) if fits else state["epochs"]
        if trainer.state.fn == "predict":
            self._refresh(trainer, pl_module, done)
        elif wanted:
            # There is no refresh after the last epoch of a run (see `on_train_epoch_end`), so its checkpoint can lack one.
            kept = state["epochs"] == wanted and self._matches_current(state["head"])
            whole = kept and publish_head(Path(self.database), state["head"], verify=self._settings["verify"] > 0)
            if whole:
                self._refreshed = state
                return
            if wanted != done:
                rank_zero_warn(
                    f"{self.database} no longer contains the generation that was built with the policy after epoch {wanted}, "
                    f"or its documents or settings have changed. It is rebuilt with the policy after epoch {done}, so the "
                    "resumed run is not bit-identical to the uninterrupted run."
                )
            self._refresh(trainer, pl_module, done)

    def _matches_current(self, head: Mapping[str, Any]) -> bool:
        """Return whether an earlier generation has the same documents and settings as the current one.

        Deleted documents count as a difference, so that restoring a generation does not bring them back.
        """

        def settings(manifest: Mapping[str, Any]) -> Any:
            queries = {name: stages["chunks"] for name, stages in manifest["queries"].items()}
            made_with = {name: value for name, value in manifest["made_with"].items() if name != "encoder"}
            return manifest["stages"]["chunks"], manifest["deleted"], manifest["retriever"], made_with, queries

        return bool(settings(head) == settings(RetrievalDatabase.open(self.database).manifest))

    def _is_refreshed(self) -> bool:
        """Return whether the database was built with an encoder object, such as the policy, and not with a named encoder."""
        try:
            head = RetrievalDatabase.open(self.database).manifest
        except ValueError:
            return False
        return head["encoder"] is not None and head["made_with"]["encoder"] is None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rebuild the database with the current policy every `refresh_every_n_epochs` epochs, except after the last epoch."""
        every = self.refresh_every_n_epochs
        last = trainer.current_epoch + 1 == trainer.max_epochs
        # Lightning also calls this at a stop in the middle of an epoch. The resumed run goes on with the old neighbors.
        if every and (trainer.current_epoch + 1) % every == 0 and not last and trainer.is_last_batch:
            self._refresh(trainer, pl_module, trainer.current_epoch + 1)

    def _refresh(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> None:
        policy: nn.Module = pl_module.policy  # type: ignore[assignment]  # each module of the package has a policy
        # The policy continues training, so the Trainer of the encoder must not move it or leave it in evaluation mode.
        database = self._build(trainer, LMEncoder(policy, fingerprint=weights_hash(policy), borrowed=True))
        self._refreshed = {"epochs": epochs, "head": database.manifest}

    def _build(self, trainer: L.Trainer, encoder: str | Encoder, *, rebuild: bool = False) -> RetrievalDatabase:
        data = getattr(trainer, "datamodule", None)
        tokenizer: str | Tokenizer | None = (
            self.tokenizer or getattr(data, "tokenizer_name", None) or getattr(data, "tokenizer", None)
        )
        if tokenizer is None:
            raise ValueError(
                "RetrievalIndexing: `tokenizer` is required, because the data module has none. Use the tokenizer of the policy."
            )
        database = build_database(
            self.database,
            self.documents,
            encoder=encoder,
            queries=self.queries,
            tokenizer=tokenizer,
            trainer=partial(trainer_like, trainer, precision=self.precision),
            rebuild=rebuild,
            **self._settings,
        )
        generation = database.manifest["generation"]
        alone = int((~np.asarray(database.neighbors.mask[:, 0])).sum())
        rank_zero_info(
            f"Retrieval database {Path(self.database)}: {len(database.chunks):,} chunks of {database.chunks.num_documents:,} "
            f"documents, generation {generation}, retriever {database.manifest['retriever']}, {database.neighbors.k} neighbors "
            f"per chunk, {alone:,} chunks without neighbors."
        )
        return database

    def _check_refresh(self, trainer: L.Trainer) -> None:
        reload = reload_interval(trainer)
        if reload == 0 or self.refresh_every_n_epochs % reload:
            raise ValueError(
                f"`refresh_every_n_epochs` must be a multiple of `reload_dataloaders_every_n_epochs` of the Trainer, but got "
                f"{self.refresh_every_n_epochs} and {reload}. The data loaders would keep the old neighbors. Set both to the "
                "same value."
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "`refresh_every_n_epochs` needs the whole policy on each rank, but the strategy "
                f"{type(trainer.strategy).__name__} shards it. Use the strategy ddp, or set `refresh_every_n_epochs` to 0."
            )


def _chunk_size_of(module: L.LightningModule) -> int | None:
    """Return the tokens per chunk of a model that may not be built yet. None if it has no chunks."""
    source: Any = getattr(module, "source", None)
    for model in (getattr(module, "policy", None), getattr(source, "backbone", None)):
        if isinstance(size := getattr(model, "chunk_size", None), int):
            return size
    # The command line gives a factory, which is not called yet, and keeps its description.
    described: Any = module.hparams.get("backbone") or (None if source is None else source.described())
    arguments: Any = described.get("init_args") if described is not None and hasattr(described, "get") else None
    size = arguments.get("chunk_size") if arguments is not None and hasattr(arguments, "get") else None
    return size if isinstance(size, int) else None


def trainer_like(trainer: L.Trainer, *, precision: str | None = None) -> L.Trainer:
    """Make a Trainer on the devices of another Trainer, for work within the run of that Trainer.

    Args:
        trainer: The Trainer of the run.
        precision: The precision of the new Trainer. Default is that of `trainer`.

    Returns:
        A Trainer that only predicts.
    """
    return quiet_trainer(
        accelerator=type(trainer.accelerator)(),
        devices=_devices_of(trainer),
        num_nodes=trainer.num_nodes,
        # Encoders are small and frozen, so each rank holds a full copy, whatever the strategy of the training.
        strategy="ddp" if trainer.world_size > 1 else "auto",
        precision=precision or trainer.precision,
    )


def _devices_of(trainer: L.Trainer) -> int | list[int]:
    """Return which devices of this node a Trainer uses, as the argument `devices` of another one.

    A number alone would take the first ones. On a shared node these can be the devices of others.
    """
    strategy: Any = trainer.strategy
    devices = getattr(strategy, "parallel_devices", None) or [strategy.root_device]
    # Not `trainer.device_ids`, which mistakes device 0 in second place for device 1.
    indices = [index for device in devices if (index := getattr(device, "index", None)) is not None]
    return indices if len(indices) == len(devices) and devices[0].type != "cpu" else trainer.num_devices
