"""Errors of published implementations that ours does not have. Each test pins an error, so that it fails once it is fixed."""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ema_pytorch import EMA
from torch import Tensor, nn
from x_transformers.dpo import DPO

from lightning_align.dpo.module import DPOModule
from lightning_align.references.average import Average
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import PreferenceBatch
from tests.toys import largest_difference, state_of, tiny_palm


def walk(model: nn.Module, seed: int) -> None:
    """Add random numbers to all parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_ema_pytorch_copies_instead_of_staying_frozen() -> None:
    """With a decay of 1 nothing should move, but it copies for its first 100 calls. Our frozen reference is never updated."""
    online = tiny_palm()
    theirs = EMA(online, beta=1.0)
    start = state_of(online)
    for step in range(12):
        walk(online, step)
        theirs.update()
    assert largest_difference(state_of(theirs.ema_model), start) > 0.1


def test_ema_pytorch_copies_at_first_for_any_decay() -> None:
    online = tiny_palm()
    theirs = EMA(online, beta=0.9, update_after_step=0, update_every=1, include_online_model=False)
    ours = Average(tiny_palm())
    start = state_of(online)
    walk(online, 0)
    theirs.update()
    ours.follow(online, alpha=0.1)
    assert largest_difference(state_of(theirs.ema_model), state_of(online)) == 0
    expected = {name: 0.9 * start[name] + 0.1 * value for name, value in state_of(online).items()}
    assert largest_difference(state_of(ours.model), expected) < 1e-6


def test_ema_pytorch_skips_renamed_weights() -> None:
    """It neither raises nor averages. Our `Average.follow` raises, as its own test shows."""
    online, renamed = tiny_palm(), nn.Module()
    theirs = EMA(online, beta=0.5, include_online_model=False)
    renamed.inner = online
    start = state_of(theirs.ema_model)
    walk(online, 0)
    theirs.update_moving_average(theirs.ema_model, renamed, 0.5)
    assert largest_difference(state_of(theirs.ema_model), start) == 0


def pair() -> tuple[PreferenceBatch, dict[str, Tensor]]:
    """Make one pair with the prompt at 0-2, the responses at 3-5 and padding at 6-7."""
    places = torch.arange(8)[None]
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randint(1, 23, (1, 8), generator=generator) for _ in range(2))
    rejected[:, :3] = chosen[:, :3]
    mask, targets = places < 6, (places >= 3) & (places < 6)
    sides: list[Any] = [{"tokens": tokens * mask, "mask": mask, "targets": targets} for tokens in (chosen, rejected)]
    inputs = {"prompt_mask": places < 3, "preferred_seq_mask": mask, "unpreferred_seq_mask": mask}
    return {"chosen": sides[0], "rejected": sides[1]}, inputs


def test_x_transformers_trains_the_pad_and_not_the_first_token() -> None:
    """Its loss is our length-normalized loss with targets one position too late: 4, 5, 6 instead of 3, 4, 5."""
    batch, inputs = pair()
    theirs = DPO(tiny_palm(), beta=2.0)  # type: ignore[arg-type]  # any module that gives logits
    theirs.policy_model.load_state_dict(tiny_palm(seed=1).state_dict())
    value = theirs(batch["chosen"]["tokens"], batch["rejected"]["tokens"], **inputs)

    def ours(shift: int) -> Tensor:
        module = DPOModule(tiny_palm(), loss="sigmoid_norm", beta=2.0)
        module.configure_model()
        module.policy.load_state_dict(tiny_palm(seed=1).state_dict())
        # The model must see the padding token that is scored.
        sides: Any = {
            name: {**side, "targets": side["targets"].roll(shift, dims=1), "mask": torch.ones_like(side["mask"])}  # type: ignore[index,dict-item]
            for name, side in batch.items()
        }
        return module.pair_losses(sides, *module.score(sides)).mean()

    torch.testing.assert_close(value, ours(shift=1), rtol=1e-4, atol=1e-5)
    assert float((value - ours(shift=0)).detach().abs()) > 1e-3


class Successor(nn.Module):
    """A model that predicts token + 1 with the logit `sure`."""

    def __init__(self, sure: float) -> None:
        super().__init__()
        self.sure = nn.Parameter(torch.tensor(sure))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.sure * F.one_hot((tokens + 1) % 23, 23).float()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["dpo", "spin"])
def test_self_rewarding_lm_scores_each_token_against_itself(name: str) -> None:
    """It scores each token with the logits that predict the token after it, so a perfect model does not score 0.

    It also overwrites padding tokens in the batch that it is given.
    """
    theirs: Any = importlib.import_module(f"self_rewarding_lm_pytorch.{name}")
    places = torch.arange(6)[None]
    chosen, rejected = places + 5, torch.tensor([[5, 6, 7, 2, 9, 4]])
    policy, reference = Successor(50.0), Successor(1.0)

    def value(shift: int) -> Tensor:
        """Compute the loss with a beta of 0.01 on means, from the logits this many positions before each token."""
        means = []
        for tokens in (chosen, rejected):
            logps = [model(tokens).log_softmax(-1) for model in (policy, reference)]
            own = [logp[0, torch.arange(3, 6) - shift, tokens[0, 3:]].mean() for logp in logps]
            means.append(own[0] - own[1])
        return -F.logsigmoid(0.01 * (means[0] - means[1]))

    made = theirs.DPO(policy, beta=0.01) if name == "dpo" else theirs.SPIN(policy, **{"\N{GREEK SMALL LETTER LAMDA}": 0.01})
    made.ref_model.ema_model.load_state_dict(reference.state_dict())
    made.ref_model.initted.fill_(True)
    sides = (chosen, rejected) if name == "dpo" else (rejected, chosen)
    found = made(*(side.clone() for side in sides), torch.tensor([3]))
    torch.testing.assert_close(found, value(shift=0))
    assert float((found - value(shift=1)).detach().abs()) > 0.1

    made.pad_id = 10
    given = [side.clone() for side in sides]
    made(*given, torch.tensor([3]))
    assert int(given[0 if name == "dpo" else 1][0, 5]) == 0, "it was 10"

    side: Any = {"tokens": chosen, "mask": places >= 0, "targets": places >= 3}
    assert abs(float(response_logprobs(policy, side).sums.detach())) < 1e-6
