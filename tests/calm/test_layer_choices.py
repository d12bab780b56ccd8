"""Tests of layers and connections given as modules, positions per connection, masks by name, and returned hidden states."""

import dataclasses
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.calm.connections import Connection, ConnectionConfig, Visible
from lightning_align.calm.model import CALM
from lightning_align.calm.module import CALMModule
from lightning_align.calm.spec import Augment, AugmentInput, described_augment
from lightning_align.calm.streams import returned_states, stream_of, with_stream
from lightning_align.models.attention import PaddedAttention
from lightning_align.models.palm import PaLM, rotary
from tests.calm.slow import slow_connection
from tests.calm.toys import SMALL, composed, connect, palms, random_tokens
from tests.toys import VOCABULARY, gap

TOKENS = random_tokens()
PLAIN = ConnectionConfig(heads=2, dim_head=8, rotary=False)
Pair = namedtuple("Pair", ["hidden", "other"])


@dataclasses.dataclass
class Output:
    other: int
    hidden_state: Tensor
    last: Tensor | None = None


FORMS: dict[str, Any] = {
    "tuple": lambda x: (x, None),
    "list": lambda x: [x, 3],
    "later in a tuple": lambda x: (None, x),
    "named tuple": lambda x: Pair(x, None),
    "dictionary": lambda x: {"weights": torch.zeros(1), "hidden_states": x},
    "dataclass": lambda x: Output(1, x),
}


def run_blocks(model: PaLM, tokens: Tensor, added: dict[tuple[int, str], Any]) -> tuple[Tensor, dict[tuple[int, str], Tensor]]:
    """Run a PaLM block by block, and return its logits and the hidden states before and after each block.

    Args:
        model: The model.
        tokens: (B, N) token ids.
        added: Functions of the hidden state whose results are added to it, by layer and position.
    """
    x = model.token_emb(tokens)
    table = rotary(torch.arange(tokens.shape[1]), model.dim_head, xpos_scale_base=model.xpos_scale_base)
    states = {}
    for number, block in enumerate(model.blocks, start=1):
        for position in ("input", "output"):
            if position == "output":
                x = block(x, table, PaddedAttention(True, None))
            for add in added.get((number, position), []):
                x = x + add(x)
            states[number, position] = x
    return model.head.logits(model.norm(x)), states  # type: ignore[union-attr]


