"""A loop without a Trainer takes the optimizer steps of a Trainer, for every method."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_align import Augment, CALMModule, DPOModule, RETROModule, SFTModule, SPINModule
from lightning_align.training.module import AlignModule
from tests.distributed import by_hand as by_hand_ranks
from tests.distributed.harness import launch
from tests.retro.toys import tiny_retro, tokens_and_neighbors
from tests.toys import preference_batch, tiny_palm, token_batch

ACCUMULATED = 2


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.5)


def rows(number: int) -> Any:
    return token_batch([2, 3, 1], [3 + number, 2, 4], seed=number)


def pairs(number: int) -> Any:
    return preference_batch(2 + number, seed=number)


def played(number: int) -> Any:
    batch = preference_batch(2 + number, seed=number)
    sides = (batch["chosen"], batch["rejected"])
    width = max(side["tokens"].shape[1] for side in sides)
    both = {
        name: torch.cat([nn.functional.pad(side[name], (0, width - side["tokens"].shape[1])) for side in sides])
        for name in ("tokens", "mask", "targets")
    }
    return {"pairs": both, "opponent": -torch.arange(2.0 * (2 + number))}


def palm(dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    return tiny_palm(dtype=dtype, **options)


def retrieved(number: int) -> Any:
    batch = rows(number)
    _, neighbors = tokens_and_neighbors(*batch["tokens"].shape, seed=number)
    return {**batch, "neighbors": neighbors, "controls": {}}


METHODS: dict[str, tuple[Callable[[], AlignModule], Callable[[int], Any]]] = {
    "sft": (lambda: SFTModule(palm(), optimizer=sgd), rows),
    "dpo": (lambda: DPOModule(palm(), optimizer=sgd, beta=0.5), pairs),
    "spin": (lambda: SPINModule(palm(), optimizer=sgd), played),
    "retro": (lambda: RETROModule(tiny_retro(dtype=torch.float64), optimizer=sgd, vary_neighbors=False), retrieved),
    "calm": (lambda: CALMModule(palm(), Augment(palm(seed=1), num_connections=1), optimizer=sgd), rows),
}


def batches(make: Callable[[int], Any]) -> list[Any]:
    """Micro-batches of unequal sizes, so that a mean of means would differ."""
    return [make(number) for number in (0, 2, 1, 3)]


def by_trainer(module: AlignModule, data: list[Any], folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    module.configure_model()
    trainer = L.Trainer(
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATED,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    loader: Any = DataLoader(data, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    trainer.fit(module, loader, loader)
    assert trainer.global_step == 2
    return module.policy.state_dict()


def loss_of(output: Any) -> torch.Tensor:
    loss: torch.Tensor = output["loss"] if isinstance(output, dict) else output
    return loss


def by_hand(module: AlignModule, data: list[Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    module.configure_model()
    module.double()
    optimizer = sgd([p for p in module.policy.parameters() if p.requires_grad])
    for start in range(0, len(data), ACCUMULATED):
        for index, batch in enumerate(data[start : start + ACCUMULATED]):
            loss_of(module.training_step(batch, start + index)).backward()
        module.average_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return module.policy.state_dict()


def by_fabric(module: AlignModule, data: list[Any]) -> dict[str, Any]:
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="64-true")
    torch.manual_seed(0)
    module.configure_model()
    optimizer = sgd([p for p in module.policy.parameters() if p.requires_grad])
    wrapped, optimizer = fabric.setup(module, optimizer)
    for start in range(0, len(data), ACCUMULATED):
        for index, batch in enumerate(data[start : start + ACCUMULATED]):
            fabric.backward(loss_of(wrapped.training_step(batch, start + index)))
        module.average_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return module.policy.state_dict()


@pytest.mark.parametrize("loop", [by_hand, by_fabric])
@pytest.mark.parametrize("method", METHODS)
def test_a_loop_without_a_trainer_takes_the_steps_of_a_trainer(method: str, loop: Any, tmp_path: Path) -> None:
    make, batch = METHODS[method]
    expected = by_trainer(make(), batches(batch), tmp_path)
    module = make()
    found = loop(module, batches(batch))
    torch.manual_seed(0)
    untrained = make()
    untrained.configure_model()
    before = untrained.policy.state_dict()
    assert any(not torch.equal(expected[name], before[name].double()) for name in expected), "something was trained"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.distributed
def test_two_ranks_of_fabric_take_the_steps_of_a_trainer(tmp_path: Path) -> None:
    launch(Path(by_hand_ranks.__file__), str(tmp_path))
    expected = by_trainer(METHODS["dpo"][0](), batches(pairs), tmp_path)
    found = torch.load(tmp_path / "policy.pt", weights_only=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_validation_by_hand_fills_the_metrics() -> None:
    module = SFTModule(palm())
    module.configure_model()
    with torch.no_grad():
        for index, batch in enumerate(batches(rows)):
            module.validation_step(batch, index)
    total = sum(float(module.training_step(batch, 0).detach()) for batch in batches(rows))
    count = sum(int(batch["targets"].sum()) for batch in batches(rows))
    assert float(module.val_nll.compute()["loss"]) == pytest.approx(total / count, rel=1e-6)
    module.on_validation_epoch_end()  # logs nothing, and resets
    assert float(module.val_nll.tokens) == 0


def test_dropout_is_off_for_pairs_until_the_gradients_are_averaged() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.drop = palm(torch.float32), nn.Dropout(0.5)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.drop(self.inner(tokens))
            return logits

    module = DPOModule(Noisy(), optimizer=sgd)
    module.configure_model()
    module.train()
    loss = loss_of(module.training_step(pairs(0), 0))
    assert float(loss.detach()) == pytest.approx(2 * torch.tensor(2.0).log().item(), abs=1e-5), "policy and reference are equal"
    loss.backward()
    assert not module.policy.training
    module.average_gradients(sgd(module.policy.parameters()))
    assert module.policy.training and module.policy.drop.training


@pytest.mark.parametrize(
    ("make", "batch", "message"),
    [
        (lambda: DPOModule(palm(), reference="stored"), pairs, "`reference` is 'stored', which needs a Trainer"),
        (lambda: DPOModule(palm(), reference="moving"), pairs, "`reference` is 'moving', which needs a Trainer"),
        (lambda: SPINModule(palm()), rows, "needs a Trainer, whose callback SelfPlayGeneration"),
        (
            lambda: CALMModule(palm(), Augment(palm(), num_connections=1), store_states="x"),
            rows,
            "`store_states` needs a Trainer",
        ),
    ],
)
def test_what_needs_a_trainer_says_so(make: Any, batch: Any, message: str) -> None:
    module = make()
    with pytest.raises(ValueError, match="has no policy yet"):
        module.training_step(batch(0), 0)
    module.configure_model()
    with pytest.raises(ValueError, match=message):
        module.training_step(batch(0), 0)


def test_a_trainer_averages_by_itself(tmp_path: Path) -> None:
    module = SFTModule(palm(torch.float32), optimizer=sgd)
    by_trainer(module, batches(rows), tmp_path)
    with pytest.raises(ValueError, match="loop without a Trainer only"):
        module.average_gradients(sgd(module.policy.parameters()))


def test_the_stand_in_names_what_only_a_trainer_has() -> None:
    module = SFTModule(palm())
    with pytest.raises(RuntimeError, match=r"SFTModule needs a Trainer for this, because it uses `trainer\.strategy`"):
        _ = module.trainer.strategy
