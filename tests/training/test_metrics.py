"""Metrics: exact for every cut of the same tokens, finite for every gap."""

import math

import pytest
import torch

from lightning_align.scoring.head import head_logprobs
from lightning_align.training.metrics import Correlation, PairMeans, TokenNLL


def test_by_hand() -> None:
    metric = TokenNLL()
    metric.update(torch.tensor([-2.0, -4.0]), torch.tensor([1, 3]), torch.tensor([2, 10]))
    values = {name: float(value) for name, value in metric.compute().items()}
    # 6 nats over 4 tokens and 12 bytes.
    assert values == pytest.approx({"loss": 1.5, "perplexity": math.exp(1.5), "bits_per_byte": 0.5 / math.log(2)}, rel=1e-6)


def test_bits_per_byte_are_of_rows_whose_bytes_are_known() -> None:
    metric = TokenNLL()
    metric.update(torch.tensor([-2.0]), torch.tensor([1]), torch.tensor([4]))
    metric.update(torch.tensor([-100.0]), torch.tensor([1]))
    values = metric.compute()
    assert float(values["bits_per_byte"]) == pytest.approx(0.5 / math.log(2))
    assert float(values["loss"]) == pytest.approx(51)
    metric.reset()
    metric.update(torch.tensor([-2.0]), torch.tensor([1]))
    assert set(metric.compute()) == {"loss", "perplexity"}


def test_any_cut_gives_the_same_number() -> None:
    sums, counts, size = -torch.rand(1000) * 30, torch.randint(0, 40, (1000,)), torch.randint(1, 90, (1000,))
    results = []
    for rows in (1, 7, 1000):
        metric = TokenNLL()
        for start in range(0, 1000, rows):
            part = slice(start, start + rows)
            metric.update(sums[part], counts[part], size[part])
        results.append((float(metric.nll / metric.tokens), float(metric.bytes_nll / metric.num_bytes)))
    expected = -float(sums.double().sum())
    for nats, bits in results:
        assert nats == pytest.approx(expected / int(counts.sum()), rel=1e-12)
        assert bits == pytest.approx(expected / int(size.sum()), rel=1e-12)


def test_a_gap_of_110_stays_finite() -> None:
    logps = head_logprobs(torch.tensor([[110.0]]), torch.tensor([[1.0], [0.0]]), None, torch.tensor([1]))
    metric = TokenNLL()
    metric.update(logps, torch.tensor([1]))
    assert float(metric.compute()["loss"]) == 110.0
    assert bool(metric.nll.isfinite())
    assert math.isinf(-float(torch.tensor([110.0, 0.0]).softmax(0)[1].log()))  # what it would be otherwise


def test_counts_beyond_float32_still_count() -> None:
    metric = TokenNLL()
    metric.update(torch.zeros(1), torch.tensor([2**24]))
    metric.update(torch.zeros(1), torch.tensor([1]))
    assert int(metric.tokens) == 2**24 + 1


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")  # that it comes before update is the case
def test_nothing_counted_gives_nothing() -> None:
    metric = TokenNLL()
    metric.update(torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert metric.compute() == {}
    assert PairMeans(("a",)).compute() == {}


@pytest.mark.parametrize("metric", [TokenNLL(), PairMeans(("a",))], ids=["nll", "pairs"])
def test_a_model_in_bfloat16_does_not_take_its_metrics_along(metric: TokenNLL | PairMeans) -> None:
    module = torch.nn.ModuleDict({"metric": metric, "layer": torch.nn.Linear(2, 2)}).to(torch.bfloat16)
    assert module["layer"].weight.dtype == torch.bfloat16
    metric.reset()
    states = [value for value in metric.metric_state.values() if isinstance(value, torch.Tensor)]
    assert states and all(value.dtype == torch.float64 for value in states)


def test_means_over_pairs() -> None:
    values = {"a": torch.rand(100), "b": -torch.rand(100)}
    for rows in (1, 33, 100):
        metric = PairMeans(("a", "b"))
        for start in range(0, 100, rows):
            metric.update({name: value[start : start + rows] for name, value in values.items()})
        means = metric.compute()
        assert list(means) == ["a", "b"]
        for name, value in values.items():
            assert float(means[name]) == pytest.approx(float(value.double().mean()), rel=1e-7)
    metric.reset()
    metric.update({name: value[:1] for name, value in values.items()})
    assert float(metric.compute()["a"]) == float(values["a"][0])


def test_every_name_must_be_given() -> None:
    with pytest.raises(KeyError, match="b"):
        PairMeans(("a", "b")).update({"a": torch.ones(1)})


def test_two_processes_add_up() -> None:
    """What torchmetrics does at a reduction: sums of sums and of counts, not a mean of means."""
    one, two = TokenNLL(), TokenNLL()
    one.update(torch.tensor([-1.0]), torch.tensor([1]))
    two.update(torch.tensor([-9.0]), torch.tensor([9]))
    assert all(reduction is not None and reduction.__name__ == "dim_zero_sum" for reduction in one._reductions.values())
    for name in ("nll", "tokens"):
        setattr(one, name, getattr(one, name) + getattr(two, name))
    assert float(one.compute()["loss"]) == 1.0


def test_what_inference_mode_left_can_be_gone_on_with() -> None:
    """`Trainer.validate` resets in inference mode, and the validation of a later fit adds outside of it."""
    ones = torch.ones(2)
    updates = ((TokenNLL(), (-ones, ones)), (PairMeans(("a",)), ({"a": ones},)), (Correlation(), (ones, ones)))
    for metric, update in updates:
        with torch.inference_mode():
            metric.update(*update)
            metric.reset()
        metric.update(*update)  # type: ignore[arg-type]
        metric.compute()


def test_correlation_by_hand() -> None:
    metric = Correlation()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([1, 3]))
    metric.update(torch.tensor([3.0]), torch.tensor([2]))
    # Deviations -1, 0, 1 and -1, 1, 0: product 1, squares 2 and 2.
    assert float(metric.compute()) == pytest.approx(0.5)
    for first in ([0.1] * 3, [5.0, 5.0, 5.0]):
        metric.reset()
        metric.update(torch.tensor(first), torch.tensor([1, 2, 3]))
        assert math.isnan(float(metric.compute()))
