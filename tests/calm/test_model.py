"""Tests of `CALM`: it equals the anchor at initialization, is causal, and decodes with a cache what one pass computes."""

import copy
import gc
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_align.calm import attention_inputs
from lightning_align.calm.connections import Connection, ConnectionConfig, Visible, even_pairs, visible_where
from lightning_align.calm.model import CALM
from lightning_align.calm.spec import Augment, AugmentInput
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.language_model import context_length
from lightning_align.models.pretrained import PretrainedLM
from tests.calm.toys import MAKERS, NAMED, SMALL, composed, connect, gpt2, logits, palms, random_tokens
from tests.toys import VOCABULARY, Plain, gap, tiny_palm

TOKENS = random_tokens()
OPTIONS: dict[str, dict[str, Any]] = {
    "even": {},
    "every": {"every": 2},
    "inputs": {"position": "input", "anchor_position": "input"},
    "one layer twice": {"connections": [[1, 2], [4, 2], [3, 3]]},
    "sum": {"connections": [[1, 2], [4, 2]], "combine": "sum"},
    "gated": {"connection": ConnectionConfig(heads=2, dim_head=8, gate=True, norm=False)},
    "no projection, no rotation": {"connection": ConnectionConfig(heads=3, project=False, rotary=False)},
}


def perturbed(tokens: Tensor, place: int) -> Tensor:
    other = tokens.clone()
    other[:, place] = (other[:, place] + 3) % VOCABULARY
    return other


@pytest.mark.parametrize("anchor", MAKERS)
@pytest.mark.parametrize("augment", MAKERS)
def test_any_two_models_compose(anchor: str, augment: str) -> None:
    below, beside = MAKERS[anchor]().double(), MAKERS[augment]().double()
    below.train()
    spec = Augment(beside, num_connections=2, layers=NAMED.get(augment), tokens="shared")
    model = CALM(below, spec, connection=SMALL, anchor_layers=NAMED.get(anchor))
    before = logits(below, TOKENS)
    assert gap(model(TOKENS), before) == 0, "an untrained composition equals its anchor"
    connect(model)
    after = model(TOKENS).detach()
    assert gap(after, before) > 1e-3
    assert gap(logits(below, TOKENS), before) == 0, "the anchor alone is unchanged"
    changed = (model(perturbed(TOKENS, 5)) - after).abs().amax(dim=(0, 2))
    assert changed[:5].max() == 0
    assert changed[5] > 0
    model.release()
    assert all(p.requires_grad for p in below.parameters())
    assert below.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*below.modules(), *beside.modules()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_position_sees_a_later_one(options: dict[str, Any]) -> None:
    model = composed(**options)
    want = model(TOKENS)
    for place in range(1, TOKENS.shape[1]):
        changed = (model(perturbed(TOKENS, place)) - want).abs().amax(dim=(0, 2))
        assert changed[:place].max() == 0
        assert changed[place] > 0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decoding_with_a_cache_equals_one_pass(options: dict[str, Any]) -> None:
    model = composed(**options)
    want = model.hidden(TOKENS)
    cache = model._make_cache(2, TOKENS.shape[1])
    parts = [model.hidden(part, cache=cache) for part in (TOKENS[:, :3], TOKENS[:, 3:5], *TOKENS[:, 5:].split(1, dim=1))]
    assert gap(torch.cat(parts, dim=1), want) < 1e-12
    assert cache.length == TOKENS.shape[1]


def test_causality_test_detects_a_missing_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = composed()
    without_mask = lambda i, reader, given, tokens, *_: (AugmentInput(tokens), Visible(None))  # noqa: E731
    monkeypatch.setattr(attention_inputs, "visible_input", without_mask)
    changed = (model(perturbed(TOKENS, 8)) - model(TOKENS)).abs().amax(dim=(0, 2))
    assert changed[:8].max() > 1e-3


def test_padding_changes_nothing() -> None:
    model = composed()
    want = model.hidden(TOKENS[:1, :6])
    right = torch.tensor([[True] * 6 + [False] * 3])
    assert gap(model.hidden(TOKENS[:1], mask=right)[:, :6], want) < 1e-12
    left = torch.cat([torch.zeros(1, 3, dtype=torch.long), TOKENS[:1, :6]], dim=1)
    # Padding shifts the positions, and the rotary tables are in float32.
    assert gap(model.hidden(left, mask=right.flip(1))[:, 3:], want) < 1e-5


@pytest.mark.parametrize("alignment", ["aligned", "prefix"])
def test_sampling_with_caches_equals_sampling_without(alignment: str) -> None:
    model = composed(num_connections=2, alignment=alignment)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    config = GenerationConfig(max_new_tokens=7, temperature=0)
    fast = generate(model, prompts, config, eos_id=4)
    for prompt, responses in zip(prompts, fast, strict=True):
        with model.given([AugmentInput(torch.tensor([prompt])) if alignment == "prefix" else None]):
            assert generate(Plain(model), [prompt], config, eos_id=4) == [responses]


