"""Opponents: who plays against the policy, generates what it is to be told from, and scores both.

========== ===================================================================================
iterate    the policy as it was when the iteration began (Chen et al. 2024, arXiv 2401.01335)
ema        an exponential moving average of the policy
base       the policy as it was when the run began
mixture    the normalised geometric mean  q(a|s) ~ p_iterate(a|s)^(1-w) p_base(a|s)^w  of each
           next token's distributions, which keeps self-play near its beginning
           (Alami et al. 2024, arXiv 2404.04291)
========== ===================================================================================
"""

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_align.generation.sampler import evaluating
from lightning_align.models.formats import merged_weights, transformers_weights, whole_weights
from lightning_align.models.language_model import Head, context_length, has_cache, has_hidden, logits_of
from lightning_align.models.lora import using_lora
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.references.moving import REFERENCE_SCOPE, MovingAdapters, MovingCopy
from lightning_align.references.protocol import MovingReference
from lightning_align.runtime.ranks import is_sharded
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import TokenBatch

OpponentKind = Literal["iterate", "ema", "base", "mixture"]

SCORED_TOKENS = 4096
"""At a time on a CPU: what a layer makes of many more leaves the last-level cache, and is paged in anew for every layer."""


class Scoped(nn.Module):
    """A model with some LoRA scopes on and the others off; it offers what the model offers."""

    def __init__(self, model: nn.Module, *scopes: str) -> None:
        """Choose the scopes.

        Args:
            model: shared, not copied.
            *scopes: those that are on; none for the plain model.
        """
        super().__init__()
        self.model, self.scopes = model, scopes
        self.max_seq_len = context_length(model)
        if has_hidden(model):
            self.hidden = self._hidden
        if has_cache(model):
            self.make_cache = model.make_cache

    @property
    def head(self) -> Head:
        """That of the model under these scopes, where it has one."""
        with using_lora(self.model, *self.scopes):
            head: Head = getattr(self.model, "head")  # noqa: B009  # mypy knows no `head` of a module
            return head

    def _hidden(self, tokens: Tensor, **options: Any) -> Tensor:
        with using_lora(self.model, *self.scopes):
            out: Tensor = self.model.hidden(tokens, **options)  # type: ignore[operator]
            return out

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, (B, N) -> (B, N, V)."""
        with using_lora(self.model, *self.scopes):
            return logits_of(self.model, tokens)


def _whole(model: nn.Module) -> nn.Module:
    """The model itself, of one with some scopes on."""
    return model.model if isinstance(model, Scoped) else model


class Caches(NamedTuple):
    """The key-value caches of two models that read the same tokens."""

    first: Any
    second: Any

    def select(self, rows: Tensor) -> None:
        """Keep these rows of both."""
        self.first.select(rows)
        self.second.select(rows)


class GeometricMixture(nn.Module):
    """Two models of one vocabulary, their logits added with weights 1 - w and w: a softmax makes it the normalised mean.

    Of models with hidden states it is one with hidden states: both side by side, before both heads side by side. Not where a
    head caps its logits, for then their mean is no linear layer's output; nor of two sharded models, whose outermost weights
    are never gathered at the same time.
    """

    def __init__(self, first: nn.Module, second: nn.Module, weight: float) -> None:
        """Mix.

        Args:
            first: has the weight 1 - `weight`.
            second: has the weight `weight`.
            weight: w, from 0 to 1.
        """
        super().__init__()
        self.first, self.second, self.weight = first, second, weight
        self.max_seq_len = min((size for size in map(context_length, (first, second)) if size is not None), default=None)
        if not (has_hidden(first) and has_hidden(second)) or first.head.softcap or second.head.softcap:
            return
        if _whole(first) is not _whole(second) and (is_sharded(first) or is_sharded(second)):
            return
        self.hidden = self._hidden
        if has_cache(first) and has_cache(second):
            self.make_cache = lambda batch, length: Caches(first.make_cache(batch, length), second.make_cache(batch, length))

    @property
    def head(self) -> Head:
        """Both heads, (V, 2 D), where there is `hidden`."""
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

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, (B, N) -> (B, N, V), up to a constant of each position."""
        return (1 - self.weight) * logits_of(self.first, tokens) + self.weight * logits_of(self.second, tokens)


def score(model: nn.Module, pairs: TokenBatch) -> Tensor:
    """Log-probs (B,) of responses under a model that does not train.

    Args:
        model: any language model; one that is sharded takes them in one forward pass, as every rank must.
        pairs: (B, N), padded on the right.
    """
    tokens = pairs["tokens"]
    count = 1 if tokens.is_cuda or is_sharded(model) else -(-tokens.numel() // SCORED_TOKENS)
    parts = zip(*(part.chunk(count) for part in (tokens, pairs["mask"], pairs["targets"])), strict=True)
    with evaluating(model):
        sums = [response_logprobs(model, {"tokens": t, "mask": m, "targets": w}).sums for t, m, w in parts]
    return torch.cat(sums)


class Opponent:
    """Who plays against the policy."""

    def __init__(
        self,
        kind: OpponentKind,
        *,
        moving: MovingReference | None,
        base: nn.Module | None,
        scoped: bool,
        weight: float,
    ) -> None:
        """Gather the parts, of which each kind needs some.

        Args:
            kind: see above.
            moving: for `ema`; for the others, the iterate where it must outlive the moment that an iteration begins.
            base: a frozen copy of the policy as the run began; not needed where adapters can be switched off.
            scoped: whether only adapters train.
            weight: of the base in the mixture.
        """
        self.kind, self.moving, self.scoped, self.weight = kind, moving, scoped, weight
        # In a tuple, and this object no module: nothing of it is saved, moved or trained by its owner.
        self._base = (base,)

    def base(self, policy: nn.Module) -> nn.Module | None:
        """The policy as the run began, where it is at hand."""
        if self.scoped:
            return Scoped(policy)
        (base,) = self._base
        weight, here = (next(m.parameters(), None) if m is not None else None for m in (base, policy))
        if base is not None and weight is not None and here is not None and weight.device != here.device:
            base.to(here.device)
        return base

    def player(self, policy: nn.Module) -> nn.Module:
        """The model that generates and scores. Where nothing is kept of the iterate, that is the policy as it is now."""
        iterate = policy
        if isinstance(self.moving, MovingAdapters):
            iterate = Scoped(policy, REFERENCE_SCOPE)
        elif isinstance(self.moving, MovingCopy):
            iterate = self.moving.model
        base = self.base(policy)
        if self.kind == "base":
            assert base is not None
            return base
        if self.kind == "mixture":
            assert base is not None
            return GeometricMixture(iterate, base, self.weight)
        return iterate


def served_weights(player: nn.Module) -> dict[str, Tensor]:
    """The weights of a player as another engine reads them: whole, adapters merged, under the names that an export gives.

    A collective where they are sharded.

    Args:
        player: from `Opponent.player`, and no mixture: two models cannot be handed over as one.
    """
    model, scopes = (player.model, player.scopes) if isinstance(player, Scoped) else (player, None)
    with nullcontext() if scopes is None else using_lora(model, *scopes):
        weights = merged_weights(model, whole_weights(model))
    return transformers_weights(model, weights)[1] if isinstance(model, PretrainedLM) else weights
