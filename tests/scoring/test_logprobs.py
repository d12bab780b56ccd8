"""Log-probs of responses: which tokens count, the values, the gradients, and that all paths agree."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.scoring import head
from lightning_align.scoring import logits as logits_module
from lightning_align.scoring.collisions import response_collisions
from lightning_align.scoring.head import head_logprobs
from lightning_align.scoring.logits import logits_logprobs
from lightning_align.scoring.logprobs import token_logprobs
from lightning_align.scoring.sums import response_logprobs, sum_logprobs
from lightning_align.scoring.targets import select_targets
from lightning_align.types import TokenBatch
from tests.toys import Plain, slow_logprobs, tiny_palm, token_batch


def eight_tokens() -> TokenBatch:
    """Make a row with the prompt at 0-2, the response at 3-5 and padding at 6-7."""
    places = torch.arange(8)[None]
    return {"tokens": places + 10, "mask": places < 6, "targets": (places >= 3) & (places < 6)}


class NextIsOneMore(nn.Module):
    """A model that predicts token + 1 with a probability of nearly 1."""

    num_tokens = 32

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.one_hot(tokens + 1, self.num_tokens) * 50.0


def test_targets_are_the_response_tokens() -> None:
    rows, before, targets = select_targets(eight_tokens())
    assert (rows.tolist(), before.tolist(), targets.tolist()) == ([0, 0, 0], [2, 3, 4], [13, 14, 15])


def test_sums_of_long_responses_are_exact() -> None:
    """Summed in float32, these would be off by about 1e-3. Margins are differences of such sums."""
    torch.manual_seed(0)
    logps, rows = -10 * torch.rand(2000), torch.zeros(2000, dtype=torch.long)
    result = sum_logprobs(logps, rows, torch.ones(1, 2000, dtype=torch.bool))
    assert result.sums.item() == logps.double().sum().float().item()
    assert result.sums.dtype == torch.float32


def test_a_perfect_model_scores_zero() -> None:
    """Without the shift, or with the mask off by one, this is -50 per token."""
    result = response_logprobs(NextIsOneMore(), eight_tokens())
    assert result.counts.tolist() == [3]
    torch.testing.assert_close(result.sums, torch.zeros(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"variant": "paper"}, {"tie_embeddings": False}])
def test_both_paths_equal_the_slow_version(overrides: dict[str, object], plain: bool) -> None:
    model: nn.Module = tiny_palm(**overrides)
    if plain:
        model = Plain(model)
    batch = token_batch([2, 1, 4, 3], [5, 1, 0, 2])
    result = response_logprobs(model, batch)
    sums, counts = slow_logprobs(model, batch)
    assert result.counts.tolist() == counts == [5, 1, 0, 2]
    torch.testing.assert_close(result.sums.double(), torch.tensor(sums, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert result.sums.dtype == torch.float32
    torch.testing.assert_close(result.means, result.sums / torch.tensor([5, 1, 1, 2]), rtol=0, atol=0)


def test_both_paths_have_the_same_gradient() -> None:
    batch, gradients = token_batch([2, 1, 4], [5, 1, 3]), []
    for wrap in (nn.Identity, Plain):
        model = tiny_palm(dtype=torch.float64)
        scored = model if wrap is nn.Identity else wrap(model)
        (response_logprobs(scored, batch).sums * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def inputs(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    hidden = torch.randn(7, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 4, dtype=dtype, requires_grad=True)
    b = torch.randn(11, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, b, torch.randint(11, (7,))


# A row of 11 logits has 44 bytes: chunks of 1, 2 (the last chunk is short), and all rows.
CHUNKS = [1, 100, 10_000]


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
@pytest.mark.parametrize(("bias", "softcap"), [(True, None), (False, None), (True, 1.5), (False, 1.5)])
def test_gradients_are_the_derivatives(
    bias: bool, softcap: float | None, keep_bytes: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "KEEP_BYTES", keep_bytes)
    hidden, weight, b, targets = inputs(bias)

    def function(h: Tensor, w: Tensor, v: Tensor | None) -> Tensor:
        return head_logprobs(h, w, v, targets, softcap=softcap, chunk_bytes=chunk_bytes)

    logits = hidden @ weight.T + (0 if b is None else b)
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    expected = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(function(hidden, weight, b), expected, rtol=0, atol=1e-12)
    # The second backward pass recomputes what the first had kept, and differs in the last bit.
    assert torch.autograd.gradcheck(function, (hidden, weight, b), nondet_tol=1e-12 if keep_bytes else 0.0)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone(needs: tuple[bool, bool, bool]) -> None:
    hidden, weight, bias, targets = inputs()
    assert bias is not None
    arguments = [t.detach().requires_grad_(need) for t, need in zip((hidden, weight, bias), needs, strict=True)]
    assert torch.autograd.gradcheck(lambda h, w, b: head_logprobs(h, w, b, targets), arguments, nondet_tol=1e-12)


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_gradients_of_logits_are_the_derivatives(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_module, "CHUNK_BYTES", chunk_bytes)
    logits = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    rows, before, targets = torch.tensor([0, 0, 1]), torch.tensor([1, 3, 0]), torch.tensor([4, 10, 0])
    expected = logits.log_softmax(-1)[rows, before, targets]
    torch.testing.assert_close(logits_logprobs(logits, rows, before, targets), expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: logits_logprobs(x, rows, before, targets), (logits,))


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
def test_a_second_backward_pass_equals_the_first(keep_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "KEEP_BYTES", keep_bytes)
    hidden, weight, bias, targets = inputs()
    out = head_logprobs(hidden, weight, bias, targets, chunk_bytes=100).sum()
    first = torch.autograd.grad(out, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(out, (hidden, weight))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_second_derivative_is_rejected() -> None:
    """It would be silently wrong, because the backward pass works in place."""
    hidden, weight, bias, targets = inputs()
    loss = head_logprobs(hidden, weight, bias, targets).square().sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_logit_gaps_of_ten_thousand_are_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    result = head_logprobs(hidden, weight, None, torch.tensor([1, 0]))
    assert result.tolist() == [-1e4, -1e4]
    result.sum().backward()
    assert hidden.grad is not None and hidden.grad.flatten().tolist() == [-1.0, 1.0]
    logits = torch.tensor([[[1e4, 0.0]]])
    zero = torch.zeros(1, dtype=torch.long)
    assert logits_logprobs(logits, zero, zero, zero + 1).tolist() == [-1e4]


@pytest.mark.parametrize("plain", [False, True])
def test_a_batch_without_targets_has_zero_sums_and_gradients(plain: bool) -> None:
    model: nn.Module = tiny_palm()
    result = response_logprobs(Plain(model) if plain else model, token_batch([3, 2], [0, 0]))
    assert (result.sums.tolist(), result.counts.tolist(), result.means.tolist()) == ([0, 0], [0, 0], [0, 0])
    result.sums.sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
@pytest.mark.parametrize("bias", [True, False])
def test_under_autocast_sums_are_in_float32(bias: bool, keep_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 on the same rounded inputs, only the rounding of float32 is left, not that of bfloat16."""
    monkeypatch.setattr(head, "KEEP_BYTES", keep_bytes)
    hidden = torch.randn(64, 16, requires_grad=True)
    weight = torch.randn(3000, 16, requires_grad=True)
    b = torch.randn(3000, requires_grad=True) if bias else None
    targets = torch.randint(3000, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        result = head_logprobs(hidden, weight, b, targets, chunk_bytes=4 * 3000 * 10)
    assert result.dtype == torch.float32
    logits = hidden.detach().bfloat16().double() @ weight.detach().bfloat16().double().T
    logits = logits if b is None else logits + b.detach().double()
    expected = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)
    result.sum().backward()
    # Gradients have the dtype of the parameters. A CPU that is fast with bfloat16 rounds the factors and results of products.
    gradient = -logits.softmax(1)
    gradient[torch.arange(64), targets] += 1
    for got, want in (
        (hidden.grad, gradient @ weight.detach().bfloat16().double()),
        (weight.grad, gradient.T @ hidden.detach().bfloat16().double()),
    ):
        assert got is not None and got.dtype == torch.float32
        assert float((got.double() - want).norm() / want.norm()) < 2**-8


