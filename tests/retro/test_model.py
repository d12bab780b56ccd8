"""Tests of the RETRO model: equality with a version written in loops, causality, and equality with the decoder."""

import cmath
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_align.models.building import backbone_spec, build_backbone
from lightning_align.models.palm import ROTARY_BASE
from lightning_align.retro.attention import ChunkedCrossAttention, from_reading_positions, reading_positions
from lightning_align.retro.model import RETRO, NeighborTokens
from tests.retro.toys import SIZE, tiny_retro, tokens_and_neighbors
from tests.toys import gap, tiny_palm

LENGTH = 4 * SIZE + 2
CONDITIONED = pytest.mark.parametrize("conditioned", [True, False])


def slow_read(cross: ChunkedCrossAttention, x_ND: Tensor, encodings_UJRE: Tensor, mask_UJR: Tensor, size: int) -> Tensor:
    """Compute the cross-attention per position, head, neighbor and token, in float64 and with relative distances."""
    norm, dim_head, half = x_ND.double(), cross.dim_head, cross.dim_head // 2
    norm = (norm - norm.mean(-1, keepdim=True)) / (norm.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * cross.norm.weight
    q = (norm @ cross.to_q.weight.double().T).unflatten(-1, (cross.heads, dim_head))
    keys, values = (encodings_UJRE.double() @ cross.to_kv.weight.double().T).chunk(2, dim=-1)
    rows = []
    for i in range(len(x_ND)):
        u = (i + 1) // size - 1
        heads = []
        for h in range(cross.heads):
            scores, found = [], []
            for j, r in mask_UJR[u].nonzero().tolist() if 0 <= u < len(mask_UJR) else []:
                distance = i - (size * u + size - 1) - r + size - 1
                score = 0.0
                for a in range(half):
                    left = complex(q[i, h, a], q[i, h, half + a])
                    right = complex(keys[u, j, r, a], keys[u, j, r, half + a])
                    turn = cmath.exp(1j * distance * ROTARY_BASE ** (-a / half))
                    score += (left * turn * right.conjugate()).real
                scores.append(score / math.sqrt(dim_head))
                found.append(values[u, j, r])
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            heads.append(sum((w * v for w, v in zip(weights, found, strict=True)), torch.zeros(dim_head, dtype=torch.float64)))
        rows.append(torch.cat(heads) @ cross.out.weight.double().T)
    return torch.stack(rows)


@torch.no_grad()
def slow_hidden(model: RETRO, tokens_N: Tensor, neighbors: NeighborTokens) -> Tensor:
    """Compute the hidden states of one row, with each neighbor encoded alone."""
    decoder, captured = model.decoder, {}

    def replace(index: int) -> None:
        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0]
            if index == 0:
                encodings = torch.zeros(*neighbors.tokens.shape, model.encoder.norm.weight.shape[0], dtype=x.dtype)
                for u, j in neighbors.mask.any(-1).nonzero().tolist():
                    length = int(neighbors.mask[u, j].sum())
                    one = NeighborTokens(neighbors.tokens[None, None, u, j, :length], neighbors.mask[None, None, u, j, :length])
                    chunk = x[:, SIZE * u : SIZE * (u + 1)] if model.conditioned else None
                    encodings[u, j, :length] = model.encode(one, chunk)[0, 0]
                captured["encodings"] = encodings
            cross = model.cross[index]
            assert isinstance(cross, ChunkedCrossAttention)
            read = slow_read(cross, x[0], captured["encodings"], neighbors.mask, SIZE)
            return (x + read.to(x.dtype), *inputs[1:])

        handles.append(model.blocks[model.cross_layers[index] - 1].register_forward_pre_hook(before))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for index in range(len(model.cross_layers)):
        replace(index)
    try:
        return decoder.hidden(tokens_N[None])[0]
    finally:
        for handle in handles:
            handle.remove()


@CONDITIONED
@pytest.mark.parametrize("length", [LENGTH, 4 * SIZE, 2 * SIZE - 1])
def test_equals_loops(conditioned: bool, length: int) -> None:
    model = tiny_retro(conditioned=conditioned, dtype=torch.float64)
    tokens, neighbors = tokens_and_neighbors(2, length)
    with torch.no_grad():
        fast = model.hidden(tokens, neighbors=neighbors)
    for row in range(2):
        slow = slow_hidden(model, tokens[row], NeighborTokens(neighbors.tokens[row], neighbors.mask[row]))
        assert gap(fast[row], slow) < 1e-5  # the rotations are float32 by design; everything else is float64 here


