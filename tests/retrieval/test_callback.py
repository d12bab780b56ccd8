import contextlib
import json
import shutil
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_align.cli import run
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retro.callbacks import RetrievalIndexing
from lightning_align.retro.indexing import build_database, delete_documents, open_retriever
from lightning_align.sft.module import SFTModule
from tests.distributed.index import checkpoint
from tests.retrieval.helpers import Listed, texts, write_folder
from tests.toys import tiny_palm, token_batch


class Reads(L.LightningDataModule):
    """Opens the database when its loader is created, as a data module should."""

    def __init__(self, folder, *, tokenizer_name="bytes"):
        super().__init__()
        self.folder, self.tokenizer_name, self.seen = folder, tokenizer_name, []

    def train_dataloader(self):
        database = RetrievalDatabase.open(self.folder)
        self.seen.append((database.manifest["encoder"], np.array(database.neighbors.ids)))
        return self.val_dataloader()

    def val_dataloader(self):
        return DataLoader([token_batch([2], [3])] * 2, batch_size=None)


def trainer_of(indexing, *callbacks, **options):
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet = dict.fromkeys(names, False) | {"limit_val_batches": 0}
    return L.Trainer(accelerator="cpu", callbacks=[indexing, *callbacks], **(quiet | {"max_epochs": 1} | options))


def indexing_of(folder, **options):
    settings = {"documents": Listed(texts(6)), "chunk_size": 32, "k": 2, "encoder": "bm25"}
    return RetrievalIndexing(str(folder), **(settings | options))


def test_database_is_built_before_the_loader(tmp_path):
    data = Reads(tmp_path / "db")
    trainer_of(indexing_of(tmp_path / "db")).fit(SFTModule(tiny_palm()), data)
    assert len(data.seen) == 1 and data.seen[0][1].shape[1] == 2


def test_a_forced_rebuild_is_for_fit_and_the_cap_holds(tmp_path):
    folder = tmp_path / "db"

    def inodes():
        stages = RetrievalDatabase.open(folder).manifest["stages"]
        return {name: (folder / path / "manifest.json").stat().st_ino for name, path in stages.items()}

    for fn, rebuild, again in (("fit", False, set()), ("fit", True, {"lexical", "neighbors"}), ("validate", True, set())):
        before = inodes() if folder.exists() else {}
        trainer = trainer_of(indexing_of(folder, rebuild=rebuild), limit_val_batches=1)
        getattr(trainer, fn)(SFTModule(tiny_palm()), datamodule=Reads(folder))
        assert {name for name, inode in before.items() if inodes()[name] != inode} == again
    with pytest.raises(ValueError, match="at most `max_chunks` chunks, 3, but they have"):
        trainer_of(indexing_of(folder, max_chunks=3)).fit(SFTModule(tiny_palm()), Reads(folder))