class Formed(nn.Module):
    """A causal model whose layers are attributes and return their hidden state in some form."""

    def __init__(self, form: Any, width: int = 12) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.first, self.second = Layer(form, width), Layer(form, width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in (self.first, self.second):
            x = stream_of(layer(hidden_states=x))
        out: Tensor = self.out(x)
        return out


class Layer(nn.Module):
    def __init__(self, form: Any, width: int) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(width, width), form

    def forward(self, hidden_states: Tensor) -> Any:
        return self.form(hidden_states + self.linear(hidden_states).cumsum(dim=1))


def formed(form: Any, seed: int = 0) -> Formed:
    torch.manual_seed(seed)
    return Formed(form).double()


CHOICES: dict[str, Any] = {
    "modules": lambda model: list(model.blocks),
    "a list of modules": lambda model: model.blocks,
    "a function": lambda model: lambda whole: whole.blocks,
    "names": lambda model: [f"blocks.{i}" for i in range(4)],
    "patterns": lambda model: ["blocks.0", "blocks.*"][1:],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_layers_as_modules_names_or_a_function(choice: str) -> None:
    want = composed(connections=[[2, 1], [4, 3]])(TOKENS)
    anchor, augment = palms()
    given = {"layers": CHOICES[choice](augment), "connections": [[2, 1], [4, 3]]}
    model = connect(CALM(anchor, Augment(augment, **given), connection=SMALL, anchor_layers=lambda model: model.blocks[:3]))
    assert gap(model(TOKENS), want) == 0
    some = [augment.blocks[1], augment.blocks[3]]
    anchor, _ = palms()
    model = connect(CALM(anchor, Augment(augment, layers=some, connections=[[1, 1], [2, 3]]), connection=SMALL))
    assert gap(model(TOKENS), want) == 0


def test_connections_of_modules() -> None:
    want = composed(connections=[[2, 1], [4, 3]])(TOKENS)
    anchor, augment = palms()
    pairs = [(augment.blocks[1], anchor.blocks[0]), (augment.blocks[3], 3)]
    spec = Augment(augment, connections=pairs)
    assert described_augment(spec)["connections"] == [["blocks.1", None], ["blocks.3", 3]]
    model = connect(CALM(anchor, spec, connection=SMALL))
    assert gap(model(TOKENS), want) == 0
    assert [tuple(spot) for spot in model.spots] == [(0, 2, 1), (0, 4, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "`layers` must list different modules of the PaLM, but got none"),
        ({"layers": [nn.Linear(1, 1)]}, "but got a Linear that is not in it"),
        ({"layers": ["blocks.0", "blocks.*"]}, "but got a PaLMBlock that is twice"),
        ({"connections": [[nn.Linear(1, 1), 1]]}, "contains a Linear that is not one of the layers. .* `layers`"),
        ({"connections": [[1, nn.Linear(1, 1)]]}, "contains a Linear that is not one of the layers. .* `anchor_layers`"),
        ({"connections": [["1", 1]]}, "must contain pairs"),
        ({"position": "middle"}, "`position` must be 'input' or 'output'"),
        ({"position": ["input"], "num_connections": 2}, "one of them per connection, 2 in all, but got"),
        ({"anchor_position": ["input", "inputs"], "num_connections": 2}, "`anchor_position` must be 'input' or 'output'"),
        ({"connections": [[1, 1], [1, 2]], "position": ["input", "output"]}, "layer 1 is read at its input and at its output"),
        (
            {"mask_kwarg": "keep"},
            "`mask_kwarg` must be an argument of the forward method of the PaLM, .* has the method `hidden`",
        ),
        (
            {"return_hiddens": True},
            r"augment 0 \(PaLM\) must return its hidden states for `return_hiddens`, but returned a Tensor",
        ),
        ({"return_hiddens": True, "layers": "blocks.*"}, "`position` and `layers` cannot be set with `return_hiddens`"),
        ({"input_shape": [3, 4], "alignment": "prefix"}, r"cannot be run on an input of shape \(1, 3, 4\)"),
    ],
)
def test_wrong_choices(options: dict[str, Any], message: str) -> None:
    anchor, augment = palms()
    with pytest.raises(ValueError, match=message):
        CALM(anchor, Augment(augment, **options), connection=SMALL)
    assert all(p.requires_grad for p in (*anchor.parameters(), *augment.parameters()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*anchor.modules(), *augment.modules()))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_positions_per_connection_equal_a_slow_version(qk_norm: bool) -> None:
    anchor, augment = palms()
    pairs = [[1, 2], [2, 2], [3, 1], [4, 3]]
    reads, adds = ["input", "output", "input", "output"], ["output", "input", "input", "output"]
    spec = Augment(augment, connections=pairs, position=reads, anchor_position=adds)
    model = CALM(anchor, spec, connection=dataclasses.replace(PLAIN, qk_norm=qk_norm, gate=True))
    plain, states = run_blocks(augment, TOKENS, {})
    assert gap(plain, augment(TOKENS)) < 1e-12
    assert gap(model(TOKENS), anchor(TOKENS)) == 0, "an untrained composition equals its anchor"
    connect(model)
    added: dict[tuple[int, str], Any] = {}
    for (depth, layer), read, at, connection in zip(pairs, reads, adds, model.connections, strict=True):
        state = states[depth, read]
        add = lambda x, c=connection, s=state: slow_connection(c, x, s, causal=True)  # noqa: E731
        added.setdefault((layer, at), []).append(add)
    want, _ = run_blocks(anchor, TOKENS, added)
    assert gap(want, anchor(TOKENS)) > 1e-3
    assert gap(model(TOKENS), want) < 1e-9
    cache = model._make_cache(2, TOKENS.shape[1])
    parts = [model.hidden(part, cache=cache) for part in TOKENS.split([4, 1, 1, 3], dim=1)]
    assert gap(torch.cat(parts, dim=1), model.hidden(TOKENS)) < 1e-12


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_layers_may_return_tuples_dictionaries_and_dataclasses(form: Any) -> None:
    def build(form: Any) -> CALM:
        below, beside = formed(form), formed(form, seed=1)
        names = ["first", "second"]
        spec = Augment(beside, layers=names, connections=[[1, 1], [2, 2]], position=["input", "output"])
        return CALM(below, spec, connection=SMALL, anchor_layers=names)

    model = build(form)
    assert gap(model(TOKENS), model.anchor(TOKENS)) == 0
    want = connect(build(lambda x: x))(TOKENS)
    assert gap(connect(model)(TOKENS), want) == 0
    assert gap(want, model.anchor(TOKENS)) > 1e-3


def test_form_is_kept() -> None:
    x, y = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    for form in FORMS.values():
        changed = with_stream(form(x), y)
        assert type(changed) is type(form(x))
        assert stream_of(changed) is y
        assert str(changed).replace("1.", "0.") == str(form(x)), "nothing else changes"
    with pytest.raises(ValueError, match="there is none in a NoneType"):
        stream_of(None)


class Returning(nn.Module):
    """A PaLM that returns its hidden states in some form."""

    def __init__(self, model: PaLM, form: Any) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, tokens: Tensor) -> Any:
        logits, states = run_blocks(self.model, tokens, {})
        outputs = [states[n, "output"] for n in range(1, len(self.model.blocks) + 1)]
        return self.form(logits, states[1, "input"], outputs)


