"""Log-probs from 16-bit inputs: logits and sums are in float32, on a CPU and on a device with wide products."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.models.language_model import Head
from lightning_align.scoring import collisions, head, products
from lightning_align.scoring.head import head_logprobs

ROWS, WIDTH, VOCABULARY = 96, 64, 1500


@pytest.fixture(params=["converts", "rounds", "wide"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the CPU be slow or fast with bfloat16, or a device whose `torch.mm` reads 16 bits and writes float32."""
    kind: str = request.param
    monkeypatch.setattr(products, "rounds_gradients", lambda device, dtype: kind == "rounds" and dtype is torch.bfloat16)
    if kind == "wide":
        real = torch.mm

        def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
            assert a.dtype is b.dtype
            if out_dtype is None:
                assert a.dtype.itemsize >= 4, "a product that rounds its result to 16 bits"
                return real(a, b, out=out)
            assert a.dtype.itemsize == 2 and out_dtype is torch.float32 and out is None
            return real(a.float(), b.float())

        monkeypatch.setattr(torch, "mm", mm)
        monkeypatch.setattr(products, "has_wide_products", lambda device, dtype: dtype.itemsize == 2)
        monkeypatch.setattr(head, "has_wide_products", lambda device, dtype: dtype.itemsize == 2)
    return kind


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs whose logits are up to about 10, where a bfloat16 number is exact to 1/32."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.25).to(dtype)
    bias = torch.randn(VOCABULARY, generator=generator).to(dtype)
    targets = (hidden.float() @ weight.float().T + bias.float()).topk(4, dim=1).indices[:, 3]
    return hidden, weight, bias, targets


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_rounding_of_float32_is_left(
    dtype: torch.dtype, keep_bytes: int, softcap: float | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 at the same inputs. A product that is rounded to bfloat16 is off by 0.01 nats and more."""
    monkeypatch.setattr(head, "KEEP_BYTES", keep_bytes)
    given, wide = inputs(dtype), [x.double().requires_grad_() for x in inputs(dtype)[:3]]
    logits = wide[0] @ wide[1].T + wide[2]
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    exact = logits.log_softmax(1).gather(1, given[3][:, None]).squeeze(1)
    hidden, weight, bias = (x.requires_grad_() for x in given[:3])
    result = head_logprobs(hidden, weight, bias, given[3], softcap=softcap, chunk_bytes=4 * 40 * 500)
    assert result.dtype is torch.float32
    error = (result.double() - exact).detach()
    # A logit of 10 is a sum of 64 products in float32, whose steps are 1e-6 there. Measured: 5e-7 and 2e-6.
    assert float(error.square().mean().sqrt()) < 1e-6 and float(error.abs().max()) < 4e-6

    upstream = torch.randn(ROWS, generator=torch.Generator().manual_seed(1))
    exact.backward(upstream.double())
    result.backward(upstream)
    # A gradient is rounded once, to the dtype of its parameter. A device with wide products also rounds the probabilities and
    # the scaled hidden states, which are factors of products. A fast CPU also rounds the products.
    eps = torch.finfo(dtype).eps
    for got, want in zip((hidden.grad, weight.grad, bias.grad), (x.grad for x in wide), strict=True):
        assert got is not None and want is not None and got.dtype is dtype
        error = (got.double() - want).abs()
        tiny = 1e-7 * float(want.abs().max()) + torch.finfo(dtype).smallest_normal
        if device == "converts":
            assert bool((error <= 0.51 * eps * want.abs() + 10 * tiny).all())
        else:
            assert float(error.norm() / want.norm()) < eps


def test_under_autocast_gradients_of_float32_parameters_are_not_rounded(device: str) -> None:
    """The factors are rounded to bfloat16, but neither the result nor its sum over positions is."""
    hidden, weight, _, targets = (x.float() if x.is_floating_point() else x for x in inputs(torch.bfloat16))
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    (wide[0] @ wide[1].T).log_softmax(1).gather(1, targets[:, None]).sum().backward()
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        head_logprobs(hidden, weight, None, targets).sum().backward()  # the backward pass within autocast, too
    bound = 1e-5 if device == "converts" else 2**-8
    for got, want in zip((hidden.grad, weight.grad), (x.grad for x in wide), strict=True):
        assert got is not None and want is not None and got.dtype is torch.float32
        assert float((got.double() - want).norm() / want.norm()) < bound


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_collisions_have_the_same_logits(dtype: torch.dtype, bias: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 40 * 500)
    hidden, weight, b, _ = inputs(dtype)
    layer = Head(weight, b if bias else None, softcap=20.0)
    logps = Head(*(None if x is None else x.double() for x in layer[:2]), softcap=20.0).logits(hidden.double()).log_softmax(1)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        result = collisions._head_collisions(hidden, layer, dtype)
    assert result.dtype is torch.float32
    torch.testing.assert_close(result.double(), (2 * logps).logsumexp(1), rtol=0, atol=1e-5)


def test_a_device_without_wide_products_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise NotImplementedError("Could not run 'aten::mm.dtype'")

    monkeypatch.setattr(products, "_wide", {})
    monkeypatch.setattr(torch, "mm", refuse)
    assert not products.has_wide_products("meta", torch.bfloat16)
    assert not products.has_wide_products("cpu", torch.bfloat16)
    assert not products.has_wide_products("meta", torch.float32)