@pytest.mark.parametrize("wrapped", [True, False], ids=["with hidden states", "bare"])
def test_prefix_with_learned_positions_does_not_depend_on_the_batch(wrapped: bool) -> None:
    augment = PretrainedLM(config=gpt2().config.to_dict()) if wrapped else gpt2()
    spec = Augment(augment.double(), alignment="prefix", num_connections=2)
    model = connect(CALM(palms()[0], spec, connection=SMALL))
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]]
    config = GenerationConfig(max_new_tokens=6, temperature=0)
    together = generate(model, prompts, config)
    alone = [generate(model, [prompt], config)[0] for prompt in prompts]
    assert together == alone
    assert together[1][0].logprobs == pytest.approx(alone[1][0].logprobs, abs=1e-5)


@pytest.mark.parametrize(
    ("spec", "most"),
    [({}, 12), ({"alignment": "prefix"}, 32), ({"tokens": "own"}, 32)],
    ids=["aligned", "prefix", "own tokenizer"],
)
def test_responses_end_at_the_shorter_context(spec: dict[str, Any], most: int) -> None:
    model = CALM(gpt2(), Augment(gpt2(12), num_connections=2, **spec), connection=SMALL)
    assert context_length(model) == most
    if "tokens" not in spec:
        with model.given([AugmentInput(torch.tensor([[1, 2, 3]])) if spec else None]):
            ((response,),) = generate(model, [[1, 2, 3]], GenerationConfig(max_new_tokens=40, temperature=0))
        assert (len(response.tokens), response.reason) == (most - 3, "length")
    assert context_length(composed()) is None
    assert context_length(CALM(palms()[0], gpt2(12), connection=SMALL)) == 12


def test_padding_of_a_prefix_on_either_side_changes_nothing() -> None:
    model = connect(CALM(palms()[0], Augment(gpt2().double(), alignment="prefix", num_connections=2), connection=SMALL))
    prefix, pads = random_tokens(2, 5), torch.zeros(2, 3, dtype=torch.long)
    seen = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0])

    model.augments[0].register_forward_pre_hook(keep, with_kwargs=True)
    want = model(TOKENS, inputs=[AugmentInput(prefix)])
    mask = torch.tensor([[True] * 5 + [False] * 3] * 2)
    right, left = torch.cat([prefix, pads], dim=1), torch.cat([pads, prefix], dim=1)
    assert gap(model(TOKENS, inputs=[AugmentInput(right, mask)]), want) < 1e-12
    assert gap(model(TOKENS, inputs=[AugmentInput(left, mask.flip(1))]), want) < 1e-12
    assert torch.equal(seen[1], right), "a prefix that is padded on the right is read as it is"


def test_every_position_sees_the_prefix_which_is_read_once() -> None:
    model = composed(alignment="prefix", num_connections=3)
    prefix = random_tokens(2, 5)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    inputs = [AugmentInput(prefix, mask)]
    want = model(TOKENS, inputs=inputs)
    changed = (model(TOKENS, inputs=[AugmentInput(perturbed(prefix, 4), mask)]) - want).abs().amax(dim=2)
    assert changed[0].min() > 0, "the first position sees the last token of the prefix"
    assert changed[1].max() == 0, "no position sees a pad"
    assert (model(perturbed(TOKENS, 5), inputs=inputs) - want).abs().amax(dim=(0, 2))[:5].max() == 0
    cache = model._make_cache(2, TOKENS.shape[1])
    first = model.hidden(TOKENS[:, :4], cache=cache, inputs=inputs)
    rest = [model.hidden(part, cache=cache) for part in TOKENS[:, 4:].split(1, dim=1)]
    assert gap(torch.cat([first, *rest], dim=1), model.hidden(TOKENS, inputs=inputs)) < 1e-12
    with pytest.raises(ValueError, match="must be an AugmentInput, because augment 0 reads a prefix"):
        model(TOKENS)


def test_an_augment_need_not_be_a_language_model() -> None:
    anchor, _ = palms()
    picture = nn.Sequential(nn.Linear(7, 10), nn.Tanh()).double()
    with pytest.raises(ValueError, match="set `dim` to the width of its hidden states"):
        CALM(anchor, Augment(picture, layers="", alignment="prefix", num_connections=1))
    model = connect(CALM(anchor, Augment(picture, layers="", alignment="prefix", dim=10, num_connections=1), connection=SMALL))
    seen = torch.randn(2, 4, 7, dtype=torch.float64)
    want = model(TOKENS, inputs=[AugmentInput(seen)])
    assert (model(TOKENS, inputs=[AugmentInput(seen + 1)]) - want).abs().amax(dim=2).min() > 0


