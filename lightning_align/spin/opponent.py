"""Opponents: models that play against the policy. An opponent generates responses and scores both responses of a pair.

========== ===================================================================================
iterate    the policy as it was when the iteration began (Chen et al. 2024, arXiv 2401.01335)
ema        an exponential moving average of the policy
base       the policy as it was when the run began
mixture    the normalized geometric mean of both next-token distributions,
           q(a|s) ~ p_iterate(a|s)^(1-w) p_base(a|s)^w, which keeps self-play close to
           the base (Alami et al. 2024, arXiv 2404.04291)
========== ===================================================================================
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_align.generation.sampler import evaluating
from lightning_align.models.formats import merged_weights, transformers_weights, whole_weights
from lightning_align.models.language_model import Head, context_length, has_cache, has_hidden, logits_of
from lightning_align.models.lora import using_lora
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.shared_rows import plan_prefixes
from lightning_align.models.unpadded import Unpadded
from lightning_align.references.frozen import move_to
from lightning_align.references.moving import REFERENCE_SCOPE, MovingAdapters, MovingCopy
from lightning_align.references.protocol import MovingReference
from lightning_align.runtime.ranks import is_sharded
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import TokenBatch

OpponentKind = Literal["iterate", "ema", "base", "mixture"]

SCORED_TOKENS = 4096
"""The number of tokens scored at a time on a CPU. The activations of more tokens do not fit the last-level cache."""


class Scoped(nn.Module):
    """A view of a model with some LoRA scopes enabled and all others disabled. It has the interface of the model."""

    def __init__(self, model: nn.Module, *scopes: str) -> None:
        """Select the scopes.

        Args:
            model: The model. It is shared, not copied.
            *scopes: The enabled scopes. Without any, the view is the model without adapters.
        """
        super().__init__()
        self.model, self.scopes = model, scopes
        self.computed_by = (model,)
        self.max_seq_len = context_length(model)
        if has_hidden(model):
            self.hidden = self._hidden
            if callable(getattr(model, "unpadded_hidden", None)):
                self.longest_unpadded, self.unpadded_hidden = model.longest_unpadded, self._unpadded_hidden
        if has_cache(model):
            self.make_cache = model.make_cache

    @property
    def head(self) -> Head:
        """The head of the model under these scopes, if the model has one."""
        with using_lora(self.model, *self.scopes):
            head: Head = getattr(self.model, "head")  # noqa: B009  # mypy knows no `head` of a module
            return head

    def _hidden(self, tokens: Tensor, **options: Any) -> Tensor:
        with using_lora(self.model, *self.scopes):
            out: Tensor = self.model.hidden(tokens, **options)  # type: ignore[operator]
            return out

    def _unpadded_hidden(self, unpadded: Unpadded) -> Tensor:
        with using_lora(self.model, *self.scopes):
            out: Tensor = self.model.unpadded_hidden(unpadded)  # type: ignore[operator]
            return out

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits, (B, N) -> (B, N, V)."""
        with using_lora(self.model, *self.scopes):
            return logits_of(self.model, tokens)


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the model that a `Scoped` wraps."""
    return model.model if isinstance(model, Scoped) else model


class Caches(NamedTuple):
    """The key-value caches of two models that read the same tokens."""

    first: Any
    second: Any

    def select(self, rows: Tensor) -> None:
        """Keep only these rows in both caches."""
        self.first.select(rows)
        self.second.select(rows)

    @property
    def repeat(self) -> "Callable[[Tensor, int], Caches] | None":
        """A function that copies the only row, see `KVCache.repeat`. None if a cache does not support it."""
        one, two = (getattr(cache, "repeat", None) for cache in self)
        if one is None or two is None:
            return None
        return lambda starts, capacity: Caches(one(starts, capacity), two(starts, capacity))

    @property
    def join(self) -> Callable[..., None] | None:
        """A function that appends the rows of other caches, see `KVCache.join`. None if a cache does not support it."""
        one, two = (getattr(cache, "join", None) for cache in self)
        if one is None or two is None:
            return None

        def join(other: Caches, **columns: int) -> None:
            one(other.first, **columns)
            two(other.second, **columns)

        return join

    @property
    def static(self) -> Callable[[int, int], "StaticCaches"] | None:
        """A function that makes empty caches of fixed size, see `KVCache.static`. None if a cache does not support it."""
        one, two = (getattr(cache, "static", None) for cache in self)
        if one is None or two is None:
            return None
        return lambda batch, length: StaticCaches(one(batch, length), two(batch, length))


class StaticCaches(NamedTuple):
    """The static form of `Caches`. See `lightning_align.models.static_cache`."""

    first: Any
    second: Any

    def insert(self, cache: Caches, first: int, copies: int) -> None:
        """See `StaticCache.insert`."""
        for static, usual in zip(self, cache, strict=True):
            static.insert(usual, first, copies)

    def select(self, rows: Tensor, columns: int) -> None:
        """See `StaticCache.select`."""
        for static in self:
            static.select(rows, columns)

    def resize(self, batch: int, length: int) -> None:
        """See `StaticCache.resize`."""
        for static in self:
            static.resize(batch, length)

    def step(self, columns: Tensor, width: int) -> Caches:
        """See `StaticCache.step`."""
        return Caches(*(static.step(columns, width) for static in self))


class GeometricMixture(nn.Module):
    """The geometric mixture of two models with the same vocabulary.

    The mixture adds the logits of the models with weights 1 - w and w. The softmax of the sum is the normalized geometric mean
    of their distributions.

    If both models have hidden states, the mixture has hidden states too: it concatenates the hidden states and the heads.
    There are two exceptions. If a head caps its logits, the sum is not the output of a linear layer. If the models are
    different and at least one is sharded, their outermost weights are never gathered at the same time.
    """

    def __init__(self, first: nn.Module, second: nn.Module, weight: float) -> None:
        """Combine two models.

        Args:
            first: The model with weight 1 - `weight`.
            second: The model with weight `weight`.
            weight: The weight w, from 0 to 1.
        """
        super().__init__()
        self.first, self.second, self.weight = first, second, weight
        self.computed_by = (first, second)
        self.max_seq_len = min((size for size in map(context_length, (first, second)) if size is not None), default=None)
        if not (has_hidden(first) and has_hidden(second)) or first.head.softcap or second.head.softcap:
            return
        if _unwrap(first) is not _unwrap(second) and (is_sharded(first) or is_sharded(second)):
            return
        self.hidden = self._hidden
        if all(callable(getattr(model, "unpadded_hidden", None)) for model in (first, second)):
            self.longest_unpadded, self.unpadded_hidden = self._longest_unpadded, self._unpadded_hidden
        if has_cache(first) and has_cache(second):
            self.make_cache = lambda batch, length: Caches(first.make_cache(batch, length), second.make_cache(batch, length))

    @property
    def head(self) -> Head:
        """Both heads side by side, (V, 2 D). Only valid if the mixture has `hidden`."""
        first, second = (getattr(model, "head") for model in (self.first, self.second))  # noqa: B009
        weight = torch.cat((first.weight, second.weight), dim=1)
        biases = [
            (share, head.bias) for share, head in ((1 - self.weight, first), (self.weight, second)) if head.bias is not None
        ]
        return Head(weight, sum((share * bias for share, bias in biases), torch.zeros_like(biases[0][1])) if biases else None)

    def _hidden(self, tokens: Tensor, *, cache: Caches | None = None, **options: Any) -> Tensor:
        first, second = cache or (None, None)
        one: Tensor = self.first.hidden(tokens, cache=first, **options)  # type: ignore[operator]
        two: Tensor = self.second.hidden(tokens, cache=second, **options)  # type: ignore[operator]
        return torch.cat(((1 - self.weight) * one, self.weight * two), dim=-1)

    def _longest_unpadded(self, device: torch.device) -> float | None:
        one, two = (model.longest_unpadded(device) for model in (self.first, self.second))  # type: ignore[operator]
        return None if one is None or two is None else min(one, two)

    def _unpadded_hidden(self, unpadded: Unpadded) -> Tensor:
        one, two = (model.unpadded_hidden(unpadded) for model in (self.first, self.second))  # type: ignore[operator]
        return torch.cat(((1 - self.weight) * one, self.weight * two), dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits, (B, N) -> (B, N, V), up to a constant per position."""
        return (1 - self.weight) * logits_of(self.first, tokens) + self.weight * logits_of(self.second, tokens)