@dataclasses.dataclass
class Hiddens:
    logits: Tensor
    hidden_states: tuple[Tensor, ...]


RETURNS: dict[str, Any] = {
    "list": lambda logits, first, states: states,
    "tuple": lambda logits, first, states: tuple(states),
    "logits and list": lambda logits, first, states: (logits, states),
    "dataclass": lambda logits, first, states: Hiddens(logits, (first, *states)),
    "dictionary": lambda logits, first, states: {"logits": logits, "hidden_states": [first, *states]},
}


@pytest.mark.parametrize("alignment", ["aligned", "prefix"])
@pytest.mark.parametrize("form", RETURNS.values(), ids=RETURNS)
def test_returned_hidden_states_equal_those_of_the_layers(form: Any, alignment: str) -> None:
    inputs = [AugmentInput(random_tokens(2, 5))] if alignment == "prefix" else None
    options: dict[str, Any] = {"connections": [[2, 1], [4, 3]], "alignment": alignment}
    want = composed(**options)
    anchor, augment = palms()
    model = CALM(anchor, Augment(Returning(augment, form), return_hiddens=True, **options), connection=SMALL)
    assert gap(model(TOKENS, inputs=inputs), anchor(TOKENS)) == 0
    assert gap(connect(model)(TOKENS, inputs=inputs), want(TOKENS, inputs=inputs)) == 0
    assert not any(module._forward_hooks for module in augment.modules())
    if alignment == "aligned":
        assert model.make_cache is None, "the model cannot continue its hidden states"
        return
    cache = model._make_cache(2, 9)
    parts = [model.hidden(TOKENS[:, :4], cache=cache, inputs=inputs), model.hidden(TOKENS[:, 4:], cache=cache)]
    assert gap(torch.cat(parts, dim=1), model.hidden(TOKENS, inputs=inputs)) < 1e-12


def test_transformers_returns_the_hidden_states_when_asked() -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=VOCABULARY, **sizes)).double().eval()
    prefix, mask = random_tokens(2, 5), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    options: dict[str, Any] = {"alignment": "prefix", "connections": [[1, 1], [3, 3]]}
    found = []
    for returned in (True, False):
        model = connect(CALM(palms()[0], Augment(bert, return_hiddens=returned, **options), connection=SMALL))
        found.append(model(TOKENS, inputs=[AugmentInput(prefix, mask)]))
        model.release()
    assert gap(found[0], found[1]) < 1e-12
    with pytest.raises(ValueError, match="must be causal"):
        CALM(palms()[0], Augment(bert, return_hiddens=True, tokens="shared"))


def test_returned_states_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="a dict without a list of hidden states"):
        returned_states({"logits": torch.zeros(1)})


class Encoder(nn.Module):
    """A bidirectional encoder of float features whose mask has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        )

    def forward(self, x: Tensor, keep: Tensor | None = None, src_key_padding_mask: Tensor | None = None) -> Tensor:
        padding = src_key_padding_mask if keep is None else ~keep
        out: Tensor = self.encoder(x, src_key_padding_mask=padding)
        return out


@pytest.mark.parametrize("name", ["keep", "src_key_padding_mask"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_mask_by_name(name: str, left: bool) -> None:
    torch.manual_seed(0)
    encoder = Encoder().double()
    spec = Augment(encoder, layers="encoder.layers.*", alignment="prefix", input_shape=[4, 8], mask_kwarg=name, every=1)
    model = connect(CALM(palms()[0], spec, connection=SMALL))
    seen, mask = torch.randn(2, 5, 8, dtype=torch.float64), torch.ones(2, 7, dtype=torch.bool)
    want = model(TOKENS, inputs=[AugmentInput(seen)])
    mask[:, :2] = False
    pads = 9 * torch.ones(2, 2, 8, dtype=torch.float64)
    padded = torch.cat([pads, seen], dim=1)
    if not left:
        mask, padded = mask.flip(1), torch.cat([seen, pads], dim=1)
    assert gap(model(TOKENS, inputs=[AugmentInput(padded, mask)]), want) < 1e-9
    model.release()
    blind = connect(CALM(palms()[0], spec.with_changes(mask_kwarg=None), connection=SMALL))
    with pytest.raises(ValueError, match="accepts no mask"):
        blind(TOKENS, inputs=[AugmentInput(padded, mask)])


class Pyramid(nn.Module):
    """A model of pictures whose layers have different widths and numbers of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.layers = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 14)])

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = self.layers[0](x).tanh().unflatten(1, (-1, 2)).mean(dim=2)
        out: Tensor = self.layers[1](x)
        return out


