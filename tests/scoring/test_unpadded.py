"""Rows without padding: log-probs and gradients are those of the padded rows, with every kernel."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lightning_align.dpo.batch import concatenate
from lightning_align.models import unpadded
from lightning_align.models.language_model import has_hidden, logits_of
from lightning_align.models.lora import LoRAConfig, add_lora, lora_disabled, train_only
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.unpadded import Unpadded, has_unpadded, unpadded_batch
from lightning_align.models.varlen import Segments
from lightning_align.scoring.collisions import response_collisions
from lightning_align.scoring.sums import response_logprobs
from lightning_align.scoring.targets import host_counts
from lightning_align.spin.opponent import GeometricMixture, Scoped, score
from lightning_align.types import TokenBatch
from tests.devices.pretended import GPU, PretendedGPU
from tests.models.test_documents import packed_and_alone
from tests.models.test_varlen import reference_varlen_attn
from tests.toys import VOCABULARY, Plain, preference_batch, tiny_palm, token_batch

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}


@contextmanager
def as_on_a_device(kernel: str) -> Iterator[list[Tensor]]:
    """Take the way of a device for tensors of a CPU, with a kernel. Yields the tokens that were computed without padding."""
    seen: list[Tensor] = []

    def found(model: nn.Module, batch: TokenBatch) -> Unpadded | None:
        lengths = host_counts(batch)["lengths"]
        if not has_unpadded(model, CPU, max(lengths)):
            return None
        seen.append(batch["tokens"])
        return Unpadded.of(batch["tokens"], batch["mask"], Segments.of_lengths(lengths, CPU))

    with (
        mock.patch("lightning_align.models.shared_rows.unpadded_batch", found),
        mock.patch("lightning_align.models.palm_unpadded.choose_kernel", lambda *_, dropout: "groups" if dropout else kernel),
        mock.patch("lightning_align.models.pretrained_unpadded.choose_kernel", lambda *_, dropout: kernel),
        mock.patch("torch.nn.attention.varlen.varlen_attn", reference_varlen_attn),
    ):
        yield seen


def padded(model: nn.Module, batch: TokenBatch) -> list[Tensor]:
    """The sums and all gradients of whole padded rows, from their logits."""

    def sums() -> Tensor:
        logps = logits_of(model, batch["tokens"]).log_softmax(-1)[:, :-1].gather(2, batch["tokens"][:, 1:, None]).squeeze(2)
        return logps.where(batch["targets"][:, 1:], 0).sum(1)

    return values_and_gradients(model, sums)


def scored(model: nn.Module, batch: TokenBatch) -> list[Tensor]:
    return values_and_gradients(model, lambda: response_logprobs(model, batch).sums)


def values_and_gradients(model: nn.Module, function: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    sums = function()
    weights = torch.arange(1, len(sums) + 1, dtype=sums.dtype).cos()
    (sums * weights).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]
    return [sums.detach(), *gradients]


def compare(model: nn.Module, batch: TokenBatch, tolerance: float, *, kernel: str = "groups", used: bool = True) -> None:
    expected = padded(model, batch)
    with as_on_a_device(kernel) as seen:
        found = scored(model, batch)
    assert bool(seen) == used
    scale = max(1.0, *(float(x.abs().max()) for x in expected))
    for one, other in zip(expected, found, strict=True):
        assert float((one - other).abs().max()) <= tolerance * scale


BATCH = token_batch([3, 2, 5, 1], [4, 9, 1, 2])
VARIANTS: list[dict[str, Any]] = [{}, {"variant": "paper"}, {"xpos": False, "tie_embeddings": False}, {"qk_rmsnorm": True}]


@pytest.mark.parametrize("overrides", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kernel", ["groups", "varlen"])
def test_palm_equals_its_padded_rows(overrides: dict[str, Any], dtype: torch.dtype, tolerance: float, kernel: str) -> None:
    compare(tiny_palm(dtype=dtype, **overrides), BATCH, tolerance, kernel=kernel)
    compare(tiny_palm(dtype=dtype, **overrides), concatenate(preference_batch(4)), tolerance, kernel=kernel)


@pytest.mark.parametrize("kernel", ["groups", "varlen"])
def test_adapters_and_their_reference_equal_their_padded_rows(kernel: str) -> None:
    model = tiny_palm(dtype=torch.float64)
    add_lora(model, LoRAConfig(rank=2))
    train_only(model, "default")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    compare(model.double(), BATCH, 1e-12, kernel=kernel)
    with torch.no_grad(), lora_disabled(model):
        expected = response_logprobs(model, BATCH).sums
        with as_on_a_device(kernel) as seen:
            found = response_logprobs(model, BATCH).sums
    assert seen
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_opponents_equal_their_padded_rows() -> None:
    model, other = tiny_palm(dtype=torch.float64), tiny_palm(dtype=torch.float64, seed=3)
    add_lora(model, LoRAConfig(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.double()
    for opponent in (Scoped(model), GeometricMixture(model, Scoped(model), 0.3), GeometricMixture(model, other, 0.3)):
        expected = score(opponent, BATCH)
        with as_on_a_device("varlen") as seen:
            found = score(opponent, BATCH)
        assert seen
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not has_unpadded(GeometricMixture(model, pretrained("mamba", state_size=4, vocab_size=VOCABULARY), 0.3), CPU, 9)


@pytest.mark.parametrize("kernel", ["groups", "varlen"])
def test_packed_rows_equal_each_row_alone(kernel: str) -> None:
    model = tiny_palm(dtype=torch.float64)
    packed, rows = packed_and_alone()
    expected = padded(model, rows)
    with as_on_a_device(kernel) as seen:
        found = scored(model, packed)
    assert seen
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-11)


def test_collisions_equal_those_of_padded_rows() -> None:
    model = tiny_palm(dtype=torch.float64)
    expected = response_collisions(model, BATCH)
    with as_on_a_device("varlen") as seen:
        found = response_collisions(model, BATCH)
    assert seen
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def pretrained(family: str, **more: Any) -> PretrainedLM:
    torch.manual_seed(0)
    return PretrainedLM(config={"model_type": family, **SIZES, **more})


# Gemma computes norms in float32 in any dtype.
EXACT = {"llama": 1e-12, "qwen3": 1e-12, "mistral": 1e-12, "gpt_neox": 1e-12, "gemma3_text": 1e-6, "opt": 1e-12}
# Learned positions, an embedding that is narrower than the layers, and dropout, which would draw other numbers.
MORE: dict[str, dict[str, Any]] = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0}}


@pytest.mark.parametrize("family", EXACT)
def test_models_of_transformers_equal_their_padded_rows(family: str) -> None:
    batch = token_batch([3, 2, 5, 1], [4, 9, 1, 2], vocabulary=96)
    more = MORE.get(family, {})
    compare(pretrained(family, **more).double(), batch, EXACT[family], kernel="varlen")
    compare(pretrained(family, **more), batch, 1e-5)


def test_checkpointed_layers_equal_their_padded_rows() -> None:
    model = PretrainedLM(config={"model_type": "llama", **SIZES}, gradient_checkpointing=True).double()
    model.train()
    compare(model, token_batch([3, 2, 5], [4, 9, 1], vocabulary=96), 1e-12, kernel="varlen")


REFUSED: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8},  # caps its scores
    "bloom": {"n_layer": 2, "n_head": 4},  # its positions (ALiBi) ignore documents
    "mamba": {"state_size": 4},  # its state ignores documents
}


@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.filterwarnings("ignore")  # transformers recommends faster kernels
def test_models_that_cannot_be_computed_without_padding_are_padded(family: str) -> None:
    more = {**REFUSED[family]}
    model = pretrained(family, **more)
    before = model.model.config._attn_implementation
    compare(model, token_batch([3, 2, 5, 1], [4, 9, 1, 2], vocabulary=96), 1e-5, used=False)
    assert model.model.config._attn_implementation == before
    assert model.longest_unpadded(CPU) is None


def test_a_sliding_window_limits_the_documents() -> None:
    model = pretrained("mistral", sliding_window=64)
    assert model.longest_unpadded(CPU) == 64
    assert has_unpadded(model, CPU, 64) and not has_unpadded(model, CPU, 65)


def test_the_way_is_told_once_and_leaves_no_trace(caplog: Any) -> None:
    model = pretrained("llama")
    with caplog.at_level("INFO"):
        assert model.longest_unpadded(CPU) and model.longest_unpadded(CPU)
    told = [record.message for record in caplog.records if "padding" in record.message]
    assert told == ["LlamaForCausalLM: Rows are computed without their padding."]
    assert "lightning_align" not in model.model.config.to_json_string()
    again = copy.deepcopy(model)
    tokens = BATCH["tokens"]
    assert torch.equal(again.hidden(tokens), model.hidden(tokens))
    # Padded rows, with and without a mask, are as before.
    plain = pretrained("llama")
    torch.testing.assert_close(model.hidden(tokens), plain.hidden(tokens))
    torch.testing.assert_close(model.hidden(tokens, mask=BATCH["mask"]), plain.hidden(tokens, mask=BATCH["mask"]))


def test_a_batch_on_a_device_is_computed_without_padding_and_without_waiting() -> None:
    model = tiny_palm()
    expected = response_logprobs(model, BATCH)
    computed = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: computed.append(tuple(args[0].shape)))
    with PretendedGPU() as device:
        model.to(GPU)
        counts = host_counts(BATCH)
        batch: Any = {name: value.to(GPU) for name, value in BATCH.items() if isinstance(value, Tensor)} | counts
        device.waits.clear()
        found = response_logprobs(model, batch)
        found.sums.sum().backward()
        assert not device.waits
        sums = found.sums.cpu()
        assert unpadded_batch(Plain(model), batch) is None  # type: ignore[arg-type]
        assert not has_hidden(Plain(model))
    assert computed == [(int(BATCH["mask"].sum()), 16)]
    torch.testing.assert_close(sums, expected.sums)


def test_rows_without_padding_are_not_packed() -> None:
    batch = token_batch([3, 2], [4, 5])
    with PretendedGPU():
        model = tiny_palm().to(GPU)
        moved: Any = {name: value.to(GPU) for name, value in batch.items() if isinstance(value, Tensor)} | host_counts(batch)
        assert unpadded_batch(model, moved) is None


def test_lengths_of_another_batch_are_noticed() -> None:
    with pytest.raises(RuntimeError):
        Unpadded.of(BATCH["tokens"], BATCH["mask"], Segments.of_lengths([7, 11, 6, 4], CPU))


def test_the_index_of_tokens_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    tokens = torch.arange(9).view(3, 3)
    packed = Unpadded.of(tokens, mask, Segments.of_lengths([2, 1, 3], CPU))
    assert packed.tokens.tolist() == [0, 1, 3, 6, 7, 8]
    assert packed.positions.tolist() == [0, 1, 0, 0, 1, 2]
    assert packed.index(torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2])).tolist() == [1, 2, 5]
    assert packed.padded(packed.tokens[:, None] + 1)[..., 0].tolist() == [[1, 2, 0], [4, 0, 0], [7, 8, 9]]
    assert unpadded.first_true(mask.flatten(), 6).tolist() == [0, 1, 3, 6, 7, 8]
