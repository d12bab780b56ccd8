"""What loaders add for a device, and batches of loaders that do not."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_align.dpo.batch import concatenate
from lightning_align.models.unpadded import first_true
from lightning_align.scoring.ratios import tail_weights
from lightning_align.scoring.sums import response_logprobs
from lightning_align.scoring.targets import select_targets
from lightning_align.training.loading import count_targets, for_device
from lightning_align.types import TokenBatch
from tests.devices.cases import responses, sft
from tests.devices.pretended import GPU, PretendedGPU, pretended_trainer
from tests.toys import preference_batch, tiny_palm, token_batch


def moved(batch: Any) -> Any:
    return {name: value.to(GPU, non_blocking=True) if isinstance(value, Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize("seed", range(4))
def test_counted_targets_are_found_in_order(seed: int) -> None:
    flags = torch.rand(50, generator=torch.Generator().manual_seed(seed)) < 0.3
    assert torch.equal(first_true(flags, int(flags.sum())), flags.nonzero().squeeze(1))


@pytest.mark.parametrize("counted", [True, False])
def test_scores_are_the_same_with_and_without_the_count(counted: bool) -> None:
    model = tiny_palm()
    pairs: Any = preference_batch(3)
    batch: TokenBatch = concatenate(count_targets(pairs))
    weights = tail_weights(batch["targets"], 0.5)
    expected = response_logprobs(model, {**batch, "target_weights": weights})
    plain = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    with PretendedGPU() as device:
        model.to(GPU)
        given = moved({**(batch if counted else plain), "target_weights": weights})
        device.waits.clear()
        found = response_logprobs(model, given)
        waits = sum(device.waits.values())
        sums, counts = found.sums.cpu(), found.counts.cpu()
    assert waits == (0 if counted else 1)
    assert torch.equal(counts, expected.counts)
    torch.testing.assert_close(sums, expected.sums)


def test_targets_that_changed_after_they_were_counted_are_noticed() -> None:
    with PretendedGPU():
        batch = moved(count_targets(token_batch([2, 2], [3, 1])))
        batch["targets"] = batch["mask"] & (torch.arange(5, device=GPU) > 0)
        with pytest.raises(RuntimeError):
            select_targets(batch)


def test_batches_are_pinned_for_a_gpu(tmp_path: Path) -> None:
    responses(tmp_path)
    with PretendedGPU(), mock.patch("torch.accelerator.is_available", lambda: True):
        options = for_device(pretended_trainer(), {"batch_size": None, "collate_fn": None})
    assert options["pin_memory"] is True
    batch = token_batch([2], [3])
    assert options["collate_fn"](batch)["num_targets"] == 3 and options["collate_fn"]([1, 2]) == [1, 2]
    assert for_device(None, {"batch_size": None}) == {"batch_size": None}


def test_the_progress_bar_of_a_gpu_shows_the_loss_where_it_is_logged(tmp_path: Path) -> None:
    with PretendedGPU():
        module, data, _ = sft(tmp_path)
        trainer = pretended_trainer(max_epochs=1, log_every_n_steps=2, default_root_dir=tmp_path)
        trainer.fit(module, datamodule=data)
        assert trainer.progress_bar_metrics["train/loss"] > 0
