"""Mixed precision casts weights and cache once per generation, and the logits stay the same bits."""

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_align.generation.casting import casts_kept
from lightning_align.generation.decoder import make_decoder
from lightning_align.generation.sampler import GenerationConfig, evaluating, generate
from lightning_align.models.lora import LoRAConfig, add_lora, train_only
from lightning_align.spin.opponent import GeometricMixture
from tests.toys import state_of, tiny_palm

CPU = torch.device("cpu")
PROMPTS = [[1 + (row + i) % 7 for i in range(8 + row % 2)] for row in range(4)]


def bf16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


class Traffic(TorchDispatchMode):
    """Counts the numbers that are cast to bfloat16 or concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "aten::cat" or (name == "aten::_to_copy" and out.dtype is torch.bfloat16 is not args[0].dtype):
            self.numbers += out.numel()
        return out


def adapters() -> nn.Module:
    model = tiny_palm(dim=64, num_tokens=256)
    add_lora(model, LoRAConfig(rank=2))
    train_only(model, "default")
    return model


MODELS = {
    "trained": lambda: tiny_palm(dim=64, num_tokens=256),
    "frozen": lambda: tiny_palm(dim=64, num_tokens=256).requires_grad_(False),
    "norms of queries and keys": lambda: tiny_palm(dim=64, num_tokens=256, qk_rmsnorm=True).requires_grad_(False),
    "adapters": adapters,
    "mixture": lambda: GeometricMixture(*(tiny_palm(dim=64, num_tokens=256, seed=seed) for seed in (0, 1)), 0.5),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_decoded_token_casts_no_weights(kind: str) -> None:
    model: Any = MODELS[kind]()
    weights = sum(parameter.numel() for parameter in model.parameters())
    with bf16(), evaluating(model):
        decoder = make_decoder(model, PROMPTS, limit=8, copies=1, device=CPU)
        logits = decoder.step(decoder.start(1).argmax(-1))
        with Traffic() as traffic:
            decoder.step(logits.argmax(-1))
    assert traffic.numbers < 0.15 * weights


@pytest.mark.parametrize("kind", MODELS)
def test_the_logits_are_those_of_autocast(kind: str) -> None:
    """Compare with autocast alone: float32 weights, a float32 cache and a head, all of which each step casts."""
    model: Any = MODELS[kind]()
    before = state_of(model), [parameter.requires_grad for parameter in model.parameters()]
    found: list[Tensor] = []
    with bf16(), evaluating(model):
        decoder = make_decoder(model, PROMPTS, limit=4, copies=1, device=CPU)
        found.append(decoder.start(1))
        for _ in range(3):
            found.append(decoder.step(found[-1].argmax(-1)))
    model.eval()
    expected: list[Tensor] = []
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            cast = make_decoder(model, PROMPTS, limit=4, copies=1, device=CPU)
            caches = [cast.cache.first, cast.cache.second] if kind == "mixture" else [cast.cache]  # type: ignore[attr-defined]
            for cache in caches:
                cache.keys, cache.values = ([x.float() for x in side] for side in (cache.keys, cache.values))
            cast.head = None  # type: ignore[attr-defined]
            expected.append(cast.start(1))
            for logits in found[:-1]:
                expected.append(cast.step(logits.argmax(-1)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [parameter.requires_grad for parameter in model.parameters()] == before[1]
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())


def test_training_after_generation_in_one_step_has_gradients() -> None:
    model = tiny_palm()
    with bf16():
        generate(model, [[1, 2, 3]], GenerationConfig(max_new_tokens=3))
        model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


def test_frozen_weights_are_frozen_again_after_an_error() -> None:
    model = tiny_palm().requires_grad_(False)
    with pytest.raises(KeyError), torch.no_grad(), casts_kept(model):
        raise KeyError
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_of_inference_mode_can_generate_later() -> None:
    """Lightning validates in inference mode, where a reference may be moved to the device."""
    with torch.inference_mode():
        model = tiny_palm().requires_grad_(False)
    with bf16():
        (answer,) = generate(model, [[1, 2, 3]], GenerationConfig(max_new_tokens=2))
    assert len(answer[0].logprobs) == 2
