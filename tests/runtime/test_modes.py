"""Tests that a block of evaluation mode leaves each submodule and the gradients as they were."""

import pytest
import torch
from torch import nn

from lightning_align.runtime.modes import evaluating


def mixed() -> tuple[nn.Sequential, list[bool]]:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model[0].eval()
    model[1][1].eval()  # type: ignore[index]
    return model, [module.training for module in model.modules()]


@pytest.mark.parametrize("gradients", [False, True])
def test_modes_and_gradients_are_restored_after_an_error(gradients: bool) -> None:
    model, before = mixed()
    assert before == [True, False, True, True, False]
    with pytest.raises(RuntimeError, match="inside"), evaluating(model, gradients=gradients) as modes:
        assert not any(module.training for module in model.modules())
        assert torch.is_grad_enabled() is gradients
        assert list(modes.values()) == before
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_gradients_that_are_off_stay_off() -> None:
    model, _ = mixed()
    with torch.no_grad(), evaluating(model, gradients=True):
        assert not torch.is_grad_enabled()
