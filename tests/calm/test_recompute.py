"""Tests of gradient checkpointing in compositions: equal gradients, less memory, and nothing else changes."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.calm.model import CALM
from lightning_align.calm.spec import Augment
from lightning_align.models.pretrained import PretrainedLM
from tests.calm.toys import MAKERS, NAMED, SMALL, connect, llama, palms, random_tokens
from tests.toys import gap, tiny_palm

TOKENS = random_tokens()


def compose(anchor: nn.Module, recompute: bool | None, **options: Any) -> CALM:
    augment = tiny_palm(depth=4, dtype=torch.float64, seed=1)
    spec = Augment(augment, connections=[[1, 1], [4, 2]], tokens="shared")
    return connect(CALM(anchor, spec, connection=SMALL, gradient_checkpointing=recompute, **options)).train()


def gradients(model: CALM) -> tuple[list[Tensor], int]:
    """Return the gradients of the connections, and the bytes that the forward pass saved for the backward pass."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(TOKENS).log_softmax(dim=-1)[..., 3].sum()
    loss.backward()
    return [p.grad for p in model.connections.parameters() if p.grad is not None], sum(saved.values())


def pretrained(recompute: bool) -> PretrainedLM:
    """A Llama with much dropout, which a frozen anchor must not apply."""
    config = {**llama().config.to_dict(), "attention_dropout": 0.5}
    torch.manual_seed(0)
    return PretrainedLM(config=config, gradient_checkpointing=recompute).double()


@pytest.mark.parametrize("anchor", MAKERS)
def test_gradients_are_equal_and_less_is_saved(anchor: str) -> None:
    torch.manual_seed(0)
    model = MAKERS[anchor]().double()
    layers = {"anchor_layers": NAMED[anchor]} if anchor in NAMED else {}
    want, plain = gradients(compose(copy.deepcopy(model), False, **layers))
    got, less = gradients(compose(copy.deepcopy(model), True, **layers))
    assert len(want) > 0
    assert max(gap(a, b) for a, b in zip(got, want, strict=True)) < 1e-12
    # Frozen linear layers save nothing that depends on their input, so that for `tuples` the input itself is more.
    assert less < plain or anchor == "tuples"


@pytest.mark.parametrize("asked", [None, True, False])
def test_layers_with_gradients_run_twice_and_all_else_once(asked: bool | None) -> None:
    anchor = pretrained(True)
    model = compose(anchor, asked)
    runs: Counter[str] = Counter()
    inner = {f"anchor {i}": block.mlp for i, block in enumerate(anchor.blocks, start=1)}
    inner |= {f"augment {i}": block.in_proj for i, block in enumerate(model.augments[0].blocks, start=1)}  # type: ignore[union-attr,arg-type]
    inner |= {f"connection {i}": connection.to_q for i, connection in enumerate(model.connections)}  # type: ignore[misc]
    for name, module in inner.items():
        module.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    gradients(model)
    again = 1 if asked is False else 2
    assert [runs[f"anchor {i}"] for i in (1, 2, 3)] == [1, again, again], "no gradient goes below the first connection"
    assert {runs[name] for name in inner if not name.startswith("anchor")} == {1}
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module.training for module in (*anchor.modules(), *model.augments.modules()))


def test_the_anchor_decides_by_default() -> None:
    (want, plain), (got, less) = (gradients(compose(pretrained(asked), None)) for asked in (False, True))
    assert max(gap(a, b) for a, b in zip(got, want, strict=True)) < 1e-12
    assert less < plain
    bare = llama().double()
    (getattr(bare, "activation_checkpointing_enable", None) or bare.gradient_checkpointing_enable)({"use_reentrant": False})
    assert len(compose(bare, None)._recomputed) == 3
    assert not compose(bare, False)._recomputed


@pytest.mark.parametrize("position", ["input", "output"])
def test_positions_and_masks(position: str) -> None:
    mask = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])

    def found(recompute: bool) -> list[Tensor]:
        model = compose(palms()[0], recompute, anchor_position=position)
        model(TOKENS, mask=mask)[0].square().sum().backward()
        return [p.grad for p in model.connections.parameters() if p.grad is not None]

    assert max(gap(a, b) for a, b in zip(found(True), found(False), strict=True)) < 1e-12


@pytest.mark.parametrize("kind", ["palm", "transformers"])
def test_decoding_with_a_cache_is_not_affected(kind: str) -> None:
    anchor = palms()[0] if kind == "palm" else pretrained(True)
    model = compose(anchor, True).eval()
    want = model.hidden(TOKENS)
    cache = model._make_cache(2, TOKENS.shape[1])
    parts = [model.hidden(part, cache=cache) for part in TOKENS.split([3, 2, 1, 1, 1, 1], dim=1)]
    assert want.requires_grad
    assert gap(torch.cat(parts, dim=1), want) < 1e-9
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised by dynamo, not by this code
@pytest.mark.parametrize("part", ["layers", "anchor", "whole"])
def test_compiled_layers_are_computed_again(part: str) -> None:
    torch._dynamo.reset()
    sizes: dict[str, Any] = {"depth": 2, "dim": 24, "dtype": torch.float64}
    want, _ = gradients(compose(tiny_palm(**sizes), False))
    anchor = tiny_palm(**sizes, compile="eager" if part == "layers" else None)
    model = compose(anchor, True)
    if part != "layers":
        (anchor if part == "anchor" else model).compile(backend="eager")
    runs: list[int] = []
    anchor.blocks[1].norm.register_forward_pre_hook(lambda *_: runs.append(1))  # type: ignore[union-attr]
    model(TOKENS).log_softmax(dim=-1)[..., 3].sum().backward()
    got = [p.grad for p in model.connections.parameters() if p.grad is not None]
    assert max(gap(a, b) for a, b in zip(got, want, strict=True)) < 1e-12
    assert len(runs) == 2


def test_copies_and_errors_leave_the_layers_as_they_are() -> None:
    model = compose(palms()[0], True)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.anchor.blocks[2].ff_out.weight)  # type: ignore[union-attr,index,arg-type]
    want, _ = gradients(compose(palms()[0], False))
    assert max(gap(a, b) for a, b in zip(gradients(model)[0], want, strict=True)) < 1e-12
    assert max(gap(a, b) for a, b in zip(gradients(other)[0], want, strict=True)) > 1e-6, "the copy has its own layers"
    with pytest.raises(IndexError):
        model(TOKENS + 1000)
    assert not any("forward" in module.__dict__ for module in model.modules())
    model.release()
    model.anchor(TOKENS).sum().backward()


def test_layers_that_contain_each_other_are_refused() -> None:
    anchor = palms()[0]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = anchor.token_emb, nn.Linear(24, 23).double()

        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = self.head(self.inner(tokens))
            return out

    model = Outer()
    with pytest.raises(ValueError, match="`gradient_checkpointing` must be false for these layers of the Outer"):
        compose(model, True, anchor_layers=lambda m: [m.head, m])
