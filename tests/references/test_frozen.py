"""References: out of their owner's reach, never moving, never dropping out."""

import pytest
import torch
from torch import nn

from lightning_align.models.lora import LoRAConfig, add_lora, lora_parameters, train_only
from lightning_align.models.weights import weights_hash
from lightning_align.references.frozen import AdaptersOff, FrozenCopy, frozen_copy
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import LogProbs
from tests.toys import slow_logprobs, tiny_palm, token_batch

BATCH = token_batch([2, 3, 1], [4, 1, 5])


class Owner(nn.Module):
    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy, self.reference = policy, frozen_copy(policy)


def equal(a: LogProbs, b: LogProbs) -> bool:
    return torch.equal(a.sums, b.sums) and torch.equal(a.counts, b.counts)


def train(policy: nn.Module, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        (-response_logprobs(policy, BATCH).sums.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_frozen_copy_is_the_policy_as_it_was() -> None:
    policy = tiny_palm()
    reference = frozen_copy(policy)
    result = reference.logprobs(policy, BATCH)
    torch.testing.assert_close(result.sums, torch.tensor(slow_logprobs(policy, BATCH)[0]), rtol=1e-5, atol=1e-5)
    assert not result.sums.requires_grad


def test_a_frozen_copy_does_not_move() -> None:
    policy = tiny_palm()
    reference = frozen_copy(policy)
    before, weights = reference.logprobs(policy, BATCH), weights_hash(reference.model)
    train(policy)
    assert equal(reference.logprobs(policy, BATCH), before)
    assert weights_hash(reference.model) == weights
    assert not equal(response_logprobs(policy, BATCH), before)


def test_its_owner_cannot_reach_it() -> None:
    owner = Owner(tiny_palm(ff_dropout=0.5))
    plain = tiny_palm(ff_dropout=0.5)
    assert len(list(owner.parameters())) == len(list(plain.parameters()))
    assert set(owner.state_dict()) == {f"policy.{name}" for name in plain.state_dict()}
    assert not any(module is owner.reference.model for module in owner.modules())
    first = owner.reference.logprobs(owner.policy, BATCH)
    owner.train()
    assert not any(module.training for module in owner.reference.model.modules())
    assert equal(owner.reference.logprobs(owner.policy, BATCH), first)  # no dropout
    assert not any(p.requires_grad for p in owner.reference.model.parameters())
    assert all(p.requires_grad for p in owner.policy.parameters())
    assert owner.policy.training


def test_a_given_model_is_frozen() -> None:
    model = tiny_palm()
    reference = FrozenCopy(model)
    assert reference.model is model and not model.training
    assert not any(p.requires_grad for p in model.parameters())


def adapted(dropout: float = 0.0) -> nn.Module:
    policy = tiny_palm(ff_dropout=dropout)
    add_lora(policy, LoRAConfig(rank=2, dropout=dropout))
    train_only(policy, "default")
    with torch.no_grad():
        for parameter in lora_parameters(policy, "default"):
            parameter.normal_()
    return policy


def test_adapters_off_is_the_base() -> None:
    policy, base = adapted(), tiny_palm().eval()
    with torch.no_grad():
        expected = response_logprobs(base, BATCH)
    assert equal(AdaptersOff().logprobs(policy, BATCH), expected)
    assert not equal(response_logprobs(policy, BATCH), expected)
    train(policy)
    assert equal(AdaptersOff().logprobs(policy, BATCH), expected)


def test_adapters_off_has_no_dropout_and_no_gradient() -> None:
    policy = adapted(dropout=0.5).train()
    first, second = (AdaptersOff().logprobs(policy, BATCH) for _ in range(2))
    assert equal(first, second) and not first.sums.requires_grad


def test_adapters_off_leaves_the_policy_as_it_was() -> None:
    policy = adapted(dropout=0.5).train()
    policy.get_submodule("blocks.0").eval()
    before = {name: module.training for name, module in policy.named_modules()}
    AdaptersOff().logprobs(policy, BATCH)
    assert {name: module.training for name, module in policy.named_modules()} == before
    assert response_logprobs(policy, BATCH).sums.requires_grad
    broken = {**BATCH, "tokens": BATCH["tokens"] + 1000}
    with pytest.raises(ValueError, match="vocabulary"):
        AdaptersOff().logprobs(policy, broken)  # type: ignore[arg-type]
    assert {name: module.training for name, module in policy.named_modules()} == before
    policy.eval()
    adapters_on = response_logprobs(policy, BATCH)
    assert not equal(AdaptersOff().logprobs(policy, BATCH), adapters_on)
