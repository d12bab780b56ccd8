"""What a language model is here: anything that maps token ids to logits, and what it may offer besides.

A plain module ``model(tokens_BN) -> logits_BNV`` works everywhere (an output object with ``.logits`` too). What a model
offers
more is found by capability, never by type:

- ``hidden(tokens, mask=, positions=, cache=) -> (B, N, D)`` and ``head`` (a `Head`): log-probs in chunks;
- ``packed_hidden(tokens, mask) -> (T, D)``: no work at pads;
- ``make_cache(batch, length)``: decoding in constant time a token;
- ``blocks``: a list of layers to tap.
"""

from typing import Any, NamedTuple, TypeGuard, cast

import torch.nn.functional as F
from torch import Tensor, nn


class Head(NamedTuple):
    """The output layer: ``linear(hidden, weight, bias)`` are the logits, perhaps capped."""

    weight: Tensor
    """(V, D)."""
    bias: Tensor | None
    """(V,) or None."""
    softcap: float | None = None
    """C of C tanh(logits / C), as Gemma 2 has it; None leaves them as they are."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.capped(F.linear(hidden, self.weight, self.bias))

    def capped(self, logits: Tensor) -> Tensor:
        """What becomes of the linear layer's output."""
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


class HiddenModel(nn.Module):
    """The capability of giving hidden states and a head (a shape for the type checker; nothing inherits from it)."""

    head: Head

    def hidden(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """See `PaLM.hidden`."""
        raise AssertionError("only a shape for the type checker")

    def packed_hidden(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See `PaLM.packed_hidden`."""
        raise AssertionError("only a shape for the type checker")

    def make_cache(self, batch: int, length: int) -> Any:
        """See `PaLM.make_cache`."""
        raise AssertionError("only a shape for the type checker")


def policy_of(module: nn.Module) -> nn.Module:
    """The language model of a LightningModule, which callbacks look for as ``policy``.

    Args:
        module: of this package, or somebody else's.

    Raises:
        ValueError: if it has none.
    """
    policy = getattr(module, "policy", None)
    if not isinstance(policy, nn.Module):
        raise ValueError(
            f"{type(module).__name__} has no model as `policy`, which is where callbacks look for it: give it that name "
            "(`self.policy = model`), or a property of that name"
        )
    return policy


def has_hidden(model: nn.Module) -> TypeGuard[HiddenModel]:
    """Whether the model gives hidden states and the head that turns them into logits."""
    return callable(getattr(model, "hidden", None)) and isinstance(getattr(model, "head", None), tuple)


def has_cache(model: nn.Module) -> TypeGuard[HiddenModel]:
    """Whether the model can decode with a key-value cache."""
    return has_hidden(model) and callable(getattr(model, "make_cache", None))


def context_length(model: nn.Module) -> int | None:
    """The most tokens that the model can read, where it says so (as ``max_seq_len`` or in a transformers config)."""
    config = getattr(model, "config", None)
    for size in (getattr(model, "max_seq_len", None), getattr(config, "max_position_embeddings", None)):
        if isinstance(size, int) and size > 0:
            return size
    return None


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits of any language model.

    Args:
        model: maps tokens to logits, or to an object that has them as ``logits``.
        tokens: (B, N) int64, padded on the right if at all.

    Returns:
        (B, N, V).

    Raises:
        ValueError: if what the model returned has another shape.
    """
    out = model(tokens)
    logits = cast(Tensor, out if isinstance(out, Tensor) else getattr(out, "logits", None))
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(out).__name__
        raise ValueError(
            f"the backbone {type(model).__name__} returned {got} for tokens {tuple(tokens.shape)}; a language model "
            "returns logits (batch, positions, vocabulary), or an object with such `logits`"
        )
    return logits


def vocabulary_size(model: nn.Module) -> int | None:
    """V if the model says it (as ``num_tokens``, ``vocab_size`` or through its head), else None."""
    for name in ("num_tokens", "vocab_size"):
        if isinstance(size := getattr(model, name, None), int):
            return size
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(size, int):
        return size
    return model.head.weight.shape[0] if has_hidden(model) else None
