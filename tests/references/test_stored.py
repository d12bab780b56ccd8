"""Stored log-probs of a reference: what finds them again and what does not, and what a crash costs."""

import functools
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_align.dpo.batch import concatenate
from lightning_align.dpo.datamodule import DPODataModule
from lightning_align.dpo.module import DPOModule
from lightning_align.models.lora import LoRAConfig
from lightning_align.references.frozen import frozen_copy
from lightning_align.references.stored import StoredLogProbs, row_keys
from lightning_align.scoring.ratios import tail_weights
from lightning_align.types import LogProbs, TokenBatch
from tests.toys import largest_difference, preference_batch, rows_of, split, state_of, tiny_palm, token_batch

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

SGD = functools.partial(torch.optim.SGD, lr=0.05)
BATCH = token_batch([2, 3, 1, 2, 1, 1], [4, 1, 5, 2, 2, 3])
CPU = torch.device("cpu")


class Counted:
    """A source that counts the rows it scores, and may break down."""

    def __init__(self, model: nn.Module, *, most: int = 10**9) -> None:
        self.reference, self.rows, self.most = frozen_copy(model), 0, most

    def __call__(self, policy: nn.Module, batch: TokenBatch) -> LogProbs:
        if self.rows >= self.most:
            raise KeyboardInterrupt
        self.rows += len(batch["tokens"])
        return self.reference.logprobs(policy, batch)


def stored(folder: Path, source: Any, *, weights: str = "w", precision: str = "32-true", shard_rows: int = 2) -> StoredLogProbs:
    return StoredLogProbs(source, weights=weights, precision=precision, cache_dir=folder, shard_rows=shard_rows)


def singles(batch: TokenBatch = BATCH) -> Iterator[TokenBatch]:
    yield from (rows_of(batch, row, row + 1) for row in range(len(batch["tokens"])))


def test_what_is_stored_is_what_the_reference_says(tmp_path: Path) -> None:
    model = tiny_palm()
    source = Counted(model)
    first = stored(tmp_path, source)
    assert first.fill([BATCH], model, CPU) == 6
    expected = frozen_copy(model).logprobs(model, BATCH)
    first.finish()
    again = stored(tmp_path, source)
    for reference in (first, again):
        result = reference.logprobs(model, BATCH)
        assert torch.equal(result.sums, expected.sums) and torch.equal(result.counts, expected.counts)
    assert again.fill(singles(), model, CPU) == 0 and source.rows == 6
    # In any order, of any width.
    order = torch.tensor([4, 0, 5])
    wide: Any = {name: nn.functional.pad(BATCH[name], (0, 3))[order] for name in ("tokens", "mask", "targets")}  # type: ignore[literal-required]
    assert torch.equal(again.logprobs(model, wide).sums, expected.sums[order])


def test_whatever_changes_a_number_makes_another_name(tmp_path: Path) -> None:
    model = tiny_palm()
    first = stored(tmp_path, Counted(model))
    first.fill([BATCH], model, CPU)
    assert len(stored(tmp_path, Counted(model), weights="v")) == 0
    assert len(stored(tmp_path, Counted(model), precision="bf16-mixed")) == 0
    keys = set(row_keys(BATCH))
    assert len(keys) == 6
    shorter = {**BATCH, "mask": BATCH["mask"] & (BATCH["mask"].flip(1).cumsum(1).flip(1) > 1)}
    shorter["targets"] = BATCH["targets"] & shorter["mask"]
    moved = {**BATCH, "targets": BATCH["targets"].roll(-1, 1)}
    other = {**BATCH, "tokens": BATCH["tokens"] + BATCH["targets"]}
    weighted = {**BATCH, "target_weights": tail_weights(BATCH["targets"], 0.5)}
    for changed in (shorter, moved, other, weighted):
        assert keys.isdisjoint(row_keys(changed))  # type: ignore[arg-type]
    half, third = (row_keys({**BATCH, "target_weights": tail_weights(BATCH["targets"], a)}) for a in (0.5, 1 / 3))  # type: ignore[typeddict-item]
    assert half != third


def test_a_crash_costs_a_shard_at_most(tmp_path: Path) -> None:
    model = tiny_palm()
    if (process := os.fork()) == 0:
        try:
            found = stored(tmp_path, Counted(model, most=5))
            found._write = lambda: os._exit(0) if len(found) == 5 else StoredLogProbs._write(found)  # type: ignore[method-assign]
            found.fill(singles(), model, CPU)
        finally:
            os._exit(1)
    assert os.waitpid(process, 0)[1] == 0
    again = Counted(model)
    after = stored(tmp_path, again)
    assert len(after) == 4  # two shards of two rows; the fifth row was in no shard yet
    assert after.fill(singles(), model, CPU) == again.rows == 2
    assert len(stored(tmp_path, again)) == 6