def test_encoder_can_read_a_prefix_but_cannot_be_aligned() -> None:
    anchor, _ = palms()
    encoder = tiny_palm(depth=2, dtype=torch.float64, causal=False)
    with pytest.raises(ValueError, match="must be causal"):
        CALM(anchor, encoder)
    model = CALM(anchor, Augment(encoder, alignment="prefix"), connection=SMALL)
    assert gap(model(TOKENS, inputs=[AugmentInput(TOKENS)]), anchor(TOKENS)) == 0


def test_several_augments() -> None:
    anchor, augment = palms()
    other = tiny_palm(depth=2, dim=8, dtype=torch.float64, seed=4)
    pairs = [Augment(augment, connections=[[4, 2]]), Augment(other, connections=[[2, 2], [1, 3]])]
    model = connect(CALM(anchor, pairs, connection=SMALL))
    assert [tuple(spot) for spot in model.spots] == [(0, 4, 2), (1, 2, 2), (1, 1, 3)]
    want = model(TOKENS)
    changed = (model(perturbed(TOKENS, 4)) - want).abs().amax(dim=(0, 2))
    assert changed[:4].max() == 0
    cache = model._make_cache(2, 9)
    parts = [model.hidden(part, cache=cache) for part in TOKENS.split(2, dim=1)]
    assert gap(torch.cat(parts, dim=1), model.hidden(TOKENS)) < 1e-12
    summed = connect(CALM(anchor, pairs, connection=SMALL, combine="sum"))
    assert gap(summed(TOKENS), want) > 1e-4, "in sequence, the second connection sees the output of the first"


@torch.no_grad()
def test_connection_equals_a_calculation_by_hand() -> None:
    """With one head and no norm, compute W_o softmax(q K' / sqrt(k)) V position by position, in float64."""
    torch.manual_seed(3)
    connection = Connection(4, 3, ConnectionConfig(heads=1, norm=False, rotary=False)).double()
    nn.init.normal_(connection.to_out.weight)
    hidden, states = torch.randn(1, 5, 4, dtype=torch.float64), torch.randn(1, 5, 3, dtype=torch.float64)
    k, v = connection.keys_values(states, torch.arange(5))
    got = connection(hidden, k, v, torch.arange(5), Visible(None, causal=True))
    projected = states[0] @ connection.proj.weight.T
    w_k, w_v = connection.to_kv.weight.chunk(2)
    for t in range(5):
        query = connection.to_q.weight @ hidden[0, t]
        scores = [float(query @ (w_k @ projected[j])) / math.sqrt(4) for j in range(t + 1)]
        total = sum(math.exp(s) for s in scores)
        mixed = sum((math.exp(s) / total * (w_v @ projected[j]) for j, s in enumerate(scores)), torch.zeros(4).double())
        assert gap(got[0, t], connection.to_out.weight @ mixed) < 1e-12
    weights = connection.attention(hidden, k, torch.arange(5), Visible(None, causal=True))
    assert gap(weights.sum(-1), torch.ones(1, 1, 5)) < 1e-6
    assert weights.triu(1).max() == 0


def test_rotary_attention_depends_only_on_distances() -> None:
    connection = Connection(8, 8, ConnectionConfig(heads=2))
    nn.init.normal_(connection.to_out.weight)
    hidden, states, places = torch.randn(1, 5, 8), torch.randn(1, 5, 8), torch.arange(5)

    def run(query_shift: int, key_shift: int) -> Tensor:
        k, v = connection.keys_values(states, places + key_shift)
        return connection(hidden, k, v, places + query_shift, Visible(None, causal=True)).detach()

    assert gap(run(0, 0), run(11, 11)) < 1e-5
    assert gap(run(0, 0), run(2, 0)) > 1e-3


def test_positions_that_see_nothing_get_zero() -> None:
    connection = Connection(8, 8, ConnectionConfig(heads=2))
    nn.init.normal_(connection.to_out.weight)
    hidden = torch.randn(1, 3, 8, requires_grad=True)
    k, v = connection.keys_values(torch.randn(1, 4, 8), torch.arange(4))
    allowed = torch.tensor([[[False] * 4, [True] * 4, [False] * 4]])
    out = connection(hidden, k, v, torch.arange(3), visible_where(allowed))
    assert out[0, 0].abs().max() == out[0, 2].abs().max() == 0
    assert out[0, 1].abs().min() > 0
    out.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_only_connections_train() -> None:
    model = composed(torch.float32)
    model.train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("connections.")}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    assert all((p.grad is not None) == name.startswith("connections.") for name, p in model.named_parameters())
    assert all(bool(p.grad.abs().max() > 0) for p in model.connections.parameters() if p.grad is not None)
    optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert not model.anchor.training
    assert not model.augments.training
    assert model.connections.training