def score(model: nn.Module, pairs: TokenBatch) -> Tensor:
    """Compute the log-probs of responses under a model that does not train.

    Args:
        model: Any language model. A sharded model uses one forward pass, because all ranks need the same number of passes.
        pairs: The rows, (B, N), padded on the right.

    Returns:
        The sum of the log-probs of each row in nats, (B,).
    """
    tokens, plan = pairs["tokens"], pairs.get("prefixes")
    count = 1 if tokens.device.type != "cpu" or is_sharded(model) else -(-tokens.numel() // SCORED_TOKENS)
    with evaluating(model):
        if count == 1:
            return response_logprobs(model, pairs).sums
        # Rows that begin alike stay together.
        order = torch.arange(len(tokens)) if plan is None else torch.tensor(plan.rows)
        sums = []
        for rows in order.chunk(count):
            part: TokenBatch = {"tokens": tokens[rows], "mask": pairs["mask"][rows], "targets": pairs["targets"][rows]}
            if plan is not None:
                part["prefixes"] = plan_prefixes(part, worth=plan.worth)
            sums.append(response_logprobs(model, part).sums)
    return torch.cat(sums)[order.argsort()]


class Opponent:
    """The opponent that plays against the policy."""

    def __init__(
        self,
        kind: OpponentKind,
        *,
        moving: MovingReference | None,
        base: nn.Module | None,
        scoped: bool,
        weight: float,
    ) -> None:
        """Store the parts that the kind of opponent needs.

        Args:
            kind: The kind of opponent. See the table at the top of this file.
            moving: The average for `ema`. For `iterate` and `mixture`, a copy of the iterate if the opponent is still needed
                after the policy has trained.
            base: A frozen copy of the policy at the start of the run. Not needed if adapters can be disabled instead.
            scoped: Whether only adapters train.
            weight: The weight of the base in the mixture.
        """
        self.kind, self.moving, self.scoped, self.weight = kind, moving, scoped, weight
        # The tuple hides the base from its owner, and this class is not a module. The base is thus not saved, moved or trained.
        self._base = (base,)

    def base(self, policy: nn.Module) -> nn.Module | None:
        """Return the policy at the start of the run, or None if it was not kept."""
        if self.scoped:
            return Scoped(policy)
        (base,) = self._base
        here = next(policy.parameters(), None)
        if base is not None and here is not None:
            move_to(base, here.device)
        return base

    def player(self, policy: nn.Module) -> nn.Module:
        """Return the model that generates and scores. Without a copy of the iterate, this is the current policy."""
        iterate = policy
        if isinstance(self.moving, MovingAdapters):
            iterate = Scoped(policy, REFERENCE_SCOPE)
        elif isinstance(self.moving, MovingCopy):
            iterate = self.moving.model
            # The average is registered. In less than 32 bits this is another model, which Lightning does not move.
            move_to(iterate, next(policy.parameters()).device)
        base = self.base(policy)
        if self.kind == "base":
            assert base is not None
            return base
        if self.kind == "mixture":
            assert base is not None
            return GeometricMixture(iterate, base, self.weight)
        return iterate


def served_model(player: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model of a player, and its weights for another engine: gathered, and with merged adapters.

    For a sharded model, every rank must call this function.

    Args:
        player: A model from `Opponent.player`. A mixture is not supported, because its two models cannot be sent as one.
    """
    model, scopes = (player.model, player.scopes) if isinstance(player, Scoped) else (player, None)
    with nullcontext() if scopes is None else using_lora(model, *scopes):
        return model, merged_weights(model, whole_weights(model))


def served_weights(player: nn.Module) -> dict[str, Tensor]:
    """Return the weights of `served_model` under the names of an export."""
    model, weights = served_model(player)
    return transformers_weights(model, weights)[1] if isinstance(model, PretrainedLM) else weights
