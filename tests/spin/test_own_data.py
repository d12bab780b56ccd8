"""Loaders of the user, the published form with one generation per step, and the loss as functions of sequences."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_align import collate_ids, self_play_loss, spin_loss
from lightning_align.generation.sampler import generate
from lightning_align.references.update import ReferenceUpdate
from lightning_align.spin.batches import real_rows
from lightning_align.spin.callbacks import SelfPlayGeneration
from lightning_align.spin.generations import answer_ids
from lightning_align.spin.module import SPINModule
from tests.spin.runs import ADAM, GENERATION, finish, set_rows, start
from tests.toys import largest_difference, slow_logprobs, state_of, tiny_palm

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Ids(Dataset[tuple[Tensor, int]]):
    """Rows as those of the published trainer: ids and the length of the prompt."""

    def __init__(self, rows: int = 10, length: int | None = None) -> None:
        generator = torch.Generator().manual_seed(5)
        sizes = torch.randint(5, 9, (rows,), generator=generator).tolist()
        self.rows = [torch.randint(3, 200, (length or size,), generator=generator) for size in sizes]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.rows[index], 2 + index % 2


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Any:
        return (Ids()[index] for index in range(10))


def fit(
    folder: Path, loader: Any, validation: Any = None, *callbacks: Callback, path: Path | None = None, **module: Any
) -> Any:
    L.seed_everything(0, verbose=False)
    play = SelfPlayGeneration(iterations=2, epochs=1, folder=str(folder / "sets"))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[play, *callbacks],
    )
    made = SPINModule(tiny_palm(num_tokens=259), **{"optimizer": ADAM, "generation": GENERATION, **module})
    trainer.fit(made, loader, validation, ckpt_path=path)
    return trainer, made


class Batches(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((pl_module.iteration, pl_module.paired(batch, "train")))


LOADERS: dict[str, Any] = {
    "collate_ids": lambda: DataLoader(Ids(), batch_size=4, shuffle=True, collate_fn=collate_ids),
    "iterable": lambda: DataLoader(Stream(), batch_size=4, collate_fn=collate_ids),
    "default collate": lambda: DataLoader(Ids(length=7), batch_size=4, shuffle=True),
}


@pytest.mark.parametrize("name", LOADERS)
def test_each_iteration_answers_the_rows_of_a_loader(name: str, tmp_path: Path) -> None:
    watch = Batches()
    trainer, _ = fit(tmp_path, LOADERS[name](), DataLoader(Ids(4), batch_size=4, collate_fn=collate_ids), watch)
    assert trainer.global_step == 6
    assert {"val/loss", "val/rewards/margins", "val/rewards/accuracies", "val/nll"} <= trainer.callback_metrics.keys()
    source = Ids(length=7) if name == "default collate" else Ids()
    for iteration in range(2):
        stored = torch.load(tmp_path / "sets/iteration_1/start.ckpt", weights_only=True)["state_dict"] if iteration else None
        opponent = tiny_palm(num_tokens=259)
        if stored is not None:
            opponent.load_state_dict({k.removeprefix("policy."): v for k, v in stored.items() if k.startswith("policy.")})
        real = set()
        for _, both in (pair for pair in watch.seen if pair[0] == iteration):
            pairs, half = both["pairs"], len(both["opponent"]) // 2
            scored = slow_logprobs(opponent, pairs)[0]
            assert both["opponent"].tolist() == pytest.approx(scored, abs=1e-4)
            for row in range(half):
                ids = pairs["tokens"][row][pairs["mask"][row]].tolist()
                prompt = int(pairs["targets"][row].int().argmax())
                answer = pairs["tokens"][half + row][pairs["mask"][half + row]].tolist()
                assert answer[:prompt] == ids[:prompt]
                real.add((tuple(ids), prompt))
        assert real == {(tuple(ids.tolist()), prompt) for ids, prompt in source}  # type: ignore[attr-defined]
        # In iteration 1 each row is paired with its new and its replayed response.
        assert sum(len(both["opponent"]) // 2 for t, both in watch.seen if t == iteration) == 10 * (1 + iteration)
    rows = set_rows(tmp_path, 1)
    assert all([answer["iteration"] for answer in row["generated"]] == [1, 0] for row in rows)


def test_a_run_with_a_loader_resumes_from_its_boundary(tmp_path: Path) -> None:
    loader = DataLoader(Ids(), batch_size=4, collate_fn=collate_ids)
    trainer, module = fit(tmp_path, loader)
    resumed, again = fit(tmp_path, loader, path=tmp_path / "sets/iteration_1/start.ckpt")
    assert resumed.global_step == trainer.global_step == 6
    assert largest_difference(state_of(again.policy), state_of(module.policy)) == 0
    with pytest.raises(ValueError, match="was generated with other settings: `rows` was loader-"):
        fit(tmp_path, DataLoader(Ids(8), batch_size=4, collate_fn=collate_ids))


def test_rows_that_change_between_passes_raise(tmp_path: Path) -> None:
    class Random(Ids):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.randint(3, 200, (6,)), 2

    loader = DataLoader(Random(), batch_size=4, collate_fn=collate_ids)
    with pytest.raises(ValueError, match=r"has no generated response, .* Use `generate: per_step`"):
        fit(tmp_path, loader)
    trainer, _ = fit(tmp_path, loader, generate="per_step")
    assert trainer.global_step == 6


def test_an_end_token_without_a_tokenizer(tmp_path: Path) -> None:
    loader = DataLoader(Ids(), batch_size=4, collate_fn=collate_ids)
    config = type(GENERATION)(**{**vars(GENERATION), "max_new_tokens": 40, "eos_token": list(range(3, 120))})
    fit(tmp_path, loader, generation=config)
    answers = [answer for row in set_rows(tmp_path, 0) for answer in row["generated"]]
    assert {answer["reason"] for answer in answers} == {"eos"}
    assert all(3 <= answer["end"] < 120 and min(answer["tokens"], default=200) >= 0 for answer in answers)


# -- one generation per step


def test_validation_per_step_by_hand(tmp_path: Path) -> None:
    """Generated by the policy, scored by the opponent, which is the policy at the start of the iteration."""
    trainer, module = finish(tmp_path, generate="per_step", loop={"iterations": 2, "epochs": 1})
    data = trainer.datamodule  # type: ignore[attr-defined]
    opponent = module.opponent.player(module.policy)
    assert largest_difference(state_of(opponent), state_of(module.policy)) > 1e-3
    sums = {"loss": 0.0, "rewards/real": 0.0, "rewards/generated": 0.0, "rewards/accuracies": 0.0}
    for row in range(10):
        stored = data._store("validation")[row]
        ids, n = stored.sides[0].tokens.tolist(), stored.num_prompt
        (answer,) = generate(module.policy, [ids[:n]], GENERATION, ends=module.ends(), ids=[row], iteration=0)[0]
        rewards = []
        for tokens in (ids, ids[:n] + answer_ids(vars(answer))):
            targets = torch.arange(len(tokens))[None] >= n
            batch: Any = {"tokens": torch.tensor([tokens]), "mask": torch.ones_like(targets), "targets": targets}
            own, other = (slow_logprobs(model, batch)[0][0] for model in (module.policy, opponent))
            rewards.append(0.1 * (own - other))
        sums["loss"] += math.log1p(math.exp(rewards[1] - rewards[0]))
        sums["rewards/real"] += rewards[0]
        sums["rewards/generated"] += rewards[1]
        sums["rewards/accuracies"] += rewards[0] > rewards[1]
    for name, total in sums.items():
        assert float(trainer.callback_metrics[f"val/{name}"]) == pytest.approx(total / 10, abs=1e-4), name
    assert "val/nll" in trainer.callback_metrics
    # Outside of `fit` there are real responses only.
    (values,) = trainer.validate(module, datamodule=data, verbose=False)
    assert set(values) == {"val/nll", "val/perplexity", "val/bits_per_byte"}


@pytest.mark.parametrize("mode", ["per_step", "per_iteration"])
def test_the_callback_replaces_the_rule_of_the_average(mode: str, tmp_path: Path) -> None:
    """Every second step, copies until step 3, then a decay of 0.75."""
    policies: list[dict[str, Tensor]] = []

    class Watch(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            policies.append(state_of(pl_module.policy))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            policies.append({name: value.clone() for name, value in state_of(pl_module.policy).items()})

    rule = ReferenceUpdate(alpha=0.25, every=2, update_after_step=3)
    loop = {"iterations": 2, "epochs": 1, "replay": 0}
    _, module = finish(tmp_path, rule, Watch(), generate=mode, opponent="ema", loop=loop)
    assert len(policies) == 7
    expected = {name: value.double() for name, value in policies[2].items()}
    for step in (4, 6):
        expected = {name: 0.75 * value + 0.25 * policies[step][name].double() for name, value in expected.items()}
    player = module.opponent.player(module.policy)
    assert largest_difference(state_of(player), expected) < 1e-6
    trainer, module, data = start(tmp_path / "none", ReferenceUpdate())
    with pytest.raises(ValueError, match=r"the reference of SPINModule is a NoneType, .* Set `opponent: ema`"):
        trainer.fit(module, data)


# -- rows of ids


def test_rows_of_ids_by_hand() -> None:
    batch = collate_ids([(torch.tensor([5, 6, 7]), 1), ([8, 9, -1, -1], torch.tensor(1))], pad_id=3)
    assert batch["tokens"].tolist() == [[5, 6, 7], [8, 9, 3]]
    assert batch["mask"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["targets"].tolist() == [[False, True, True], [False, True, False]]
    same = real_rows([torch.tensor([[5, 6, 7], [8, 9, -1]]), torch.tensor([1, 1])])
    assert same["tokens"].tolist() == [[5, 6, 7], [8, 9, 0]] and torch.equal(same["targets"], batch["targets"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([torch.tensor([1, 2])], "Row 0 must be a pair of ids and the length of the prompt, but got a Tensor"),
        ([([1.0, 2.0], 1)], r"The ids of row 0 must be integers of shape \(N,\)"),
        ([([[1, 2]], 1)], r"but have shape \(1, 2\)"),
        ([([1, -1, 2], 1)], "must not be negative except at its end"),
        ([([1, 2], 0)], "must have at least 1 id and leave at least 1 for the response, but it has 0 of 2"),
        ([([1, 2, -1], 2)], "but it has 2 of 2"),
        ([], "The batch has no rows"),
    ],
)
def test_rows_of_another_form_raise(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate_ids(rows)


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ({"input_ids": torch.ones(1, 2)}, "a dictionary of input_ids"),
        (torch.ones(1, 2), "a Tensor"),
        ((torch.ones(2).long(), torch.ones(2).long()), "a tuple"),
    ],
)
def test_batches_of_another_form_raise(batch: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"but got {got}. Use SPINDataModule, or DataLoader"):
        real_rows(batch)


# -- the loss as functions


def test_the_loss_of_log_probs_by_hand() -> None:
    """b [(-1 + 2) - (-4 + 3)] = 0.5 * 2 = 1, and log(1 + exp(-1)) = 0.313262."""
    one = [torch.tensor([value]) for value in (-1.0, -4.0, -2.0, -3.0)]
    assert float(spin_loss(*one, beta=0.5)) == pytest.approx(0.313262, abs=1e-6)
    assert float(spin_loss(*one, beta=0.5, loss="exponential")) == pytest.approx(math.exp(-1), abs=1e-6)
    lengths = {"real_lengths": torch.tensor([2]), "generated_lengths": torch.tensor([4])}
    # b (1 / 2 + 1 / 4) = 0.375.
    assert float(spin_loss(*one, beta=0.5, loss="sigmoid_norm", **lengths)) == pytest.approx(math.log1p(math.exp(-0.375)))
    with pytest.raises(ValueError, match="`real_lengths` and `generated_lengths` must be given for the sigmoid_norm loss"):
        spin_loss(*one, loss="sigmoid_norm")


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "hinge", "exponential", "correlation"])
def test_the_loss_of_two_sequences(loss: Any) -> None:
    policy, opponent = tiny_palm(dtype=torch.float64), tiny_palm(dtype=torch.float64, seed=1)
    real = torch.tensor([[3, 4, 5, 6], [7, 8, 9, -1]])
    generated = torch.tensor([[3, 4, 10, 11, 12], [7, 13, -1, -1, -1]])
    prompts = torch.tensor([2, 1])
    losses = self_play_loss(policy, opponent, real, generated, prompts, loss=loss, beta=0.3)
    expected = []
    for row in range(2):
        scores = []
        for side in (real, generated):
            ids = side[row][side[row] >= 0][None]
            targets = torch.arange(ids.shape[1])[None] >= prompts[row]
            batch: Any = {"tokens": ids, "mask": torch.ones_like(targets), "targets": targets}
            ratio = slow_logprobs(policy, batch)[0][0] - slow_logprobs(opponent, batch)[0][0]
            scores.append(ratio / (int(targets.sum()) if loss == "sigmoid_norm" else 1))
        t = 0.3 * (scores[0] - scores[1])
        expected.append(
            {"hinge": max(0.0, 1 - t), "exponential": math.exp(-t), "correlation": 1 - t}.get(loss, math.log1p(math.exp(-t)))
        )
    assert losses.tolist() == pytest.approx(expected, rel=1e-9)
    losses.sum().backward()
    assert all(weight.grad is not None for weight in policy.parameters())
    assert all(weight.grad is None for weight in opponent.parameters())
    # A policy that is its own opponent has ratios of 0.
    same = self_play_loss(policy, policy, real, generated, prompts, loss=loss)
    assert same.tolist() == pytest.approx([math.log(2) if "sigmoid" in loss else 1.0] * 2)