def test_an_interrupt_costs_nothing(tmp_path: Path) -> None:
    model, again = tiny_palm(), Counted(tiny_palm())
    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path, Counted(model, most=5)).fill(singles(), model, CPU)
    assert stored(tmp_path, again).fill(singles(), model, CPU) == again.rows == 1


class Nodes:
    """A team of two threads, one for each node."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.values, self.barrier = rank, values, barrier

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait(30)
        found = list(self.values)
        self.barrier.wait(30)
        return found


@pytest.mark.parametrize("shared", [True, False])
def test_nodes_with_folders_of_their_own_exchange_what_they_scored(shared: bool, tmp_path: Path) -> None:
    """Each of two nodes scores half of the rows, and then finds all of them."""
    model, values, barrier = tiny_palm(), [None, None], threading.Barrier(2)
    folders = [tmp_path / ("0" if shared else str(rank)) for rank in range(2)]
    nodes = [stored(folder, Counted(model)) for folder in folders]
    for rank, node in enumerate(nodes):
        node.fill(list(singles())[rank::2], model, CPU)

    def exchange(rank: int) -> None:
        team: Any = Nodes(rank, values, barrier)
        nodes[rank].exchange(team)
        nodes[rank].finish()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(exchange, range(2)))
    expected = frozen_copy(model).logprobs(model, BATCH)
    for node in nodes:
        found = node.find(BATCH)
        assert found is not None and len(node) == 6
        torch.testing.assert_close(found.sums, expected.sums)


def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    model = tiny_palm()
    first = stored(tmp_path, Counted(model))
    first.fill(singles(), model, CPU)
    shards = sorted(first.folder.glob("*.safetensors"))
    assert len(shards) == 3 and (first.folder / "manifest.json").is_file()
    content = bytearray(shards[0].read_bytes())
    content[-1] ^= 1
    shards[0].write_bytes(content)
    shards[1].write_bytes(content[:50])
    with pytest.warns(UserWarning, match="Its rows will be scored again"):
        after = stored(tmp_path, Counted(model))
    assert len(after) == 2


def test_a_row_that_came_later_is_named(tmp_path: Path) -> None:
    model = tiny_palm()
    reference = stored(tmp_path, Counted(model))
    reference.fill([rows_of(BATCH, 0, 3)], model, CPU)
    assert reference.logprobs(model, BATCH).sums.shape == (6,)  # the model is still there
    reference.finish()
    with pytest.raises(ValueError, match="was not among the rows at the start of training"):
        reference.logprobs(model, BATCH)


def test_a_model_that_can_be_made_again_is_for_the_rows_that_are_missing_alone(tmp_path: Path) -> None:
    model, made = tiny_palm(), []

    def again() -> Any:
        made.append(Counted(model))
        return made[-1]

    reference = StoredLogProbs(Counted(model), again=again, weights="w", precision="32-true", cache_dir=tmp_path)
    reference.fill([rows_of(BATCH, 0, 3)], model, CPU)
    reference.rest()
    assert reference.source is not None, "only `finish` frees the first one"
    reference.finish()
    reference.logprobs(model, rows_of(BATCH, 0, 3))
    assert reference.fill([rows_of(BATCH, 0, 3)], model, CPU) == 0 and not made
    expected = frozen_copy(model).logprobs(model, BATCH)
    for _ in range(2):
        assert torch.equal(reference.logprobs(model, BATCH).sums, expected.sums)
    assert len(made) == 1
    reference.rest()
    assert reference.source is None


# -- in a run


def trainer(folder: Path, **arguments: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "default_root_dir": folder}
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 2, "enable_checkpointing": False, **quiet, **arguments})


def loader() -> DataLoader[Any]:
    return DataLoader(split(preference_batch(8), 2), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


class Spy:
    """Counts the forward passes of a frozen copy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        real = StoredLogProbs.fill

        def fill(stored: StoredLogProbs, *args: Any, **given: Any) -> int:
            done = real(stored, *args, **given)
            self.rows += done
            return done

        monkeypatch.setattr(StoredLogProbs, "fill", fill)


def run(folder: Path, *, kind: Any = "stored", backbone: Any = None, **given: Any) -> DPOModule:
    cache = {"reference": kind, "reference_cache": str(folder / "cache")}
    module = DPOModule(backbone or tiny_palm(), optimizer=SGD, **{**cache, **given})
    trainer(folder).fit(module, loader(), loader())
    return module


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_a_run_is_the_one_with_a_live_reference(lora: Any, tmp_path: Path) -> None:
    states, metrics = [], []
    for kind in ("frozen", "stored"):
        torch.manual_seed(0)
        module = run(tmp_path, kind=kind, lora=lora)
        states.append(state_of(module.policy))
        metrics.append({name: float(value) for name, value in module.trainer.callback_metrics.items()})
    assert largest_difference(*states) < 1e-6
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5)
    assert module.reference.source is None  # type: ignore[attr-defined]  # no second model is left


