"""Waits for a pretended GPU in generation: none per token, and one per look at what was drawn."""

from typing import Any

import pytest
import torch

from lightning_align.generation.decoding import CHECK_EVERY
from lightning_align.generation.looks import Looks
from lightning_align.generation.sampler import GenerationConfig, generate
from tests.devices.pretended import GPU, PretendedGPU, WrongDevice
from tests.generation.test_static import MODELS
from tests.retro.toys import SIZE

TOKENS = 2 * CHECK_EVERY + 1
PROMPTS = [[1 + row, 2, 3, 4, 5] for row in range(4)]
# Beside the looks. transformers makes a mask for the prompts from numbers of the host. A search is on the host.
MORE = {"llama": 4, "composition": 4, "retrieval": 1 + TOKENS // SIZE}
FILTERS = {"top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}


@pytest.mark.parametrize(
    ("name", "filters"), [*((name, {}) for name in ("PaLM", "llama", "mixture", "composition", "retrieval")), ("PaLM", FILTERS)]
)
def test_generation_waits_once_per_look(name: str, filters: dict[str, Any]) -> None:
    config = GenerationConfig(max_new_tokens=TOKENS, batch_size=4, **filters)
    model: Any = MODELS[name]().double()  # so that the rounding of other kernels decides nothing
    expected = generate(model, PROMPTS, config)
    with PretendedGPU() as device:
        model.to(GPU)
        generate(model, PROMPTS[:1], GenerationConfig(max_new_tokens=1))  # the caches of transformers are tried once
        getattr(model, "found", {}).clear()
        device.waits.clear()
        found = generate(model, PROMPTS, config)
        waits = dict(device.waits)
    looks = -(-TOKENS // CHECK_EVERY)
    assert sum(waits.values()) <= looks + MORE.get(name, 0), waits
    assert [len(one.tokens) for row in found for one in row] == [TOKENS] * 4
    if not filters:  # a CPU draws otherwise with top-p
        assert found == expected


def test_a_look_is_read_after_the_next_has_started() -> None:
    with PretendedGPU():
        looks = Looks[str](GPU, late=True)
        tokens, logprobs = torch.tensor([[1, 2]], device=GPU), torch.tensor([[-0.5, -1.0]], device=GPU)
        looks.add(["first"], tokens, logprobs)
        assert not list(looks.read(1))
        looks.add(["second"], tokens, logprobs)
        assert list(looks.read(1)) == [(["first"], [[1, 2]], [[-0.5, -1.0]])]
        assert [rows for rows, _, _ in looks.read(0)] == [["second"]]


def test_a_device_without_events_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a simulated device is where torch finds no GPU."""
    with PretendedGPU():
        monkeypatch.setattr("lightning_align.generation.looks.has_events", lambda device: False)
        looks = Looks[str](GPU, late=True)
        looks.add(["only"], torch.tensor([[1, 2]], device=GPU), torch.tensor([[-0.5, -1.0]], device=GPU))
        assert list(looks.read(1)) == [(["only"], [[1, 2]], [[-0.5, -1.0]])]


@pytest.mark.parametrize("waits", [False, True])
def test_a_copy_is_read_when_an_event_has_been_waited_for(waits: bool) -> None:
    with PretendedGPU() as device:
        x, host = torch.ones(3, device=GPU), torch.empty(3)
        device.waits.clear()
        host.copy_(x, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        if waits:
            event.synchronize()
            assert host.tolist() == [1.0] * 3 and sum(device.waits.values()) == 1
        else:
            for read in (host.tolist, lambda: host + 1):
                with pytest.raises(WrongDevice, match="before it is complete"):
                    read()
