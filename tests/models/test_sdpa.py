"""On a CPU, attention runs in float32 where the products run in 16 bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_align import CALM, RETRO, Augment, PretrainedLM
from lightning_align.models.sdpa import dot_product_attention
from lightning_align.retro.model import NeighborTokens
from lightning_align.scoring.sums import response_logprobs
from tests.models.test_pretrained import FAMILIES
from tests.models.test_pretrained import batch as rows
from tests.toys import largest_difference, tiny_palm, token_batch


def llama(*, checkpointing: bool = False) -> PretrainedLM:
    torch.manual_seed(0)
    return PretrainedLM(config={"model_type": "llama", **FAMILIES["llama"]}, gradient_checkpointing=checkpointing)


def loss_of(model: nn.Module) -> Tensor:
    batch: Any = rows() if isinstance(model, PretrainedLM) else token_batch([3, 2, 4], [4, 6, 2])
    if isinstance(model, RETRO):
        found = torch.randint(1, 23, (3, 2, 2, 8), generator=torch.Generator().manual_seed(0))
        neighbors = NeighborTokens(found, torch.ones_like(found, dtype=torch.bool))
        return model.hidden(batch["tokens"], neighbors=neighbors).float().square().mean()
    if isinstance(model, CALM):
        logits: Tensor = model(batch["tokens"])
        return logits.float().square().mean()
    return -response_logprobs(model, batch).sums.sum()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "palm": tiny_palm,
    "llama": llama,
    "retro": lambda: RETRO(tiny_palm(), chunk_size=4, encoder_depth=1, heads=2),
    "calm": lambda: CALM(tiny_palm(), Augment(tiny_palm(seed=1, dim=8), every=1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_attends_in_float32_under_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, bool]] = []
    kernel = F.scaled_dot_product_attention

    def spy(q: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return kernel(q, *args, **options)

    model = MODELS[name]()
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert seen
    assert set(seen) == {(torch.float32, False)}


def gradients(model: nn.Module, *, mixed: bool) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        loss = loss_of(model)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_recomputed_layers_of_transformers_have_the_same_gradient() -> None:
    once, twice = (gradients(llama(checkpointing=checkpointing), mixed=True) for checkpointing in (False, True))
    assert largest_difference(once, twice) == 0
    full = gradients(llama(), mixed=False)
    assert 0 < largest_difference(once, full) < 0.1 * max(float(value.abs().max()) for value in full.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
def test_the_output_is_that_of_exact_attention_rounded_once(dtype: torch.dtype, added: bool) -> None:
    q, k, v = (torch.randn(2, 3, 17, 8).to(dtype) for _ in range(3))
    visible = torch.ones(17, 17, dtype=torch.bool).tril()
    mask = torch.zeros(17, 17).masked_fill(~visible, -torch.inf).to(dtype) if added else visible
    found = dot_product_attention(q, k, v, attn_mask=mask)
    logits = (q.double() @ k.double().mT / 8**0.5).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(found, (logits.softmax(-1) @ v.double()).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert found.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_and_single_queries_are_left_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(q: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(q.dtype)
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q = torch.randn(1, 1, 3, 8, dtype=dtype)
    dot_product_attention(q, q, q)
    one = torch.randn(1, 1, 1, 8, dtype=torch.bfloat16)  # decoding, where reading the keys is the cost
    dot_product_attention(one, one, one)
    assert seen == [dtype, torch.bfloat16]
