"""Log-probs of texts against a slow float64 version, and against the log-probs of training."""

import pytest
import torch
from torch import nn

from lightning_align import Augment, CALMModule, PretrainedLM
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.models.language_model import logits_of
from lightning_align.scoring.logprobs import token_logprobs
from lightning_align.scoring.texts import TextScorer
from tests.toys import tiny_palm

BYTES = load_tokenizer("bytes")
SIZE = 259
PAIRS = [("3+1=", "4"), ("", "ab"), ("a b ", "c"), ("the answer", " is long enough"), (" ", "x"), ("q: 2\na:", " 2")]


class Plain(nn.Module):
    """A model that returns logits only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_palm(num_tokens=SIZE)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return logits_of(self.inner, tokens)


def calm() -> nn.Module:
    module = CALMModule(tiny_palm(num_tokens=SIZE), [Augment(tiny_palm(num_tokens=SIZE, seed=1), num_connections=1)])
    module.configure_model()
    return module.policy


def pretrained() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return PretrainedLM(config={"model_type": "llama", "vocab_size": SIZE, "max_position_embeddings": 64, **sizes})


MODELS = {"palm": lambda: tiny_palm(num_tokens=SIZE), "plain": Plain, "calm": calm, "pretrained": pretrained}


def slow(model: nn.Module, ids: list[int], count: int) -> tuple[float, bool]:
    """The score of the last ids, one token at a time."""
    total, greedy = 0.0, True
    with torch.no_grad():
        for place in range(len(ids) - count, len(ids)):
            logits = logits_of(model, torch.tensor([ids[:place]]))[0, -1].double()
            total += float(logits[ids[place]] - logits.logsumexp(0))
            greedy = greedy and int(logits.argmax()) == ids[place]
    return total, greedy


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_one_token_at_a_time_in_any_batch(name: str) -> None:
    model = MODELS[name]().eval()
    expected = []
    for context, continuation in PAIRS:
        before, after = TextScorer(model, BYTES).encode_pair(context, continuation)
        expected.append(slow(model, before + after, len(after)))
    for size in (1, 3, 8):
        found = TextScorer(model, BYTES, batch_size=size).loglikelihoods(PAIRS)
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-5)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_training(name: str) -> None:
    model = MODELS[name]().eval()
    prompt, response = [BYTES.bos_id, *BYTES.encode_batch(["3+1="])[0].ids], BYTES.encode_batch(["4 and more"])[0].ids
    tokens = torch.tensor([[*prompt, *response]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        logprobs, _ = token_logprobs(
            model, {"tokens": tokens, "mask": mask, "targets": mask & (torch.arange(tokens.shape[1]) >= len(prompt))}
        )
    ((score, _),) = TextScorer(model, BYTES).loglikelihoods([("3+1=", "4 and more")])
    assert score == pytest.approx(float(logprobs.sum()), abs=2e-5)


def test_a_greedy_continuation_is_known_as_one() -> None:
    model = tiny_palm(num_tokens=SIZE).eval()
    scorer = TextScorer(model, BYTES)
    ids = scorer.encode("3+1=")
    with torch.no_grad():
        best = int(logits_of(model, torch.tensor([ids]))[0, -1].argmax())
    # Of the two requests, one is what greedy decoding writes.
    assert scorer._scores([([*ids, best], 1), ([*ids, (best + 1) % SIZE], 1)], lambda count: None)[0][1]
    assert not scorer._scores([([*ids, best], 1), ([*ids, (best + 1) % SIZE], 1)], lambda count: None)[1][1]


@pytest.mark.parametrize("length", [1, 3, 4, 7, 100])
def test_each_token_of_a_long_text_is_scored_once_with_a_full_context(length: int) -> None:
    model = tiny_palm(num_tokens=SIZE).eval()
    scorer = TextScorer(model, BYTES, max_length=length, batch_size=2)
    ids = scorer.encode("abcdefgh", special=False)
    windows = list(scorer.windows(ids))
    scored = [token for window, count in windows for token in window[-count:]]
    assert scored == ids
    assert all(len(window) <= length + 1 for window, _ in windows)
    assert all(len(window) == min(length, len(ids)) + 1 for window, _ in windows)
    expected = sum(slow(model, window, count)[0] for window, count in windows)
    assert scorer.rolling(["abcdefgh", ""]) == pytest.approx([expected, 0.0], abs=2e-5)


def test_what_does_not_fit_is_left_out_or_refused() -> None:
    model = tiny_palm(num_tokens=SIZE).eval()
    scorer = TextScorer(model, BYTES, max_length=4)
    ((score, _),) = scorer.loglikelihoods([("abcdefgh", "ij")])
    assert scorer.truncated == 1
    assert score == pytest.approx(slow(model, scorer.encode("fghij", special=False), 2)[0], abs=2e-5)
    for continuation in ("", "abcde"):
        with pytest.raises(ValueError, match="A continuation must have 1 to 4 tokens"):
            scorer.loglikelihoods([("a", continuation)])
    for settings, name in (({"batch_size": 0}, "batch_size"), ({"max_length": 0}, "max_length")):
        with pytest.raises(ValueError, match=f"`{name}` must be 1 or more, but got 0"):
            TextScorer(model, BYTES, **settings)
    with pytest.raises(ValueError, match="`max_length` must be at most 64"):
        TextScorer(pretrained(), BYTES, max_length=65)


def test_spaces_belong_to_the_continuation() -> None:
    scorer = TextScorer(tiny_palm(num_tokens=SIZE), BYTES)
    text = lambda ids: BYTES.decode(ids)  # noqa: E731
    before, after = scorer.encode_pair("a b ", "c")
    assert (text(before), text(after), before[0]) == ("a b", " c", BYTES.bos_id)
    before, after = scorer.encode_pair("", "c")
    assert (before, text(after)) == ([scorer.prefix], "c")
