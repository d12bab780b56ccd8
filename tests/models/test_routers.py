"""The load-balancing loss of expert routers."""

import pytest
import torch
from torch import Tensor

from lightning_align.models.routers import RouterRecord, announce_mask, recording_routers
from lightning_align.scoring.logprobs import token_logprobs
from tests.models.families import FAMILIES, V, build
from tests.toys import tiny_palm, token_batch

BALANCED = ["dbrx", "ernie4_5_moe", "flex_olmo", "gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared", "jamba"]
BALANCED += ["jetmoe", "minimax", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe"]
WITHOUT_LOSS = ["afmoe", "aria_text", "deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "hunyuan_v1_moe", "llama4_text"]


def slow_loss(layers: list[Tensor], top_k: int) -> float:
    """Compute E sum_e f_e P_e over the tokens of all layers, token by token, in float64."""
    experts = layers[0].shape[-1]
    chosen, probability, total = [0.0] * experts, [0.0] * experts, 0
    for layer in layers:
        for logits in layer.double():
            shares = (logits.exp() / logits.exp().sum()).tolist()
            for expert in sorted(range(experts), key=lambda e: -shares[e])[:top_k]:
                chosen[expert] += 1
            probability = [old + share for old, share in zip(probability, shares, strict=True)]
            total += 1
    return experts * sum(f / total * p / total for f, p in zip(chosen, probability, strict=True))


def test_every_family_with_experts_is_listed() -> None:
    found = {name: routers for name in FAMILIES if (routers := build(name).routers) is not None}
    assert {name for name, routers in found.items() if routers.function is not None} == set(BALANCED)
    assert set(found) - set(BALANCED) - {"llama4"} == set(WITHOUT_LOSS)


@pytest.mark.parametrize("family", BALANCED)
def test_the_loss_is_that_of_transformers_with_its_mask(family: str) -> None:
    model, batch = build(family), token_batch([8, 2, 5, 1], [10, 5, 3, 12], vocabulary=V - 4)
    with recording_routers(model) as record:
        token_logprobs(model, batch)
    assert record is not None and model.router_record is None
    found = record.loss()
    assert found is not None and found.requires_grad
    out = model.model(
        input_ids=batch["tokens"], attention_mask=batch["mask"].long(), output_router_logits=True, use_cache=False
    )
    # A class of images and text computes the same, but has no mask for the text model here.
    assert float(found.detach()) == pytest.approx(float(out.aux_loss.detach()), rel=2e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "jetmoe"])
def test_the_loss_is_the_slow_sum_over_rows_read_alone(family: str) -> None:
    model, batch = build(family), token_batch([8, 2, 5, 1], [10, 5, 3, 12], vocabulary=V - 4)
    with recording_routers(model) as record:
        token_logprobs(model, batch)
    rows = [row[mask] for row, mask in zip(batch["tokens"], batch["mask"], strict=True)]
    with torch.no_grad():
        outputs = [model.decoder(input_ids=row[None], output_router_logits=True).router_logits for row in rows]
    layers = [torch.cat([layer.reshape(-1, layer.shape[-1]) for layer in layers]) for layers in zip(*outputs, strict=True)]
    assert record is not None and model.routers is not None
    loss = record.loss()
    assert loss is not None and float(loss.detach()) == pytest.approx(slow_loss(layers, model.routers.top_k), rel=1e-5)


def test_two_tokens_and_two_experts_by_hand() -> None:
    model = build("mixtral")
    routers = model.routers
    assert routers is not None
    routers.num_experts, routers.top_k = 2, 1
    two_to_one = torch.tensor([[2.0, 1.0]]).log()
    record = RouterRecord(routers)
    # Both tokens choose expert 0 with probability 2/3: f = (1, 0), P = (2/3, 1/3), so the loss is 2 (1 * 2/3 + 0) = 4/3.
    record.add((torch.cat([two_to_one, two_to_one]),), None)
    loss = record.loss()
    assert loss is not None and float(loss) == pytest.approx(4 / 3)
    # One token for each expert: f = P = (1/2, 1/2), so the loss is 2 (1/4 + 1/4) = 1, its smallest value. Padding is left out.
    record = RouterRecord(routers)
    record.add((torch.cat([two_to_one, two_to_one.flip(1), two_to_one]),), torch.tensor([[True, True, False]]))
    loss = record.loss()
    assert loss is not None and float(loss) == pytest.approx(1)


def test_only_passes_with_gradients_are_recorded() -> None:
    model, batch = build("mixtral"), token_batch([2, 1], [3, 4])
    with recording_routers(model) as record:
        with torch.no_grad():
            token_logprobs(model, batch)
        assert record is not None and record.loss() is None
        model(batch["tokens"])
        assert record.loss() is not None
    with recording_routers(build("llama")) as record:
        assert record is None
    with recording_routers(tiny_palm()) as record:
        assert record is None
    announce_mask(tiny_palm(), batch["mask"])  # nothing listens
