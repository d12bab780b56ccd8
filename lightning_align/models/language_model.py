"""The interface of a language model, and functions that work with any language model.

A language model is any module ``model(tokens_BN) -> logits_BNV``. It may also return an object with ``.logits``. Optional
capabilities are found by attribute, never by type:

- ``hidden(tokens, mask=, positions=, cache=) -> (B, N, D)`` and ``head`` (a `Head`): log-probs are computed in chunks.
- ``packed_hidden(tokens, mask) -> (T, D)``: padding is not computed on a CPU.
- ``unpadded_hidden(unpadded) -> (T, D)`` and ``longest_unpadded(device)``: the same on other devices
  (`lightning_align.models.unpadded`). If its layers attend by ``unpadded.attention(kernel)``, rows that begin alike share the
  computation of their beginnings, on any device (`lightning_align.models.shared_rows`).
- ``make_cache(batch, length)``: decoding takes constant time per token.
- ``blocks``: a list of layers whose outputs can be read.
- ``documents``, an argument of the forward pass and of ``hidden``: a row can hold several documents. Each is computed as if it
  were a row of its own (`lightning_align.models.documents`).
"""

from typing import Any, NamedTuple, TypeGuard, cast

import torch.nn.functional as F
from torch import Tensor, nn


class Head(NamedTuple):
    """The output layer. The logits are ``linear(hidden, weight, bias)``, softly capped if ``softcap`` is set."""

    weight: Tensor
    """(V, D) weight."""
    bias: Tensor | None
    """(V,) bias, or None."""
    softcap: float | None = None
    """The cap C in C tanh(logits / C), as in Gemma 2. None leaves the logits unchanged."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of hidden states: (..., D) -> (..., V)."""
        return self.capped(F.linear(hidden, self.weight, self.bias))

    def capped(self, logits: Tensor) -> Tensor:
        """Apply the soft cap to the output of the linear layer: (..., V) -> (..., V)."""
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


class HiddenModel(nn.Module):
    """The type of models with hidden states and a head. It exists only for the type checker. No class inherits from it."""

    head: Head

    def hidden(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """See `PaLM.hidden`."""
        raise AssertionError("only a shape for the type checker")

    def packed_hidden(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See `PaLM.packed_hidden`."""
        raise AssertionError("only a shape for the type checker")

    def unpadded_hidden(self, unpadded: Any, **kwargs: Any) -> Tensor:
        """See `PaLM.unpadded_hidden`."""
        raise AssertionError("only a shape for the type checker")

    def make_cache(self, batch: int, length: int) -> Any:
        """See `PaLM.make_cache`."""
        raise AssertionError("only a shape for the type checker")


def policy_of(module: nn.Module) -> nn.Module:
    """Return the language model of a LightningModule: its attribute ``policy``, which callbacks use.

    Args:
        module: A LightningModule, of this package or not.

    Raises:
        ValueError: If the module has no ``policy``, or it is not an ``nn.Module``.
    """
    policy = getattr(module, "policy", None)
    if not isinstance(policy, nn.Module):
        raise ValueError(
            f"{type(module).__name__} has no model as `policy`, which callbacks need. Set `self.policy = model`, or add a "
            "property of that name."
        )
    return policy


def has_hidden(model: nn.Module) -> TypeGuard[HiddenModel]:
    """Return whether the model has hidden states and the head that turns them into logits."""
    return callable(getattr(model, "hidden", None)) and isinstance(getattr(model, "head", None), tuple)


def has_cache(model: nn.Module) -> TypeGuard[HiddenModel]:
    """Return whether the model can decode with a key-value cache."""
    return has_hidden(model) and callable(getattr(model, "make_cache", None))


def context_length(model: nn.Module) -> int | None:
    """Return the maximum number of tokens that the model can read, or None if it is unknown.

    It is ``max_seq_len`` of the model, or else ``max_position_embeddings`` of its transformers config.
    """
    config = getattr(model, "config", None)
    for size in (getattr(model, "max_seq_len", None), getattr(config, "max_position_embeddings", None)):
        if isinstance(size, int) and size > 0:
            return size
    return None


def declared_ends(model: nn.Module) -> tuple[int, ...]:
    """Return the end-of-sequence ids that the model declares, or none.

    They are ``eos_ids`` of the model, or else ``eos_token_id`` of its transformers generation config.
    """
    found = getattr(model, "eos_ids", None)
    if found is None:
        found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        return ()
    return (int(found),) if isinstance(found, int) else tuple(int(token) for token in found)


def logits_of(model: nn.Module, tokens: Tensor, *, documents: Tensor | None = None) -> Tensor:
    """Compute the logits of any language model.

    Args:
        model: A model that maps tokens to logits, or to an object with ``logits``.
        tokens: (B, N) int64 token ids. Padding, if any, is on the right.
        documents: (B, N) int64 numbers of the documents of a packed batch, for a model that takes them.

    Returns:
        (B, N, V) logits.

    Raises:
        ValueError: If the model returns anything else.
    """
    out = model(tokens) if documents is None else model(tokens, documents=documents)
    logits = cast(Tensor, out if isinstance(out, Tensor) else getattr(out, "logits", None))
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(out).__name__
        raise ValueError(
            f"The backbone {type(model).__name__} must return logits of shape (batch, positions, vocabulary), or an object "
            f"with such `logits`, but returned {got} for tokens of shape {tuple(tokens.shape)}."
        )
    return logits


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the vocabulary size V of the model, or None if it is unknown.

    It is ``num_tokens`` or ``vocab_size`` of the model, ``vocab_size`` of its config, or the number of rows of its head.
    """
    for name in ("num_tokens", "vocab_size"):
        if isinstance(size := getattr(model, name, None), int):
            return size
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(size, int):
        return size
    return model.head.weight.shape[0] if has_hidden(model) else None