def test_a_sweep_scores_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    for beta in (0.05, 0.1, 0.5, 1.0, 5.0):
        run(tmp_path, beta=beta)
    assert spy.rows == 16
    run(tmp_path, loss={"ipo": 1.0, "sigmoid": 2.0}, sft_weight=0.5)
    run(tmp_path, lora=LoRAConfig(rank=2))  # the same base
    assert spy.rows == 16
    run(tmp_path, backbone=tiny_palm(seed=1))
    assert spy.rows == 32
    run(tmp_path, ld_alpha=0.5)
    assert spy.rows == 48


@pytest.mark.filterwarnings("ignore:.*rows lost the end of their response")  # that is what is tested
def test_rows_that_were_cut_elsewhere_are_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+1=", "chosen": "a" * 20 + str(i), "rejected": "b" * 20 + str(i)} for i in range(10)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{row}\n" for row in map(json.dumps, rows)))
    spy = Spy(monkeypatch)
    for length in (20, 16, 20):
        data = DPODataModule(str(path), max_length=length, batch_size=4, cache_dir="cache")
        module = DPOModule(tiny_palm(num_tokens=259), optimizer=SGD, reference="stored", reference_cache="cache")
        trainer(tmp_path).fit(module, data)
    assert spy.rows == 40


def test_a_checkpoint_written_over_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    for seed, total in ((0, 16), (0, 16), (1, 32)):
        torch.save(tiny_palm(seed=seed).state_dict(), tmp_path / "base.pt")
        run(tmp_path, backbone=tiny_palm, init_from=str(tmp_path / "base.pt"))
        assert spy.rows == total


def others() -> DataLoader[Any]:
    return DataLoader(split(preference_batch(6, seed=3), 2), batch_size=None)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:the first batch, where the policy should still equal its reference")  # of a second fit
@pytest.mark.parametrize("kind", ["file", "lora", "module"])
def test_stages_after_the_training_bring_other_rows(kind: str, tmp_path: Path) -> None:
    """Test rows, rows that `limit_val_batches` left out, and a second fit; the answers are those of a live reference."""
    torch.save(tiny_palm().state_dict(), tmp_path / "base.pt")
    given: dict[str, Any] = {"backbone": tiny_palm, "init_from": str(tmp_path / "base.pt")} if kind == "file" else {}
    given |= {"lora": LoRAConfig(rank=2)} if kind == "lora" else {}
    values: list[Any] = []
    for reference in ("frozen", "stored"):
        torch.manual_seed(0)
        module = run(tmp_path, kind=reference, **given)
        if reference == "stored" and kind == "module":
            with pytest.raises(ValueError, match=r"no log-probs for a row of `test`.* a file \(`init_from`\)"):
                trainer(tmp_path).test(module, others(), verbose=False)
            module.train()  # which a stage that failed does not do
            trainer(tmp_path, max_epochs=1).fit(module, loader(), loader())  # all of these rows are known
            return
        values += trainer(tmp_path).test(module, others(), verbose=False)
        assert reference == "frozen" or module.reference.source is None  # type: ignore[attr-defined]
        values += trainer(tmp_path).validate(module, others(), verbose=False)
        trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(module, others(), others())
        values.append({name: float(value) for name, value in module.trainer.callback_metrics.items()})
        assert reference == "frozen" or module.reference.source is None  # type: ignore[attr-defined]
    for live, found in zip(values[:3], values[3:], strict=True):
        assert found == pytest.approx(live, abs=1e-5)


def test_validation_alone_needs_no_pass(tmp_path: Path) -> None:
    module = DPOModule(tiny_palm(), reference="stored", reference_cache=str(tmp_path / "cache"))
    (values,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    assert values["val/rewards/margins"] == 0
    assert not (tmp_path / "cache").exists()


def test_rows_may_bring_their_own(tmp_path: Path) -> None:
    """A batch with ``reference`` is not scored: here one in which the reference gives chosen rows a nat less."""
    batch = preference_batch(4)
    live = frozen_copy(tiny_palm()).logprobs(tiny_palm(), concatenate(batch))
    batch["reference"] = LogProbs(live.sums - torch.tensor([1.0] * 4 + [0.0] * 4), live.counts)
    data: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    (values,) = trainer(tmp_path).validate(DPOModule(tiny_palm(), beta=0.5), data, verbose=False)
    assert values["val/rewards/chosen"] == pytest.approx(0.5) and values["val/rewards/rejected"] == pytest.approx(0, abs=1e-5)