def test_ids_outside_of_the_vocabulary_are_rejected() -> None:
    batch = token_batch([2], [3])
    batch["tokens"][0, 1] = 23
    with pytest.raises(ValueError, match="Token ids must be below 23, the vocabulary size of the model, but got 23"):
        token_logprobs(tiny_palm(), batch)
    embed = nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, 23))
    with pytest.raises(ValueError, match=r"Token ids must be below 23, .* but got 23"):
        token_logprobs(embed, batch)


def test_the_first_token_cannot_be_a_target() -> None:
    with pytest.raises(ValueError, match="No token precedes the first one"):
        select_targets(token_batch([0, 2], [3, 1]))


def test_a_model_that_returns_no_logits_is_rejected() -> None:
    with pytest.raises(ValueError, match="logits"):
        token_logprobs(nn.Flatten(), token_batch([2], [3]))


@pytest.mark.parametrize("build", [tiny_palm, lambda: Plain(tiny_palm())], ids=["hidden", "plain"])
def test_collisions_equal_those_of_the_full_softmax(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(), token_batch([2, 1, 3], [4, 1, 7])
    logps = model(batch["tokens"]).detach().double().log_softmax(-1)
    expected = [
        sum(float((2 * logps[row, place - 1]).exp().sum().log()) for place in batch["targets"][row].nonzero().flatten())
        for row in range(3)
    ]
    for size in (2**20, 4 * 23 * 2):
        monkeypatch.setattr("lightning_align.scoring.head.CHUNK_BYTES", size)
        torch.testing.assert_close(response_collisions(model, batch), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_target_weights_weight_the_sums() -> None:
    model, batch = tiny_palm(), token_batch([2, 1, 3], [4, 1, 7])
    logps, rows = (x.detach() for x in token_logprobs(model, batch))
    weights = torch.rand(batch["tokens"].shape)
    result = response_logprobs(model, {**batch, "target_weights": weights})  # type: ignore[typeddict-item]
    expected = [float((logps * weights[batch["targets"]])[rows == row].sum()) for row in range(3)]
    assert result.sums.detach().tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(result.counts, batch["targets"].sum(1))