def test_frozen_models_apply_no_dropout() -> None:
    anchor, augment = tiny_palm(depth=2, ff_dropout=0.5), tiny_palm(depth=2, ff_dropout=0.5, seed=2)
    model = CALM(anchor, augment, connection=SMALL).train()
    assert torch.equal(model(TOKENS), model(TOKENS))


def test_augments_run_no_layer_above_the_last_one_read() -> None:
    anchor, augment = palms()
    seen: list[int] = []
    for depth, block in enumerate(augment.blocks, start=1):
        block.register_forward_hook(lambda *_, depth=depth: seen.append(depth))
    model = CALM(anchor, Augment(augment, connections=[[2, 1]]), connection=SMALL)
    seen.clear()
    model(TOKENS)
    assert seen == [1, 2]


def test_states_that_a_model_overwrites_are_copied() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, tokens: Tensor) -> Tensor:
            x: Tensor = self.embed(tokens)
            for block in self.blocks:
                # PaLM-rlhf-pytorch does this when no gradients are kept
                x = block.pass_on(x.add_(x.cumsum(dim=1)))  # type: ignore[operator,union-attr]
            return x

    model = InPlace()
    for block in model.blocks:
        block.pass_on = nn.Identity()  # type: ignore[assignment]
    spec = Augment(model, layers="blocks.*.pass_on", connections=[[1, 1], [2, 1], [3, 1]])
    states = CALM(tiny_palm(), spec, connection=SMALL).readers[0].read(TOKENS, None, None, None)
    assert gap(states[1].cumsum(dim=1) + states[1], states[2]) < 1e-5
    assert gap(states[1], states[3]) > 1e-2


def test_forward_pass_leaves_no_tensors_behind() -> None:
    model = composed(torch.float32)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    model(TOKENS).sum().backward()
    before = tensors()
    for _ in range(3):
        model(TOKENS).sum().backward()
    assert tensors() == before


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised by dynamo, not by this code
@pytest.mark.parametrize("part", ["anchor", "augment", "whole", "before"])
def test_compiled_parts_give_the_same_result(part: str) -> None:
    # The models are as small as possible, because tracing takes the time.
    torch._dynamo.reset()
    anchor, augment = tiny_palm(depth=1), tiny_palm(depth=2, seed=1)
    alone = anchor(TOKENS)
    if part == "before":
        anchor.compile(backend="eager")
        anchor(TOKENS)
    model = connect(CALM(anchor, Augment(augment, connections=[[1, 1]]), connection=SMALL))
    want = model.hidden(TOKENS)
    modules: dict[str, list[nn.Module]] = {"anchor": [anchor], "augment": [augment], "whole": [model], "before": []}
    for module in modules[part]:
        module.compile(backend="eager")
    assert gap(anchor.head.logits(want), alone) > 1e-3
    for _ in range(2):
        assert gap(anchor(TOKENS), alone) < 1e-6
        assert gap(anchor.head.logits(want), model(TOKENS)) < 1e-5


def test_copy_is_an_independent_composition() -> None:
    model = composed()
    other = copy.deepcopy(model)
    nn.init.zeros_(other.connections[0].to_out.weight)  # type: ignore[union-attr,arg-type]
    assert gap(other(TOKENS), model(TOKENS)) > 1e-3
    nested = nn.ModuleDict({"inner": model})
    assert set(nested.state_dict()) == {f"inner.{name}" for name in model.state_dict()}
    assert {n for n, _ in model.named_parameters()} == set(model.state_dict())


def test_even_pairs_match_the_paper() -> None:
    assert even_pairs(12, 4, 4) == [(3, 1), (6, 2), (9, 3), (12, 4)]
    assert even_pairs(12, 24, 3) == [(4, 8), (8, 16), (12, 24)]
    anchor, augment = palms()
    assert [tuple(s)[1:] for s in CALM(anchor, augment, connection=SMALL).spots] == [(4, 3)], "one connection per four layers"


def test_tracing_measures_the_contributions() -> None:
    model = composed()
    with model.tracing(maps=True) as traces:
        model(TOKENS)
    assert [t.name for t in traces] == ["augment0_layer2_to_layer1", "augment0_layer4_to_layer3"]
    assert all(0 < float(t.ratio) < 100 for t in traces)
    assert all(t.weights is not None and t.weights.shape == (2, 2, 9, 9) for t in traces)
    with model.tracing() as traces:
        model(TOKENS)
    assert traces[0].weights is None
