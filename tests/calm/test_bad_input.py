"""Tests of the errors for models and options that cannot be composed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.calm.connections import ConnectionConfig
from lightning_align.calm.model import CALM
from lightning_align.calm.spec import Augment
from tests.calm.toys import SMALL, composed, connect, palms, random_tokens
from tests.toys import VOCABULARY, gap, tiny_palm

TOKENS = random_tokens()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"connections": [[1, 4]]}, r"augment 0: connection \[1, 4\]: the anchor layer must be between 1 and 3, but got 4"),
        ({"connections": [[0, 1]]}, r"augment layer must be between 1 and 4, but got 0"),
        ({"connections": [[1, 1], [2, 2], [1, 1]]}, r"contains \[1, 1\] twice"),
        ({"connections": [[1, 2, 3]]}, r"must contain pairs .*, but got \[1, 2, 3\]"),
        ({"connections": []}, r"`connections` is empty"),
        ({"num_connections": 4}, r"`num_connections` must be between 1 and 3, but got 4"),
        ({"every": 5}, r"`every` must be between 1 and 4, .*, but got 5"),
        ({"every": 2, "num_connections": 2}, r"only one of num_connections and every can be set"),
        ({"layers": "model.layers.*"}, r"must match modules of the PaLM, .*Its modules are .*blocks\.\*"),
    ],
)
def test_wrong_connections(options: dict[str, Any], message: str) -> None:
    anchor, augment = palms()
    with pytest.raises(ValueError, match=message):
        CALM(anchor, Augment(augment, **options), connection=SMALL)
    assert all(p.requires_grad for p in (*anchor.parameters(), *augment.parameters())), "the models are restored"
    assert not any(module._forward_hooks for module in (*anchor.modules(), *augment.modules()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"heads": 5}, "`heads` must divide the anchor's width 24, but got 5"),
        ({"heads": 8}, "`dim_head` must be even for rotary embeddings, but got 3"),
        ({"heads": 0}, "must be at least 1, but got heads=0"),
    ],
)
def test_wrong_heads(config: dict[str, Any], message: str) -> None:
    anchor, augment = palms()
    with pytest.raises(ValueError, match=message):
        CALM(anchor, augment, connection=ConnectionConfig(**config))


def test_wrong_layout_of_rows_and_positions() -> None:
    class PositionsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.blocks = nn.ModuleList([nn.Identity(), nn.Linear(8, 8)])

        def forward(self, tokens: Tensor) -> Tensor:
            x: Tensor = self.embed(tokens).transpose(0, 1)
            for block in self.blocks:
                x = block(x)
            return x.transpose(0, 1)

    with pytest.raises(
        ValueError, match=r"\(PositionsFirst\) must have .*, but got \(3, 2, 8\) for token ids of shape \(2, 3\)"
    ):
        CALM(tiny_palm(), PositionsFirst())


def test_weights_that_are_not_finite() -> None:
    anchor, augment = palms()
    augment.blocks[1].ff_out.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"augment 0 \(PaLM\) must have finite weights, but blocks.1.ff_out.weight"):
        CALM(anchor, augment)


def test_vocabularies_of_different_sizes() -> None:
    anchor = tiny_palm()
    augment = tiny_palm(num_tokens=VOCABULARY + 5)
    with pytest.raises(ValueError, match=r"must have the vocabulary size of the anchor, 23, but has 28\. .*tokens: own"):
        CALM(anchor, augment)
    model = CALM(anchor, Augment(augment, tokens="own"), connection=SMALL)
    with pytest.raises(ValueError, match=r"has its own tokenizer\. Pass its tokens"):
        model(TOKENS)
    assert CALM(anchor, Augment(augment, tokens="shared"), connection=SMALL)(TOKENS).shape == (2, 9, VOCABULARY)


def test_layers_that_cannot_be_found() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.ModuleList([nn.Linear(4, 4)])
            self.right = nn.ModuleList([nn.Linear(4, 4)])

    with pytest.raises(ValueError, match="Cannot determine which modules of the Two are its layers"):
        CALM(tiny_palm(), Two())
    with pytest.raises(ValueError, match="`augments` is empty"):
        CALM(tiny_palm(), [])


def test_left_padding_for_an_anchor_without_a_mask() -> None:
    class Anchor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.palm = tiny_palm()

        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = self.palm(tokens)
            return out

    model = CALM(Anchor(), tiny_palm(), connection=SMALL)
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[0, 0] = False
    with pytest.raises(ValueError, match="Pad its rows on the right"):
        model(TOKENS, mask=mask)
    assert model.make_cache is None


def test_connections_load_only_with_their_models(tmp_path: Path) -> None:
    path = tmp_path / "connections.safetensors"
    model = composed(torch.float32)
    model.save_connections(path)
    assert path.stat().st_size < sum(p.numel() for p in model.connections.parameters()) * 4 + 5000
    other = CALM(*_same(), connection=SMALL)
    other.load_connections(path)
    assert gap(other(TOKENS), model(TOKENS)) == 0
    anchor, augment = palms(torch.float32)
    augment.token_emb.weight.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"trained with other weights of augments.0"):
        CALM(anchor, Augment(augment, num_connections=2), connection=SMALL).load_connections(path)
    with pytest.raises(ValueError, match="the connections must connect"):
        CALM(*palms(torch.float32), connection=SMALL).load_connections(path)
    with pytest.raises(ValueError, match="cannot be read"):
        other.load_connections(tmp_path / "nothing.safetensors")
    assert set(model.trainable_state_dict()) == {n for n in model.state_dict() if n.startswith("connections.")}


def _same() -> tuple[Any, Augment]:
    anchor, augment = palms(torch.float32)
    return anchor, Augment(augment, num_connections=2)


def test_released_models_can_be_composed_again() -> None:
    anchor, augment = palms()
    for _ in range(2):
        model = connect(CALM(anchor, Augment(augment, num_connections=2), connection=SMALL))
        model(TOKENS)
        model.release()
        assert not any(module._forward_hooks for module in anchor.modules())
    with pytest.raises(ValueError, match="Do not use a composition after `release`"):
        model(TOKENS)
