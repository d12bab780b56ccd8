"""CALM: a frozen anchor that reads the hidden states of frozen augmenting models by trained cross-attention.

Bansal et al. 2024, "LLM Augmented LLMs: Expanding Capabilities through Composition", arXiv 2401.02412. An augment is either
aligned or reads a prefix. An aligned augment reads the same text as the anchor, and position t of the anchor sees only the
augment's positions that end at or before t. A prefix is a separate input that the augment encodes once, and every position of
the anchor sees all of it.

Shapes: ``N`` positions and width ``D`` of the anchor, ``M`` positions and width ``A`` of an augment.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from lightning_align.calm.alignment import Alignment
from lightning_align.calm.attention_inputs import attention_inputs
from lightning_align.calm.cache import Attended, CALMCache
from lightning_align.calm.connections import Connection, ConnectionConfig
from lightning_align.calm.layers import Layer, LayerChoice, Position, Tap, find_layers, visiting
from lightning_align.calm.own_cache import can_cache, make_cache
from lightning_align.calm.persistence import StoredModel
from lightning_align.calm.probe import check_finite, probe_width
from lightning_align.calm.readers import anchor_places, build_reader
from lightning_align.calm.reading import Reader
from lightning_align.calm.recompute import recomputed_layers
from lightning_align.calm.spec import Augment, Inputs, Spot, augment_model
from lightning_align.calm.static import StepCALM
from lightning_align.calm.unpadded import longest_unpadded, unpadded_inputs
from lightning_align.models.activations import Run, recomputing
from lightning_align.models.building import Backbone
from lightning_align.models.language_model import (
    Head,
    context_length,
    declared_ends,
    has_hidden,
    logits_of,
    vocabulary_size,
)
from lightning_align.models.unpadded import Unpadded


class Trace(NamedTuple):
    """Measurements of one connection in one forward pass."""

    name: str
    """The name of the connection in logs."""
    ratio: Tensor
    """The norm of the connection's output divided by the norm of the residual stream that it is added to."""
    weights: Tensor | None
    """(B, H, N, M) attention weights. None unless they were requested."""


