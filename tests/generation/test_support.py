"""Ids without a token, and logits from which no token can be chosen."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_align.data.tokenizer import ByteTokenizer
from lightning_align.generation.ends import Ends
from lightning_align.generation.filters import choose, num_draws
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.generation.support import Support
from tests.toys import tiny_palm


class Fixed(nn.Module):
    """Predicts the same logits everywhere, and other logits from one position on."""

    def __init__(self, logits: list[float], *, later: list[float] | None = None, place: int = 0) -> None:
        super().__init__()
        self.logits, self.later, self.place = nn.Parameter(torch.tensor(logits)), later, place

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.logits.expand(*tokens.shape, -1).clone()
        if self.later is not None:
            logits[tokens[:, 0] == 1, self.place :] = torch.tensor(self.later)
        return logits


def test_the_support_is_what_the_tokenizer_has() -> None:
    support = Support(6, frozenset({2, 4}))
    assert [token for token in range(-1, 8) if token in support] == [0, 1, 3, 5]
    assert support.missing([5, 2, 9, -1]) == [2, 9, -1]
    absent = support.absent(8, torch.device("cpu"))
    assert absent is not None and absent.tolist() == [False, False, True, False, True, False, True, True]
    assert support.num_absent(8) == 4 and support.num_absent(3) == 1
    assert Support(6).absent(6, torch.device("cpu")) is None  # nothing to mask, so no step does
    assert Support().absent(9, torch.device("cpu")) is None and 10**9 in Support()
    assert Support.of(ByteTokenizer()) == Support(259) and Support.of(None) == Support()


@pytest.mark.parametrize("filters", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.9}])
def test_ids_without_a_token_are_never_drawn(filters: dict[str, float]) -> None:
    """The likeliest ids stand for no token: one lies behind the vocabulary, another one is a hole."""
    model = Fixed([0.5, 9.0, 1.0, 0.2, 8.0, 9.5])
    config = GenerationConfig(max_new_tokens=3, num_samples=200, **filters)
    (rows,) = generate(model, [[0]], config, ends=Ends(support=Support(5, frozenset({1, 4}))))
    drawn = {token for row in rows for token in row.tokens}
    assert drawn <= {0, 2, 3} and (2 in drawn)
    # Log-probs are those of the model, whose softmax has all ids.
    expected = torch.tensor([0.5, 9.0, 1.0, 0.2, 8.0, 9.5]).log_softmax(0)
    assert rows[0].logprobs == pytest.approx(expected[rows[0].tokens].tolist(), abs=1e-5)


def test_what_is_left_is_drawn_in_proportion() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0]])
    config, count = GenerationConfig(), 20_000
    allowed = logits.masked_fill(torch.tensor([False, False, False, True]), -torch.inf)
    noise = torch.rand(count, num_draws(config), generator=torch.Generator().manual_seed(0))
    tokens, _ = choose(logits.expand(count, -1), noise, config, allowed=allowed.expand(count, -1))
    expected = count * torch.tensor([0.0, 2.0, 1.0]).softmax(0)
    chi = ((tokens.bincount(minlength=3) - expected) ** 2 / expected).sum()
    assert float(chi) < 13.8  # 2 degrees of freedom, once in 1,000


def test_a_padded_model_answers_as_one_without_padding() -> None:
    model = tiny_palm(num_tokens=300)
    ends = Ends.of(tokenizer=ByteTokenizer())
    config = GenerationConfig(max_new_tokens=12, num_samples=20)
    (rows,) = generate(model, [[5, 6]], config, ends=ends)
    assert max(token for row in rows for token in row.tokens) < 259
    (free,) = generate(model, [[5, 6]], config)
    assert max(token for row in free for token in row.tokens) >= 259


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("filters", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.9}])
@pytest.mark.parametrize("bad", [[NAN] * 4, [0, NAN, 0, 0], [-INF] * 4, [INF] * 4, [0, 0, INF, 0]])
@pytest.mark.parametrize("repeated", [1.0, 1.3])
def test_logits_without_a_choice_raise_with_row_and_step(filters, bad, repeated) -> None:
    model = Fixed([0.0, 1.0, 2.0, -INF], later=bad, place=3)
    config = GenerationConfig(max_new_tokens=9, repetition_penalty=repeated, **filters)
    assert len(generate(model, [[2, 2]], config)[0][0].tokens) == 9  # a single -inf only excludes its token
    with pytest.raises(ValueError, match=r"step 2 of the response to prompt 7 \(sample 0\).*NaN or infinite"):
        generate(model, [[2, 2], [1, 2], [2, 2]], config, ids=[3, 7, 4])
    # Rows that ended before do not matter.
    assert len(generate(model, [[1, 2]], config, limits=[2])[0][0].tokens) == 2


def test_a_row_in_which_every_token_is_excluded_raises() -> None:
    config = GenerationConfig(max_new_tokens=9, no_repeat_ngram_size=1)
    with pytest.raises(ValueError, match=r"step 2 of the response to prompt 0.*`no_repeat_ngram_size`"):
        generate(Fixed([0.0, 1.0, 2.0]), [[0]], config)
