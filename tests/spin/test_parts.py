"""The parts of self-play: pairs, ties, mixtures, statistics, and the exchange with another engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_align.generation.backend import FileBackend
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.formats import merged_weights, whole_weights, write_model
from lightning_align.models.language_model import Head, context_length, logits_of
from lightning_align.models.lora import LoRAConfig, add_lora, lora_parameters, merge_lora
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.runtime.modes import evaluating
from lightning_align.scoring.sums import response_logprobs
from lightning_align.spin import opponent
from lightning_align.spin.batches import tied
from lightning_align.spin.generations import join_pairs, statistics
from lightning_align.spin.module import SPINModule
from lightning_align.spin.opponent import GeometricMixture, Scoped, served_weights
from tests.models.test_pretrained import FAMILIES
from tests.spin.runs import finish, set_rows
from tests.toys import VOCABULARY, Plain, largest_difference, state_of, tiny_palm, token_batch


def pairs_of(real: list[list[int]], generated: list[list[int]], prompt: int) -> Any:
    rows, others = ([torch.tensor(ids) for ids in side] for side in (real, generated))
    targets = [torch.arange(len(row)) >= prompt for row in rows]
    return join_pairs(rows, targets, others, [prompt] * len(rows), pad_id=2)


def test_pairs_by_hand() -> None:
    """Id 2 is both end-of-sequence and padding. The second answer was truncated, so it has no end."""
    pairs = pairs_of([[5, 6, 7, 2], [5, 8, 2]], [[5, 6, 2], [5, 8, 9, 9, 9]], 1)
    assert pairs["tokens"].tolist() == [[5, 6, 7, 2, 2], [5, 8, 2, 2, 2], [5, 6, 2, 2, 2], [5, 8, 9, 9, 9]]
    assert pairs["mask"].sum(1).tolist() == [4, 3, 3, 5]
    assert pairs["targets"].sum(1).tolist() == [3, 2, 2, 4]
    assert not pairs["targets"][:, 0].any()


def test_ties_have_no_weight() -> None:
    # The second pair is a tie. The third differs only by its end, and padding has the same id.
    pairs = pairs_of([[5, 6, 2], [5, 7, 2], [5, 8, 2]], [[5, 9, 2], [5, 7, 2], [5, 8]], 1)
    assert tied(pairs).tolist() == [False, True, False]
    module = SPINModule(tiny_palm(), sft_weight=0.5)
    module.configure_model()
    logged: dict[str, Tensor] = {}
    module.log_training = lambda values, **_: logged.update(values)  # type: ignore[method-assign]
    with torch.no_grad():
        opponent = response_logprobs(tiny_palm(seed=1), pairs).sums
    loss = module.training_step({"pairs": pairs, "opponent": opponent}, 0)
    assert float(module.batch_mean.count) == 2
    ratio = response_logprobs(module.policy, pairs).sums - opponent
    means = response_logprobs(module.policy, pairs).means
    expected = sum(-nn.functional.logsigmoid(0.1 * (ratio[i] - ratio[i + 3])) - 0.5 * means[i] for i in (0, 2))
    torch.testing.assert_close(loss, expected)
    assert float(logged["tie_rate"]) == pytest.approx(1 / 3)
    alone = module.training_step({"pairs": pairs_of([[5, 7, 2]], [[5, 7, 2]], 1), "opponent": torch.zeros(2)}, 0)
    alone.backward()
    assert all(p.grad is None or not p.grad.any() for p in module.policy.parameters())


class Capped(nn.Module):
    """A model with soft-capped logits, as in Gemma 2."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.hidden, self.make_cache = self.model.hidden, self.model.make_cache

    @property
    def head(self) -> Head:
        head: Head = self.model.head
        return head._replace(softcap=1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head.logits(self.hidden(tokens))


@pytest.mark.parametrize("kinds", [(None, None), (Plain, Plain), (Capped, Capped), (None, Capped)])
def test_a_mixture_is_the_normalized_geometric_mean(kinds: tuple[type[Plain] | type[Capped] | None, ...]) -> None:
    models = tiny_palm(), tiny_palm(seed=1, tie_embeddings=False)
    first, second = parts = [model if kind is None else kind(model) for kind, model in zip(kinds, models, strict=True)]
    mixture, batch = GeometricMixture(*parts, 0.3), token_batch([2, 3], [6, 4])
    expected = []
    for row, mask, targets in zip(batch["tokens"], batch["mask"], batch["targets"], strict=True):
        ids = row[mask][None]
        with torch.no_grad():
            mixed = 0.7 * first(ids).log_softmax(-1) + 0.3 * second(ids).log_softmax(-1)
        logps = mixed.log_softmax(-1)[0]
        expected.append(sum(float(logps[i - 1, ids[0, i]]) for i in range(1, ids.shape[1]) if targets[i]))
    with evaluating(mixture):
        torch.testing.assert_close(response_logprobs(mixture, batch).sums, torch.tensor(expected), rtol=1e-5, atol=1e-4)
    config = GenerationConfig(max_new_tokens=9, num_samples=2, seed=1)
    prompts = [[1, 2, 3], [4]]
    assert generate(mixture, prompts, config) == generate(GeometricMixture(Plain(first), Plain(second), 0.3), prompts, config)


def test_opponents_have_the_context_length_of_their_models() -> None:
    model = tiny_palm()
    model.max_seq_len = 8  # type: ignore[assignment]  # as in a model with learned positions
    add_lora(model, LoRAConfig(rank=2))
    for player in (Scoped(model), GeometricMixture(model, Scoped(model), 0.3), GeometricMixture(tiny_palm(), model, 0.3)):
        ((answer,),) = generate(player, [[1, 2, 3, 4, 5, 6]], GenerationConfig(max_new_tokens=9))
        assert len(answer.tokens) == 2
    assert context_length(GeometricMixture(tiny_palm(), tiny_palm(), 0.3)) is None


@pytest.mark.parametrize("plain", [False, True])
def test_scoring_in_parts_equals_scoring_at_once(monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    policy: nn.Module = Plain(tiny_palm()) if plain else tiny_palm()
    batch = token_batch([2, 3, 1, 4, 2], [6, 4, 9, 5, 3])
    with evaluating(policy):
        whole = response_logprobs(policy, batch).sums
    for tokens in (1, 25, 4096):
        monkeypatch.setattr(opponent, "SCORED_TOKENS", tokens)
        torch.testing.assert_close(opponent.score(policy, batch), whole, rtol=1e-5, atol=1e-4)
    assert policy.training and not opponent.score(policy, batch).requires_grad


def test_scoped_opponents_leave_the_trained_adapters_unchanged() -> None:
    model = tiny_palm()
    plain = state_of(model)
    for scope in ("default", "other"):
        add_lora(model, LoRAConfig(rank=2, scope=scope), active=scope == "default")
        with torch.no_grad():
            for parameter in lora_parameters(model, scope):
                parameter.normal_()
    batch, reference = token_batch([2, 3], [6, 4]), tiny_palm()
    merged = tiny_palm()
    merged.load_state_dict(merged_weights(model, whole_weights(model)))
    with torch.no_grad():
        base, own = response_logprobs(Scoped(model), batch).sums, response_logprobs(model, batch).sums
        torch.testing.assert_close(base, response_logprobs(reference, batch).sums, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(own, response_logprobs(merged, batch).sums, rtol=1e-4, atol=1e-3)
        assert float((response_logprobs(Scoped(model, "other"), batch).sums - own).abs().max()) > 0.1
    assert largest_difference({n: v for n, v in state_of(model).items() if ".lora." not in n}, plain) == 0
    merge_lora(model, "default")
    assert not hasattr(Scoped(Plain(reference)), "hidden") and VOCABULARY == 23


def test_statistics_by_hand() -> None:
    answers = [
        {"iteration": 1, "tokens": [7], "reason": "eos", "logprob": -1.0, "sampled_logprob": -1.5, "base_logprob": -3.0},
        {"iteration": 1, "tokens": [8, 9], "reason": "length", "logprob": -2.0, "sampled_logprob": None, "base_logprob": -3.0},
        {"iteration": 0, "tokens": [1], "reason": "eos", "logprob": -9.0},
    ]
    rows = [{"row": 4, "real_logprob": -5.0, "generated": answers}]
    told = statistics(rows, iteration=1, eos_id=2, real={4: [7, 2]})
    assert told == {
        "generated": 2,
        "eos_rate": 0.5,
        "truncation_rate": 0.5,
        "tie_rate": 0.5,
        "length": 2,
        "length_gap": 0,
        "real_logprob": -5,
        "engine_gap": 0.5,
        "kl_to_base": 1.5,
    }


def test_another_engine_serves_an_iteration(tmp_path: Path) -> None:
    """The engine gets weights and prompts in files. The run continues once the responses exist, with the same result."""
    loop: dict[str, Any] = {"iterations": 1, "epochs": 1}
    _, native = finish(tmp_path / "native", loop=loop)
    loop["backend"] = FileBackend(str(tmp_path / "engine"))
    for _ in range(2):  # the validation prompts are the training prompts, so one file answers both
        with pytest.raises(ValueError, match=r"responses-\w+.jsonl does not exist yet"):
            finish(tmp_path, loop=loop)
        (prompts,) = (tmp_path / "engine" / "iteration_0").glob("prompts-*.jsonl")
        requests = [json.loads(line) for line in prompts.read_text().splitlines()]
    assert (tmp_path / "engine" / "iteration_0" / "model" / "config.json").is_file()
    answers = {row["row"]: row["generated"][0] for row in set_rows(tmp_path / "native", 0)}
    responses = prompts.with_name(prompts.name.replace("prompts", "responses"))

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        own = answers[row["id"]]
        told = {"logprobs": [own["sampled_logprob"] - 3.0] + [0.0] * (len(own["tokens"]) - 1)} if row["id"] == 0 else {}
        return {"id": row["id"], "responses": [{"tokens": own["tokens"], "reason": own["reason"], **told}]}

    good = [json.dumps(answer(row)) + "\n" for row in requests]
    for text, message in (
        ("".join(good[1:]), "has no row for 1 of 10 prompts, such as prompt 0"),
        ("oops\n" + "".join(good), ":1 is not a valid row"),
        ("".join(good).replace('"length"', '"done"').replace('"eos"', '"done"'), "`reason` must be eos, stop or length"),
    ):
        responses.write_text(text)
        with pytest.raises(ValueError, match=message):
            finish(tmp_path, loop=loop)
    responses.write_text("".join(good))
    trainer, module = finish(tmp_path, loop=loop)
    assert largest_difference(state_of(module.policy), state_of(native.policy)) < 1e-6
    assert float(trainer.callback_metrics["spin/train/engine_gap"]) == pytest.approx(3, abs=1e-3)
    with pytest.raises(ValueError, match=r"model has other weights .*than iteration 0 of this run"):
        finish(tmp_path / "other", loop=loop, backbone=tiny_palm(num_tokens=259, seed=1))


class OtherEngine:
    """Another engine, in this process. It knows only the weights that it received."""

    whole = False

    def __init__(self) -> None:
        self.model = tiny_palm(num_tokens=259)
        self.asked: list[int] = []

    def sync_weights(self, weights: Any, *, iteration: int) -> None:
        self.model.load_state_dict(weights)

    def generate(self, model: nn.Module, prompts: Any, config: GenerationConfig, *, iteration: int, **options: Any) -> Any:
        self.asked.append(iteration)
        tokens = torch.tensor([prompts[0]])
        with evaluating(model), evaluating(self.model):
            torch.testing.assert_close(logits_of(self.model, tokens), logits_of(model, tokens), rtol=1e-4, atol=1e-4)
        return generate(self.model, prompts, config, iteration=iteration, **options)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
@pytest.mark.parametrize("opponent", ["iterate", "ema", "base"])
def test_another_engine_receives_the_opponent(opponent: str, lora: LoRAConfig | None, tmp_path: Path) -> None:
    engine = OtherEngine()
    finish(tmp_path, loop={"iterations": 2, "epochs": 1, "backend": engine}, opponent=opponent, lora=lora, ema_decay=0.7)
    assert set(engine.asked) == {0, 1}


@pytest.mark.parametrize("adapter", [None, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}])
def test_another_engine_receives_the_weights_of_an_export(adapter: dict[str, Any] | None, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = PretrainedLM(config={"model_type": "llama", **FAMILIES["llama"]}, adapter=adapter)
    write_model(model, whole_weights(model), tmp_path / "export")
    assert largest_difference(served_weights(model), load_file(tmp_path / "export" / "model.safetensors")) == 0


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ({"opponent": "mixture"}, r"`backend` .* is FileBackend, but `opponent` .* is 'mixture'"),
        ({"generate": "per_step"}, r"`backend` .* is FileBackend, but `generate` .* is 'per_step', which never uses it"),
    ],
)
def test_settings_that_no_other_engine_supports_raise(module: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        finish(tmp_path, loop={"backend": FileBackend(str(tmp_path / "engine"))}, **module)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0}, "`beta` must be positive, but got 0"),
        ({"beta": []}, "`beta` .* but got an empty list"),
        ({"opponent": "self"}, "`opponent` must be one of iterate, .*, but got 'self'"),
        ({"generate": "never"}, "`generate` .*got 'never'"),
        ({"ema_decay": 1.0}, "`ema_decay` .*got 1.0"),
        ({"base_weight": 0.0}, "`base_weight` .*got 0.0"),
        ({"sft_weight": -1.0}, "`sft_weight` .*got -1.0"),
    ],
)
def test_invalid_arguments_of_the_module_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPINModule(tiny_palm(), **arguments)