def test_database_is_refreshed_with_the_current_policy(tmp_path):
    data = Reads(tmp_path / "db")
    indexing = indexing_of(tmp_path / "db", encoder=checkpoint(tmp_path / "e.ckpt"), refresh_every_n_epochs=2)
    module = SFTModule(tiny_palm(num_tokens=259))
    trainer_of(indexing, max_epochs=4, reload_dataloaders_every_n_epochs=1).fit(module, data)
    encoders = [encoder for encoder, _ in data.seen]
    assert len(data.seen) == 4 and encoders[0] == encoders[1] != encoders[2] == encoders[3]
    assert module.policy.training
    for message, options in (
        ("would keep the old neighbors", {}),
        ("but got 2 and 3", {"reload_dataloaders_every_n_epochs": 3}),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(indexing, **options).fit(SFTModule(tiny_palm(num_tokens=259)), data)


class Stop(L.Callback):
    """Stops a run at the beginning of an epoch, as a kill would."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("how", ["stages kept", "stages gone", "ended before"])
def test_resumed_run_has_the_neighbors_of_an_uninterrupted_run(tmp_path, every, how):
    encoder = checkpoint(tmp_path / "e.ckpt")

    def fit(name, *, epochs=4, stop=None, resume=None):
        folder = tmp_path / name
        data = Reads(folder / "db")
        saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        indexing = indexing_of(folder / "db", encoder=encoder, refresh_every_n_epochs=every)
        options = {"max_epochs": epochs, "reload_dataloaders_every_n_epochs": 1, "enable_checkpointing": True}
        trainer = trainer_of(indexing, saving, *([] if stop is None else [Stop(stop)]), **options)
        torch.manual_seed(0)
        with contextlib.suppress(SystemExit):
            trainer.fit(SFTModule(tiny_palm(num_tokens=259)), data, ckpt_path=resume, weights_only=resume and False)
        return data.seen

    whole = fit("whole")
    if how == "ended before":
        fit("cut", epochs=2)
    else:
        fit("cut", stop=2)
        if how == "stages gone":
            shutil.rmtree(tmp_path / "cut" / "db")
    resumed = fit("cut", resume=tmp_path / "cut" / "epoch=1.ckpt")
    assert [encoder for encoder, _ in resumed] == [encoder for encoder, _ in whole[2:]]
    for (_, ids), (_, expected) in zip(resumed, whole[2:], strict=True):
        assert np.array_equal(ids, expected)
    assert whole[0][0] != whole[2][0] and len(whole) == 4
    # Evaluation of a checkpoint keeps the database that it was trained on.
    folder = tmp_path / "cut" / "db"
    indexing = indexing_of(folder, encoder=encoder, refresh_every_n_epochs=every)
    evaluation = trainer_of(indexing, ModelCheckpoint(folder.parent), enable_checkpointing=True, limit_val_batches=1)
    evaluation.validate(
        SFTModule(tiny_palm(num_tokens=259)), Reads(folder), ckpt_path=tmp_path / "cut" / "epoch=3.ckpt", weights_only=False
    )
    assert RetrievalDatabase.open(folder).manifest["encoder"] == whole[3][0]


def test_documents_deleted_after_a_checkpoint_stay_deleted(tmp_path):
    encoder, folder = checkpoint(tmp_path / "e.ckpt"), tmp_path / "db"

    def fit(resume=None):
        indexing = indexing_of(folder, encoder=encoder, refresh_every_n_epochs=1)
        options = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1, "enable_checkpointing": True}
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = trainer_of(indexing, saving, **options)
        trainer.fit(SFTModule(tiny_palm(num_tokens=259)), Reads(folder), ckpt_path=resume, weights_only=resume and False)

    fit()
    build_database(folder, Listed(texts(6)), encoder=encoder, chunk_size=32, k=2)
    delete_documents(folder, ["d2"])
    fit(tmp_path / "epoch=1.ckpt")
    head = RetrievalDatabase.open(folder).manifest
    assert head["deleted"] == [2] and head["made_with"]["encoder"] is None


def test_missing_arguments_raise(tmp_path):
    with pytest.raises(ValueError, match="`encoder` is required"):
        trainer_of(indexing_of(tmp_path / "db", encoder=None)).fit(SFTModule(tiny_palm()), Reads(tmp_path / "db"))
    with pytest.raises(ValueError, match="`tokenizer` is required"):
        trainer_of(indexing_of(tmp_path / "db")).fit(SFTModule(tiny_palm()), Reads(tmp_path / "db", tokenizer_name=None))
    with pytest.raises(ValueError, match="`refresh_every_n_epochs` must be 0 or more, but got -1"):
        indexing_of(tmp_path / "db", refresh_every_n_epochs=-1)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-align"])
    write_folder(tmp_path / "corpus", {f"{name}.txt": text for name, text in texts(8).items()})
    Path("rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    encoder = checkpoint(tmp_path / "e.ckpt")
    Path("index.yaml").write_text(
        f"""
trainer:
  accelerator: cpu
  max_steps: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: RetrievalIndexing
      init_args:
        database: db
        documents: {{class_path: FolderDocuments, init_args: {{folder: corpus, part: train}}}}
        queries:
          validation: {{class_path: FolderDocuments, init_args: {{folder: corpus, part: held_out, held_out: 0.4}}}}
        encoder: {encoder}
        chunk_size: 32
        k: 2
        index: {{factory: Flat}}
model:
  class_path: SFTModule
  init_args: {{backbone: {{class_path: lightning_align.PaLM, init_args: {{num_tokens: 259, dim: 8, depth: 1}}}}}}
data:
  class_path: SFTDataModule
  init_args: {{train: rows.jsonl, max_length: 8}}
"""
    )
    run(["fit", "--config", "index.yaml"])
    database = RetrievalDatabase.open("db")
    assert database.neighbors.mask.all() and len(database.queries("validation").chunks) > 0
    # The encoder is loaded again from what the database stores about it.
    found = open_retriever("db").search([database.chunks.chunk(4)], 1)
    assert found.ids.tolist() == [[4]]
