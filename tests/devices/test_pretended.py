"""The pretended GPU itself: what it refuses, what it counts, and what it lets pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.devices.pretended import GPU, PretendedGPU, WrongDevice


def gpu(*shape: int) -> Tensor:
    return torch.ones(shape, device=GPU)


@pytest.mark.parametrize(
    "mix",
    [
        lambda: gpu(2) + torch.ones(2),
        lambda: torch.cat([gpu(2), torch.ones(2)]),
        lambda: gpu(2, 2) @ torch.ones(2, 2),
        lambda: gpu(2, 2).index_select(0, torch.tensor([0])),
        lambda: torch.stack([gpu(), torch.ones(())]),
        lambda: torch.ones(3)[torch.zeros(1, dtype=torch.long, device=GPU)],
        lambda: gpu(2).numpy(),
        lambda: torch.ops.mkldnn._linear_pointwise(gpu(2, 2), gpu(2, 2), None, "none", [], ""),
        lambda: gpu(2).to("cpu", non_blocking=True),
    ],
)
def test_refuses_what_cuda_refuses(mix: Callable[[], Tensor]) -> None:
    with PretendedGPU(), pytest.raises(WrongDevice):
        mix()


def test_a_cpu_tensor_in_the_backward_pass_is_found() -> None:
    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * torch.ones(3)

    with PretendedGPU():
        x = gpu(3).requires_grad_()
        loss = Faulty.apply(x).sum()
        with pytest.raises(WrongDevice):
            loss.backward()


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: torch.tensor([1.0], device=x.device), 1),
        (lambda x: x.copy_(torch.ones(3)), 1),
        (lambda x: x[torch.tensor([0])], 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: torch.ones(3).to(x.device, non_blocking=True) + x, 0),
        (lambda x: torch.full((), 3.0, device=x.device) * x, 0),
        (lambda x: x * torch.tensor(2.0), 0),
        (lambda x: x.masked_fill(x > 0, 0).sum(), 0),
        (lambda x: torch.where(x > 0, x, 0)[:2] / 3, 0),
        (lambda x: x.to(torch.bfloat16).argsort(stable=True), 0),
        (lambda x: torch.arange(3, device=x.device).repeat_interleave(2), 0),
    ],
)
def test_counts_the_waits(work: Callable[[Tensor], object], waits: int) -> None:
    with PretendedGPU() as device:
        x = gpu(3)
        device.waits.clear()
        work(x)
        assert sum(device.waits.values()) == waits, device.waits


def test_gradients_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    x = torch.randn(2, 4)
    model(x).square().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with PretendedGPU() as device:
        model.to(GPU)
        assert all(parameter.is_cuda for parameter in model.parameters())
        model(x.to(GPU)).square().sum().backward()
        found = [parameter.grad for parameter in model.parameters()]
        assert all(device.has(gradient) for gradient in found if gradient is not None)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True) if a is not None and b is not None)