class CALM(StoredModel):
    """A composition of an anchor and its augments. It is a language model like its anchor, and only `connections` train.

    The constructor freezes the models and registers hooks in them. `release` undoes both. The anchor alone works as before.
    """

    def __init__(
        self,
        anchor: str | Backbone | nn.Module,
        augments: "Augment | nn.Module | Sequence[Augment | nn.Module]",
        *,
        connection: ConnectionConfig | None = None,
        combine: Literal["sequence", "sum"] = "sequence",
        anchor_layers: LayerChoice | None = None,
        anchor_position: Position = "output",
        gradient_checkpointing: bool | None = None,
        check: bool = True,
    ) -> None:
        """Compose the models.

        Args:
            anchor: A causal language model, or what builds it: the path of a checkpoint or folder, or `class_path` and
                `init_args`.
            augments: One or more models and how they are connected. A bare module gets evenly spaced connections.
            connection: The architecture of the connections.
            combine: How to combine several connections that end at the same layer. With `sequence`, each sees the output of the
                one before it. With `sum`, all see the layer's own hidden state.
            anchor_layers: The anchor's layers, given as `layers` of an `Augment`. By default they are found automatically.
            anchor_position: Whether to add connections to a layer's input or to its output.
            gradient_checkpointing: Whether the backward pass computes the anchor's layers again, which saves memory. By default
                it does if the anchor was built with gradient checkpointing.
            check: Whether to check the values of hidden states on a few tokens: they must be finite and, except for a prefix,
                causal. Shapes are always checked.

        Raises:
            ValueError: If the models cannot be composed in this way. The message says why.
        """
        arguments = dict(locals())
        super().__init__()
        anchor, specs, config = self.build_parts(anchor, augments, arguments)
        if not specs:
            raise ValueError("CALM: `augments` is empty. Pass at least one model.")
        self.anchor = anchor
        self.augments = nn.ModuleList(augment_model(spec) for spec in specs)
        self.combine, self.anchor_position = combine, anchor_position
        layers = find_layers(anchor, anchor_layers)
        self._modes_before = {module: module.training for module in self.modules() if module is not self}
        self._trainable_before = [p for p in self.parameters() if p.requires_grad]
        self.requires_grad_(False)
        self._spots: list[Spot] = []
        self._places: list[tuple[int, Position]] = []
        self._taps: list[tuple[Tap, list[int]]] = []
        self.readers: list[Reader] = []
        """The reader of each augment."""
        self.connections = nn.ModuleList()
        try:
            self.train(self.training)
            check_finite(anchor, "the anchor")
            dim = probe_width(anchor, layers, what="the anchor", causal=True, check=check)
            for index, (spec, model) in enumerate(zip(specs, self.augments, strict=True)):
                self._connect(index, spec, model, layers, dim, config, check)
            self._layers = layers
            self._recomputed = recomputed_layers(anchor, layers, self._places, gradient_checkpointing)
            for layer, at in sorted(set(self._places)):
                indices = [i for i, place in enumerate(self._places) if place == (layer, at)]
                self._taps.append((Tap(layers[layer - 1].site(at)), indices))
        except ValueError:
            self.release()
            raise
        weight = next(anchor.parameters())
        self.connections.to(weight.device, weight.dtype)
        self.record_settings(config)
        self._given: Inputs | Callable[[Tensor], Inputs] | None = None
        self._traces: list[Trace] | None = None
        self._maps = False
        self.alignment: Alignment | None = None
        """The tokenizers of augments that have their own. With it, inputs of these augments need not be passed."""

    def _connect(
        self, index: int, spec: Augment, model: nn.Module, layers: list[Layer], dim: int, config: ConnectionConfig, check: bool
    ) -> None:
        """Build the reader and the connections of one augment."""
        what = f"augment {index}"
        check_finite(model, what)
        prefix = spec.alignment == "prefix"
        sizes = vocabulary_size(self.anchor), vocabulary_size(model)
        if not prefix and spec.tokens is None and None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"{what} must have the vocabulary size of the anchor, {sizes[0]}, but has {sizes[1]}. If both models share a "
                "tokenizer, set `tokens: shared`. If the augment has its own tokenizer, set `tokens: own` and pass its "
                "tokenizer as `augment_tokenizers` of a CALMDataModule, or the character ends as `AugmentInput.ends`."
            )
        reader, pairs, widths = build_reader(spec, model, layers, what, check=check)
        self.readers.append(reader)
        self._places += anchor_places(spec, pairs, self.anchor_position, what)
        for (augment_layer, anchor_layer), width in zip(pairs, widths, strict=True):
            self._spots.append(Spot(index, augment_layer, anchor_layer))
            self.connections.append(Connection(dim, width, config, rotates=not prefix))

    # -- the interface of a language model

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CALMCache | StepCALM | None = None,
        inputs: Inputs | None = None,
    ) -> Tensor:
        """Compute the logits (B, N, V). The arguments are those of `hidden`.

        Raises:
            ValueError: If the anchor does not accept an argument that was passed.
        """
        if has_hidden(self.anchor):
            head: Any = self.head
            logits: Tensor = head.logits(self.hidden(tokens, mask=mask, positions=positions, cache=cache, inputs=inputs))
            return logits
        if cache is not None or positions is not None:
            raise ValueError(
                f"`positions` and `cache` must be None for the anchor {type(self.anchor).__name__}, which accepts neither."
            )
        if mask is not None and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError(
                f"The anchor {type(self.anchor).__name__} accepts no mask, but the rows have padding on the left. "
                "Pad its rows on the right."
            )
        with self._composed(tokens, mask, None, None, inputs):
            return logits_of(self.anchor, tokens)

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CALMCache | StepCALM | None = None,
        inputs: Inputs | None = None,
    ) -> Tensor:
        """Compute the final hidden states, from which `head` computes the logits. The anchor must have both.

        Args:
            tokens: (B, N) int64 token ids. With a cache, the tokens after the cached ones.
            mask: (B, M) bool, true at real tokens. M counts the cached and the new columns. (B, 1, N, M) is used as it is.
                None if all tokens are real or the padding is on the right.
            positions: (N,) or (B, N) int64. Default counts from the first column.
            cache: A cache from `make_cache`, extended in place.
            inputs: The input of each augment. None for an augment that reads the anchor's tokens, or has its prefix in the
                cache.

        Returns:
            (B, N, D).
        """
        anchor: Any = self.anchor
        with self._composed(tokens, mask, positions, cache, inputs):
            hidden: Tensor = anchor.hidden(
                tokens, mask=mask, positions=positions, cache=None if cache is None else cache.anchor
            )
        if cache is not None:
            cache.advance(tokens.shape[1])
        return hidden

    def longest_unpadded(self, device: torch.device) -> float | None:
        """Return the length of the longest row that `unpadded_hidden` computes, or None if it should not be used."""
        apart = self.alignment is not None or self._given is not None or self._maps
        return None if apart else longest_unpadded((self.anchor, *self.augments), self.readers, device)

    def unpadded_hidden(self, unpadded: Unpadded, *, inputs: Inputs | None = None) -> Tensor:
        """Compute the final hidden states (T, D) of rows without their padding. See `hidden`."""
        attended = unpadded_inputs(self.readers, self._spots, self.connections, unpadded, inputs)
        anchor: Any = self.anchor
        with self._adding(attended, recompute=True):
            hidden: Tensor = anchor.unpadded_hidden(unpadded)
        return hidden

    @property
    def head(self) -> Head | None:
        """The anchor's output layer. None if the anchor has no `hidden` and `head`."""
        return self.anchor.head if has_hidden(self.anchor) else None

    @property
    def num_tokens(self) -> int | None:
        """V, the anchor's vocabulary size."""
        return vocabulary_size(self.anchor)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids that the anchor declares."""
        return declared_ends(self.anchor)

    @property
    def max_seq_len(self) -> int | None:
        """The shortest context length of the anchor and the augments that read its tokens. None if it is not known."""
        aligned = [reader.model for reader in self.readers if not (reader.prefix or reader.own)]
        return min((size for model in (self.anchor, *aligned) if (size := context_length(model)) is not None), default=None)

    @property
    def make_cache(self) -> Callable[[int, int], CALMCache] | None:
        """A function that makes a cache for ``batch`` rows and ``length`` columns.

        None if the anchor or an aligned augment has no cache, or the tokenizers of an augment with its own are not known.
        """
        return self._make_cache if can_cache(self) else None

    def _make_cache(self, batch: int, length: int) -> CALMCache:
        return make_cache(self, batch, length)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all models that have a list of them. A sharded strategy gathers these one at a time."""
        models = (self.anchor, *self.augments)
        return [block for model in models for block in getattr(model, "blocks", ())]

    def layers_to_recompute(self) -> list[tuple[nn.Module, Run]]:
        """Return how the anchor's layers run with activation checkpointing, or nothing if they are checkpointed already."""
        return [] if self._recomputed else recomputed_layers(self.anchor, self._layers, self._places, True)

    # -- the forward pass

    @contextmanager
    def _composed(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: CALMCache | StepCALM | None,
        inputs: Inputs | None,
    ) -> Iterator[None]:
        """Read the augments, then add the connections to the anchor's residual stream inside a ``with`` block."""
        if inputs is None:
            inputs = self._given(tokens) if callable(self._given) else self._given
        if self.alignment is not None and cache is None:
            inputs = self.alignment.fill(inputs, self.readers, tokens, mask)
        attended = attention_inputs(
            self.readers, self._spots, self.connections, tokens, mask=mask, positions=positions, cache=cache, inputs=inputs
        )
        with self._adding(attended, recompute=cache is None):
            yield

    @contextmanager
    def _adding(self, attended: list[Attended], *, recompute: bool) -> Iterator[None]:
        """Add the connections to the anchor's residual stream inside a ``with`` block."""

        def adder(indices: list[int]) -> Callable[[Tensor], Tensor]:
            return lambda hidden: self._add(hidden, indices, attended)

        visits = {tap: adder(indices) for tap, indices in self._taps}
        with visiting(visits), recomputing(self._recomputed if recompute else ()):
            yield
        for tap, indices in self._taps:
            if tap.visits != 1:
                raise ValueError(
                    f"The anchor must run layer {self._spots[indices[0]].anchor_layer} once per forward pass, but ran it "
                    f"{tap.visits} times. Do not use a composition after `release`, and compile the anchor only after "
                    "composing it."
                )

    def _add(self, hidden: Tensor, indices: list[int], attended: list[Attended]) -> Tensor:
        given = hidden
        hidden = result = given if given.ndim > 2 else given[None]  # (T, D) without padding
        for i in indices:
            at = attended[i]
            seen = hidden if self.combine == "sum" else result
            added = self.connections[i](seen, at.k, at.v, at.positions, at.visible)
            if self._traces is not None:
                ratio = added.detach().float().norm() / seen.detach().float().norm()
                connection: Any = self.connections[i]
                weights = connection.attention(seen, at.k, at.positions, at.visible) if self._maps else None
                self._traces.append(Trace(self._spots[i].name, ratio, weights))
            result = result + added
        return result.view_as(given)

    @contextmanager
    def given(self, inputs: "Inputs | Callable[[Tensor], Inputs]") -> Iterator[None]:
        """Set the augments' inputs inside a ``with`` block, for callers that pass only tokens, such as the sampler.

        Args:
            inputs: The input of each augment, with as many rows as the batch. A prefix may have a single row, which all rows
                share. Or a function that computes the inputs from the anchor's tokens.
        """
        self._given = inputs
        try:
            yield
        finally:
            self._given = None

    @contextmanager
    def tracing(self, *, maps: bool = False) -> Iterator[list[Trace]]:
        """Record a `Trace` of each connection inside a ``with`` block.

        Args:
            maps: Whether to record the attention weights as well.
        """
        self._traces, self._maps = [], maps
        try:
            yield self._traces
        finally:
            self._traces, self._maps = None, False

    # -- frozen models

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the connections. The frozen models are always in eval mode."""
        super().train(mode)
        self.anchor.eval()
        self.augments.eval()
        return self

    def release(self) -> None:
        """Remove the hooks, and restore which parameters of the models train and the mode of each module."""
        for tap in [tap for tap, _ in self._taps] + [tap for reader in self.readers for tap in reader.taps.values()]:
            tap.remove()
        for module, training in self._modes_before.items():
            module.training = training
        for parameter in self._trainable_before:
            parameter.requires_grad_(True)

    # -- the connections

    @property
    def spots(self) -> list[Spot]:
        """The layers that each connection connects, in the order of `connections`."""
        return list(self._spots)

    def depths(self, augment: int) -> list[int]:
        """Return the layers of an augment that are read, first to last. `AugmentInput.states` has their hidden states."""
        return list(self.readers[augment].depths)

    def describe(self) -> str:
        """Describe the connections, one per line."""
        trained = sum(p.numel() for p in self.connections.parameters())
        lines = [f"  augment {s.augment}, layer {s.augment_layer} -> anchor, layer {s.anchor_layer}" for s in self._spots]
        return "\n".join(
            [f"{len(lines)} connections, {trained:,} trained parameters, at layer {self.anchor_position}s:", *lines]
        )
