"""A composition without padding: its hidden states and gradients are those of padded rows."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_align.calm.connections import ConnectionConfig
from lightning_align.calm.model import CALM
from lightning_align.calm.spec import Augment, AugmentInput
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.unpadded import Unpadded
from lightning_align.models.varlen import Segments
from tests.calm.toys import composed, connect, gpt2
from tests.models.test_varlen import reference_varlen_attn
from tests.scoring.test_shared_prefix import GROUPS, compare
from tests.toys import VOCABULARY, tiny_palm, token_batch

CPU = torch.device("cpu")
BATCH = token_batch([3, 2, 5, 1], [4, 6, 1, 2])
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def unpadded() -> Unpadded:
    return Unpadded.of(BATCH["tokens"], BATCH["mask"], Segments.of_lengths(BATCH["mask"].sum(1).tolist(), CPU))


def gradients(model: CALM, hidden: Tensor) -> list[Tensor]:
    """The gradients of the connections, from (T, D) hidden states."""
    model.zero_grad()
    (hidden * torch.arange(hidden.numel(), dtype=hidden.dtype).view_as(hidden).cos()).sum().backward()
    found = [parameter.grad for parameter in model.connections.parameters()]
    return [gradient.clone() for gradient in found if gradient is not None]


def check(model: CALM, *, kernel: str = "groups", inputs: Any = None) -> None:
    expected = unpadded().select(model.hidden(BATCH["tokens"], inputs=inputs))
    slow = gradients(model, expected)
    choose = lambda *_, dropout: kernel  # noqa: E731
    modules = ("calm.unpadded", "models.palm_unpadded", "models.pretrained_unpadded")
    patches = [mock.patch(f"lightning_align.{module}.choose_kernel", choose) for module in modules]
    with mock.patch("torch.nn.attention.varlen.varlen_attn", reference_varlen_attn), patches[0], patches[1], patches[2]:
        assert model.longest_unpadded(CPU) is not None
        found = model.unpadded_hidden(unpadded(), inputs=inputs)
        fast = gradients(model, found)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert len(fast) == len(slow) and len(fast) > 3
    for one, other in zip(slow, fast, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-11 * max(1.0, float(one.abs().max())))


@pytest.mark.parametrize("kernel", ["groups", "varlen"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"combine": "sum", "connections": [(1, 2), (4, 2), (2, 3)]},
        {"gradient_checkpointing": True},
        {"connection": ConnectionConfig(heads=2, dim_head=8, gate=True, qk_norm=True, rotary=False)},
    ],
)
def test_a_composition_equals_its_padded_rows(kernel: str, options: dict[str, Any]) -> None:
    check(composed(**options), kernel=kernel)


def test_stored_states_are_packed() -> None:
    model = composed()
    states = model.readers[0].read(BATCH["tokens"], None, None, None)
    given = AugmentInput(BATCH["tokens"], states=[states[depth] for depth in model.depths(0)])
    with mock.patch.object(model.readers[0], "read", None):
        check(model, inputs=[given])


def test_models_of_transformers_are_composed_without_padding() -> None:
    torch.manual_seed(0)
    anchor, augment = PretrainedLM(config=LLAMA).double(), tiny_palm(depth=4, dtype=torch.float64, seed=1)
    check(connect(CALM(anchor, Augment(augment, num_connections=2), connection=ConnectionConfig(heads=2))), kernel="varlen")
    anchor, augment = augment, anchor
    check(connect(CALM(anchor, Augment(augment, num_connections=2), connection=ConnectionConfig(heads=2))))


def test_lengths_of_their_own_are_padded() -> None:
    assert composed(alignment="prefix", num_connections=2).longest_unpadded(CPU) is None
    model = composed()
    assert model.longest_unpadded(CPU) is not None
    with model.tracing(maps=True):
        assert model.longest_unpadded(CPU) is None
    bare = connect(CALM(tiny_palm(), Augment(gpt2(), num_connections=1), connection=ConnectionConfig(heads=2)))
    assert bare.longest_unpadded(CPU) is None


@pytest.mark.parametrize("batch", ["pairs", "four answers", "an answer that begins another"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_rows_that_share_beginnings_equal_separate_rows(batch: str, dtype: torch.dtype, tolerance: float) -> None:
    """In the anchor, in the augment and in the connections: log-probs and the gradients of the connections."""
    compare(composed(dtype), GROUPS[batch], tolerance)
