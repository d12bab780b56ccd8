"""The callback that has the retrieval database ready before the data are needed."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
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
from lightning_align.retro.indexing import build_database, quiet_trainer
from lightning_align.runtime.lightning_internals import reload_interval


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
            The Trainer's reload_dataloaders_every_n_epochs must divide it. A checkpoint keeps which generation it was trained
            on, so that a run that goes on from it, or evaluates it, finds the same neighbors; to `predict`, which encodes what
            is written on the way, the database is built with the policy of the checkpoint.
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
        self._refreshed: dict[str, Any] | None = None
        """What was built of the policy last: after how many ``epochs``, and the ``head`` of the database."""

    @property
    def state_key(self) -> str:
        """Of its own for each database, of which a run may have several."""
        return self._generate_state_key(database=self.database)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Build what is missing. In evaluation a database that was refreshed stays as it is.

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
        if stage != "fit" and self.refresh_every_n_epochs and self._is_refreshed():
            return
        self._refreshed = None
        self._build(trainer, encoder)

    def state_dict(self) -> dict[str, Any]:
        """Which generation of the database the run is on, if the policy was its encoder."""
        return {} if self._refreshed is None else dict(self._refreshed)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go back to the database that the checkpoint's run was on; if it is gone, build it with the checkpoint's policy."""
        every = self.refresh_every_n_epochs
        if not every:
            return
        state = checkpoint["callbacks"].get(self.state_key) or {"epochs": 0, "head": None}
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {})
        # Epochs whose end has come: checkpoints are written after the refresh of an epoch's end, or else before the end.
        done = progress.get("current", {}).get("processed", checkpoint.get("epoch", 0))
        fits, due = trainer.state.fn == "fit", done - done % every
        if not fits and state["head"] is None:
            return
        wanted = max(due, state["epochs"]) if fits else state["epochs"]
        if trainer.state.fn == "predict":
            self._refresh(trainer, pl_module, done)
        elif wanted:
            # What was built after the last epoch that a run was to have is not in its checkpoint: nothing was to read it.
            kept = state["epochs"] == wanted and self._is_of_now(state["head"])
            whole = kept and publish_head(Path(self.database), state["head"], verify=self._settings["verify"] > 0)
            if whole:
                self._refreshed = state
                return
            if wanted != done:
                rank_zero_warn(
                    f"{self.database} no longer has what was built of the policy after epoch {wanted}, or was changed: it "
                    f"is built with the policy after epoch {done}, so the run does not go on to the bit"
                )
            self._refresh(trainer, pl_module, done)

    def _is_of_now(self, head: Mapping[str, Any]) -> bool:
        """Whether a former generation has the documents and settings of the present one: what was deleted stays deleted."""

        def settings(one: Mapping[str, Any]) -> Any:
            queries = {name: stages["chunks"] for name, stages in one["queries"].items()}
            made_with = {name: value for name, value in one["made_with"].items() if name != "encoder"}
            return one["stages"]["chunks"], one["deleted"], one["retriever"], made_with, queries

        return bool(settings(head) == settings(RetrievalDatabase.open(self.database).manifest))

    def _is_refreshed(self) -> bool:
        """Whether the encoder of the database was an object, as a policy is."""
        try:
            head = RetrievalDatabase.open(self.database).manifest
        except ValueError:
            return False
        return head["encoder"] is not None and head["made_with"]["encoder"] is None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Build again with the policy as it is now, if this is the epoch for it."""
        every = self.refresh_every_n_epochs
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if every and (trainer.current_epoch + 1) % every == 0 and not last:
            self._refresh(trainer, pl_module, trainer.current_epoch + 1)

    def _refresh(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> None:
        policy: nn.Module = pl_module.policy  # type: ignore[assignment]  # every module of the suite has one
        # It trains on: the Trainer that encodes must neither move it nor take it into evaluation mode for good.
        database = self._build(trainer, LMEncoder(policy, fingerprint=weights_hash(policy), borrowed=True))
        self._refreshed = {"epochs": epochs, "head": database.manifest}

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
        reload = reload_interval(trainer)
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