def test_hand_worked_alignment() -> None:
    """With chunks of 3, positions 2, 3, 4 attend to the neighbors of chunk 0, and 5, 6, 7 to those of chunk 1."""
    x = torch.arange(7.0)[None, :, None]
    positions = reading_positions(x, 2, 3)
    assert positions[0, :, :, 0].tolist() == [[2, 3, 4], [5, 6, 0]]
    assert from_reading_positions(positions, 7)[0, :, 0].tolist() == [0, 0, 2, 3, 4, 5, 6]


def readers(chunk: int) -> range:
    """Return the positions that can depend on the neighbors of a chunk. Later positions can, through self-attention."""
    return range(SIZE * chunk + SIZE - 1, LENGTH)


@CONDITIONED
def test_no_gradient_from_the_future(conditioned: bool) -> None:
    """The hidden state at i has a gradient for tokens up to i only, and for neighbors of chunks that are complete at i only."""
    model = tiny_retro(conditioned=conditioned, dtype=torch.float64)
    tokens, neighbors = tokens_and_neighbors(1, LENGTH, holes=False)
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def after(_: nn.Module, __: object, output: Tensor) -> Tensor:
            inputs[name] = output.detach().requires_grad_()
            return inputs[name]

        return after

    assert isinstance(model.decoder.token_emb, nn.Module)
    handles = [
        model.decoder.token_emb.register_forward_hook(keep("tokens")),  # type: ignore[arg-type]
        model.encoder.embed.register_forward_hook(keep("neighbors")),  # type: ignore[arg-type]
    ]
    hidden = model.hidden(tokens, neighbors=neighbors)
    for handle in handles:
        handle.remove()
    for i in range(LENGTH):
        to_tokens, to_neighbors = torch.autograd.grad(
            hidden[0, i].sum(), [inputs["tokens"], inputs["neighbors"]], retain_graph=True, materialize_grads=True
        )
        reached = to_tokens[0].abs().sum(-1) > 0
        assert reached.tolist() == [place <= i for place in range(LENGTH)]
        of_chunks = to_neighbors.unflatten(0, (LENGTH // SIZE, -1)).abs().amax(dim=(2, 3)) > 0
        for chunk in range(LENGTH // SIZE):
            assert of_chunks[chunk].tolist() == [i in readers(chunk)] * 2


@CONDITIONED
def test_changed_tokens_and_neighbors_affect_no_earlier_position(conditioned: bool) -> None:
    model = tiny_retro(conditioned=conditioned)
    tokens, neighbors = tokens_and_neighbors(1, LENGTH, holes=False)
    with torch.no_grad():
        before = model(tokens, neighbors=neighbors)[0]
        for place in range(LENGTH):
            other = tokens.clone()
            other[0, place] = other[0, place] % 20 + 1
            changed = (model(other, neighbors=neighbors)[0] != before).any(-1)
            assert not changed[:place].any() and changed[place]
        for chunk in range(LENGTH // SIZE):
            found = neighbors.tokens.clone()
            found[0, chunk] = found[0, chunk] % 20 + 1
            changed = (model(tokens, neighbors=NeighborTokens(found, neighbors.mask))[0] != before).any(-1)
            first = readers(chunk).start
            assert not changed[:first].any() and changed[first:].all()


@CONDITIONED
def test_each_prefix_equals_the_whole_row(conditioned: bool) -> None:
    model = tiny_retro(conditioned=conditioned, dtype=torch.float64)
    tokens, neighbors = tokens_and_neighbors(2, LENGTH)
    with torch.no_grad():
        whole = model.hidden(tokens, neighbors=neighbors)
        for length in range(1, LENGTH):
            assert gap(model.hidden(tokens[:, :length], neighbors=neighbors), whole[:, :length]) < 1e-12


@CONDITIONED
def test_without_neighbors_the_output_equals_the_decoder(conditioned: bool) -> None:
    model = tiny_retro(conditioned=conditioned)
    tokens, neighbors = tokens_and_neighbors(2, LENGTH)
    without = NeighborTokens(neighbors.tokens, torch.zeros_like(neighbors.mask))
    with torch.no_grad():
        assert torch.equal(model(tokens, neighbors=without), model.decoder(tokens))
    only_last = neighbors.mask.clone()
    only_last[:, :3] = False
    with torch.no_grad():
        partly = model(tokens, neighbors=NeighborTokens(neighbors.tokens, only_last))
    first = readers(3).start
    assert torch.equal(partly[:, :first], model.decoder(tokens)[:, :first])
    loss = model(tokens, neighbors=without).square().sum()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(
        gradient is not None and gradient.isfinite().all() for gradient in gradients
    )  # DDP needs a gradient for each parameter


@CONDITIONED
def test_masked_tokens_and_the_order_of_neighbors_have_no_effect(conditioned: bool) -> None:
    model = tiny_retro(conditioned=conditioned, dtype=torch.float64)
    tokens, neighbors = tokens_and_neighbors(2, LENGTH)
    noise = torch.where(neighbors.mask, neighbors.tokens, (neighbors.tokens + 7) % 20)
    with torch.no_grad():
        want = model(tokens, neighbors=neighbors)
        assert torch.equal(model(tokens, neighbors=NeighborTokens(noise, neighbors.mask)), want)
        swapped = NeighborTokens(neighbors.tokens.flip(2), neighbors.mask.flip(2))
        assert gap(model(tokens, neighbors=swapped), want) < 1e-12
        assert gap(model(tokens, neighbors=neighbors.first(1)), want) > 1e-3
        assert torch.equal(model(tokens, neighbors=neighbors.first(0)), model.decoder(tokens))


def test_a_new_model_equals_its_decoder() -> None:
    decoder = tiny_palm(depth=3)
    tokens, neighbors = tokens_and_neighbors(2, LENGTH)
    with torch.no_grad():
        want = decoder(tokens)
        model = RETRO(decoder, chunk_size=SIZE, heads=2, dim_head=6)
        assert torch.equal(model(tokens, neighbors=neighbors), want)  # the output of the cross-attention is 0 at initialization
        trained = tiny_retro(decoder=decoder)
        assert gap(trained(tokens, neighbors=neighbors), want) > 1e-2
        assert torch.equal(trained(tokens), want)
        assert torch.equal(trained(tokens, mask=torch.ones_like(tokens, dtype=torch.bool)), want)
    assert not any(block._forward_pre_hooks for block in decoder.blocks)


def test_only_the_frozen_decoder_gets_no_gradient() -> None:
    model = tiny_retro(train_decoder=False)
    tokens, neighbors = tokens_and_neighbors(2, LENGTH)
    model(tokens, neighbors=neighbors).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.decoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for m in (model.encoder, model.cross) for p in m.parameters())


def test_stored_encodings_equal_computed_encodings() -> None:
    tokens, neighbors = tokens_and_neighbors(2, LENGTH)
    model = tiny_retro(conditioned=False)
    with torch.no_grad():
        flat = NeighborTokens(neighbors.tokens.flatten(0, 1), neighbors.mask.flatten(0, 1))
        encodings = model.encode(flat).unflatten(0, neighbors.tokens.shape[:2])
        assert torch.equal(
            model.hidden(tokens, neighbors=neighbors, encodings=encodings), model.hidden(tokens, neighbors=neighbors)
        )
        with pytest.raises(ValueError, match="conditioned=False"):
            tiny_retro().hidden(tokens, neighbors=neighbors, encodings=encodings)


def test_the_spec_rebuilds_the_model() -> None:
    model = tiny_retro(conditioned=False, cross_layers=[2])
    spec = backbone_spec(model)
    assert spec is not None
    again = build_backbone(spec)
    assert isinstance(again, RETRO) and again.cross_layers == (2,) and not again.conditioned
    again.load_state_dict(model.state_dict())
    tokens, neighbors = tokens_and_neighbors(2, LENGTH)
    assert torch.equal(again(tokens, neighbors=neighbors), model(tokens, neighbors=neighbors))


@pytest.mark.parametrize(("depth", "layers"), [(1, (1,)), (2, (2,)), (4, (3,)), (6, (3, 6)), (12, (6, 9, 12))])
def test_default_cross_layers(depth: int, layers: tuple[int, ...]) -> None:
    assert RETRO(tiny_palm(depth=depth), heads=1, dim_head=2).cross_layers == layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_layers": [4]}, "layers 1 to 3"),
        ({"cross_layers": []}, "layers 1 to 3"),
        ({"cross_layers": [2, 1]}, "ascending"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, but got 0"),
        ({"encoder_depth": 0}, "`encoder_depth` must be at least 1, but got 0"),
        ({"dim_head": 5}, "`dim_head` must be even and at least 2, but got 5"),
        ({"decoder": nn.Linear(2, 2)}, "but got a Linear"),
    ],
)
def test_invalid_arguments_raise(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_retro(**options)


def test_neighbors_need_whole_rows() -> None:
    model = tiny_retro()
    tokens, neighbors = tokens_and_neighbors(1, LENGTH)
    with pytest.raises(ValueError, match="but got mask"):
        model.hidden(tokens, neighbors=neighbors, mask=torch.ones_like(tokens, dtype=torch.bool))
