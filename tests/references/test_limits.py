"""A stored reference scores what the run will see, as the limits of the Trainer say, and other rows when they come."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_align.dpo.datamodule import DPODataModule
from lightning_align.dpo.module import DPOModule
from lightning_align.references.frozen import FrozenCopy
from lightning_align.references.stored import StoredLogProbs
from tests.toys import preference_batch, split, state_of, tiny_palm
from tests.training.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

SGD = functools.partial(torch.optim.SGD, lr=0.05)


class Endless(IterableDataset[Any]):
    """Batches again and again."""

    def __init__(self) -> None:
        self.batches, self.given = split(preference_batch(6), 2), 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            for batch in self.batches:
                self.given += 1
                yield batch


class Scored:
    """Counts the batches that are scored before the training, and all that the reference scores."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead, self.rows = 0, 0
        fill, logprobs = StoredLogProbs.fill, FrozenCopy.logprobs

        def counted(stored: Any, batches: Any, *args: Any, **options: Any) -> int:
            def each() -> Iterator[Any]:
                for batch in batches:
                    self.ahead += 1
                    yield batch

            return fill(stored, each(), *args, **options)

        def scored(frozen: Any, policy: Any, batch: Any) -> Any:
            self.rows += len(batch["tokens"])
            return logprobs(frozen, policy, batch)

        monkeypatch.setattr(StoredLogProbs, "fill", counted)
        monkeypatch.setattr(FrozenCopy, "logprobs", scored)


def module(folder: Path, reference: str = "stored") -> DPOModule:
    return DPOModule(
        tiny_palm(num_tokens=259),
        optimizer=SGD,
        reference=reference,  # type: ignore[arg-type]
        reference_cache=str(folder / "cache"),
    )


def data(folder: Path, *, rows: int = 24) -> DPODataModule:
    content = [{"prompt": f"{i}", "chosen": "a" * (1 + i % 5), "rejected": "b" * (1 + i % 3)} for i in range(rows)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return DPODataModule(str(path), validation=str(path), batch_size=2, cache_dir=str(folder / "cache"))


LIMITS: dict[str, tuple[dict[str, Any], int]] = {
    # The options of the Trainer, and the number of batches that are scored before the training.
    "none": ({"max_epochs": 1}, 12 + 12),
    "batches": ({"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1}, 3 + 1),
    "shares": ({"max_epochs": 1, "limit_train_batches": 0.5, "limit_val_batches": 0.25}, 6 + 3),
    "epochs": ({"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 0}, 3),
    "steps": ({"max_epochs": -1, "max_steps": 2, "accumulate_grad_batches": 2, "limit_val_batches": 0}, 4),
    "long": ({"max_epochs": -1, "max_steps": 15, "limit_val_batches": 0}, 12),
}


@pytest.mark.parametrize("name", LIMITS)
def test_no_more_is_scored_than_the_limits_let_through(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, expected = LIMITS[name]
    live = module(tmp_path, "frozen")
    trainer(tmp_path, num_sanity_val_steps=0, **options).fit(live, data(tmp_path))
    scored = Scored(monkeypatch)
    subject = module(tmp_path)
    run = trainer(tmp_path, num_sanity_val_steps=0, **options)
    run.fit(subject, data(tmp_path))
    assert scored.ahead == expected
    for key, value in state_of(live.policy).items():
        torch.testing.assert_close(state_of(subject.policy)[key], value, rtol=1e-4, atol=1e-6)
    source = subject.reference.source  # type: ignore[attr-defined]
    # Other rows come in the second epoch, so the model has to stay.
    assert (source is None) == (name != "epochs")


def test_rows_without_an_end_are_scored_up_to_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored, rows, subject = Scored(monkeypatch), Endless(), module(tmp_path)
    trainer(tmp_path, max_epochs=-1, max_steps=5).fit(subject, DataLoader(rows, batch_size=None))
    assert scored.ahead == 5 and scored.rows == 12  # three batches of two pairs, each scored once
    assert rows.given <= 5 + 5 + 1  # Lightning fetches one ahead


def test_rows_without_an_end_or_a_limit_are_scored_when_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.should_stop = batch_idx == 3

    scored, subject = Scored(monkeypatch), module(tmp_path)
    trainer(tmp_path, max_epochs=-1, callbacks=[Stop()]).fit(subject, DataLoader(Endless(), batch_size=None))
    assert scored.ahead == 0 and scored.rows == 12
    # They are stored: a second run scores none.
    again = module(tmp_path)
    trainer(tmp_path, max_epochs=-1, callbacks=[Stop()]).fit(again, DataLoader(Endless(), batch_size=None))
    assert scored.rows == 12


def test_an_accumulation_that_grows_takes_rows_that_were_not_scored_before(tmp_path: Path) -> None:
    grows = GradientAccumulationScheduler({0: 1, 1: 3})
    subject = module(tmp_path)
    trainer(tmp_path, max_epochs=-1, max_steps=4, limit_train_batches=3, callbacks=[grows]).fit(subject, data(tmp_path))
    assert subject.trainer.global_step == 4