def test_model_of_pictures_with_layers_of_different_widths() -> None:
    spec = Augment(Pyramid().double(), alignment="prefix", input_shape=[3, 8, 8], connections=[[1, 1], [2, 3]])
    model = CALM(palms()[0], spec, connection=SMALL)
    assert [c.to_kv.in_features for c in model.connections] == [24, 24]  # type: ignore[union-attr]
    assert [c.proj.in_features for c in model.connections] == [10, 14]  # type: ignore[union-attr]
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert gap(model(TOKENS, inputs=[AugmentInput(images)]), model.anchor(TOKENS)) == 0
    want = connect(model)(TOKENS, inputs=[AugmentInput(images)])
    changed = images.clone()
    changed[1, :, 0, 0] += 1
    rows = (model(TOKENS, inputs=[AugmentInput(changed)]) - want).abs().amax(dim=2)
    assert rows[0].max() == 0
    assert rows[1].min() > 0
    with pytest.raises(ValueError, match=r"shape \(rows, positions, width\), but got \(1, 6, 2, 2\)"):
        CALM(palms()[0], Augment(Pyramid(), alignment="prefix", layers=["patches"], input_shape=[3, 8, 8], every=1))


def test_mask_over_the_positions_of_a_picture() -> None:
    spec = Augment(Pyramid().double(), alignment="prefix", input_shape=[3, 8, 8], connections=[[1, 2]])
    model = connect(CALM(palms()[0], spec, connection=SMALL))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False]] * 2)
    want = model(TOKENS, inputs=[AugmentInput(images, mask)])
    hidden, seen = images.clone(), images.clone()
    hidden[:, :, 4:] += 1  # the lower half, the last two patches
    seen[:, :, :4] += 1
    assert gap(model(TOKENS, inputs=[AugmentInput(hidden, mask)]), want) == 0
    assert gap(model(TOKENS, inputs=[AugmentInput(seen, mask)]), want) > 1e-3


def test_attention_dropout_is_active_only_in_training() -> None:
    torch.manual_seed(0)
    connection = Connection(8, 8, dataclasses.replace(PLAIN, dim_head=4, attn_dropout=0.25)).double()
    connection.to_out = nn.Identity()  # type: ignore[assignment]
    hidden, states = torch.randn(1, 200, 8).double(), torch.randn(1, 1, 8).double()
    k, v = connection.keys_values(states, torch.arange(1))
    run = lambda: connection(hidden, k, v, torch.arange(200), Visible(None)).unflatten(-1, (2, 4))  # noqa: E731
    value = v[0, :, 0]
    assert gap(run()[0], (value / 0.75) * (run()[0, :, :, :1] != 0)) > 0, "each run drops other weights"
    # With a single key its weight is 1, so a head gets nothing, or the value divided by the probability of keeping it.
    shares = run()[0] / value
    assert sorted(set(shares.detach().flatten().mul(3).round().tolist())) == [0, 4]
    connection.eval()
    assert gap(run()[0], value.expand(200, -1, -1)) < 1e-12
    with pytest.raises(ValueError, match="`attn_dropout` must be at least 0 and below 1, but got 1"):
        ConnectionConfig(attn_dropout=1.0)


def test_composition_with_dropout_decodes_like_the_whole() -> None:
    model = composed(connection=dataclasses.replace(SMALL, attn_dropout=0.5, qk_norm=True)).train()
    assert gap(model(TOKENS), model(TOKENS)) > 1e-6
    model.eval()
    cache = model._make_cache(2, TOKENS.shape[1])
    parts = [model.hidden(part, cache=cache) for part in TOKENS.split([3, 2, 1, 3], dim=1)]
    assert gap(torch.cat(parts, dim=1), model.hidden(TOKENS)) < 1e-12


def test_module_stores_names_and_keys_of_what_is_read(tmp_path: Path) -> None:
    anchor, augment = palms(torch.float32)
    spec = Augment(augment, layers=list(augment.blocks)[1:], connections=[[1, 1], [3, 2]], position=["input", "output"])
    module = CALMModule(anchor, [spec], connection=SMALL, anchor_layers=anchor.blocks)
    assert module.hparams["anchor_layers"] == ["blocks.0", "blocks.1", "blocks.2"]
    assert module.hparams["augments"][0]["layers"] == ["blocks.1", "blocks.2", "blocks.3"]
    assert module.hparams["augments"][0]["position"] == ["input", "output"]
    module.configure_model()
    assert len(module.policy.layers_to_recompute()) == 3
    assert module.policy.readers[0].site == "[1, 3] ['input', 'output'] ['blocks.1', 'blocks.3']"
    assert composed().readers[0].site == "[2, 4] output", "the states of earlier versions are found again"
