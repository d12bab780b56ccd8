"""CALM: a frozen anchor that reads, by trained cross-attention, the hidden states of frozen augmenting models.

Bansal et al. 2024, "LLM Augmented LLMs: Expanding Capabilities through Composition", arXiv 2401.02412. Both models read
the same text, and position t of the anchor sees the augment's positions that end at or before t, and none that come later
(aligned); or the augment encodes something else, once, and every position sees all of it (prefix).
Shapes: ``N`` and ``M`` positions of the anchor and of an augment, ``D`` and ``A`` their widths.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_align.calm.cache import Attended, CALMCache, remember
from lightning_align.calm.connections import Connection, ConnectionConfig, Visible, visible_where
from lightning_align.calm.layers import Position, Tap, find_layers, visiting
from lightning_align.calm.probe import check_finite, check_frozen, probe_width
from lightning_align.calm.reading import Reader
from lightning_align.calm.spec import Augment, AugmentInput, Inputs, Spot, augment_model, check_realigned, pairs_of
from lightning_align.models.attention import attention_mask
from lightning_align.models.language_model import Head, context_length, has_cache, has_hidden, logits_of, vocabulary_size
from lightning_align.models.weights import load_weights, weights_hash
from lightning_align.runtime.files import publish


class Trace(NamedTuple):
    """What a connection did in one forward pass."""

    name: str
    ratio: Tensor
    """Norm of its contribution over the norm of the residual stream that it is added to."""
    weights: Tensor | None
    """(B, H, N, M) attention weights, where they were asked for."""


class CALM(nn.Module):
    """The composition: a language model like its anchor, of which only `connections` train.

    It takes the models as they are and freezes them; `release` gives them back as they were. The anchor goes on working alone.
    """

    def __init__(
        self,
        anchor: nn.Module,
        augments: "Augment | nn.Module | Sequence[Augment | nn.Module]",
        *,
        connection: ConnectionConfig | None = None,
        combine: Literal["sequence", "sum"] = "sequence",
        anchor_layers: str | None = None,
        anchor_position: Position = "output",
        check: bool = True,
    ) -> None:
        """Compose.

        Args:
            anchor: a causal language model.
            augments: one or more models and how they are connected; a bare module is connected evenly.
            connection: what the connections are made of.
            combine: where several connections end at one layer, whether each sees what the one before it added (`sequence`) or
                all see the layer's own state (`sum`).
            anchor_layers: names of the anchor's layers, such as `model.layers.*`; by default they are found.
            anchor_position: whether connections are added to a layer's input or to its output.
            check: whether to run a few tokens through the models, to find out about leaks and wrong layouts now.

        Raises:
            ValueError: if the models cannot be composed in this way; it says why.
        """
        super().__init__()
        given = [augments] if isinstance(augments, (Augment, nn.Module)) else list(augments)
        specs = [a if isinstance(a, Augment) else Augment(a) for a in given]
        if not specs:
            raise ValueError("CALM: augments is empty: give at least one model")
        self.anchor = anchor
        self.augments = nn.ModuleList(augment_model(spec) for spec in specs)
        self.combine, self.anchor_position = combine, anchor_position
        config = connection or ConnectionConfig()
        layers = find_layers(anchor, anchor_layers)
        self._before = {module: module.training for module in self.modules() if module is not self}
        self._trainable = [p for p in self.parameters() if p.requires_grad]
        self.requires_grad_(False)
        self._spots: list[Spot] = []
        self._taps: list[tuple[Tap, list[int]]] = []
        self.readers: list[Reader] = []
        """What reads each augment."""
        self.connections = nn.ModuleList()
        try:
            self.train(self.training)
            check_finite(anchor, "the anchor")
            dim = probe_width(anchor, layers, what="the anchor", causal=True, check=check)
            for index, (spec, model) in enumerate(zip(specs, self.augments, strict=True)):
                self._connect(index, spec, model, len(layers), dim, config, check)
            for layer in sorted({spot.anchor_layer for spot in self._spots}):
                ends = [i for i, spot in enumerate(self._spots) if spot.anchor_layer == layer]
                self._taps.append((Tap(layers[layer - 1].site(anchor_position)), ends))
        except ValueError:
            self.release()
            raise
        weight = next(anchor.parameters())
        self.connections.to(weight.device, weight.dtype)
        self._identity: dict[str, str] | None = None
        self._given: Inputs | Callable[[Tensor], Inputs] | None = None
        self._traces: list[Trace] | None = None
        self._maps = False

    def _connect(
        self, index: int, spec: Augment, model: nn.Module, num_anchor: int, dim: int, config: ConnectionConfig, check: bool
    ) -> None:
        """Make the connections of one augment, and what reads it."""
        what = f"augment {index}"
        check_finite(model, what)
        prefix = spec.alignment == "prefix"
        own = spec.tokens == "own"
        sizes = vocabulary_size(self.anchor), vocabulary_size(model)
        if not prefix and spec.tokens is None and None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"{what} has a vocabulary of {sizes[1]} and the anchor one of {sizes[0]}: if both have one tokenizer say "
                "`tokens: shared`; if it has its own say `tokens: own` and give the characters at which tokens end "
                "(AugmentInput.ends; in a CALMDataModule, augment_tokenizers)"
            )
        layers = find_layers(model, spec.layers)
        pairs = pairs_of(spec, len(layers), num_anchor, what)
        width = spec.dim
        if width is None:
            width = probe_width(model, layers, what=what, causal=not prefix, check=check)
        reader = Reader(model, layers, sorted({augment for augment, _ in pairs}), spec.position, prefix=prefix, own=own)
        self.readers.append(reader)
        for augment_layer, anchor_layer in pairs:
            self._spots.append(Spot(index, augment_layer, anchor_layer))
            self.connections.append(Connection(dim, width, config, rotates=not prefix))

    # -- what a language model offers

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CALMCache | None = None,
        inputs: Inputs | None = None,
    ) -> Tensor:
        """Logits (B, N, V); the arguments are those of `hidden`."""
        if has_hidden(self.anchor):
            head: Any = self.head
            logits: Tensor = head.logits(self.hidden(tokens, mask=mask, positions=positions, cache=cache, inputs=inputs))
            return logits
        if cache is not None or positions is not None:
            raise ValueError(f"the anchor {type(self.anchor).__name__} takes neither positions nor a cache")
        if mask is not None and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError(f"the anchor {type(self.anchor).__name__} takes tokens only: pad its rows on the right")
        with self._composed(tokens, mask, None, None, inputs):
            return logits_of(self.anchor, tokens)

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CALMCache | None = None,
        inputs: Inputs | None = None,
    ) -> Tensor:
        """Final hidden states of the composition, of which `head` makes the logits; for anchors that have both.

        Args:
            tokens: (B, N) int64; with a cache, the tokens after those that it holds.
            mask: (B, M) bool, true at tokens that exist; M counts the cached columns and the new ones. None if all exist, or if
                what does not stands on the right.
            positions: (N,) or (B, N) int64; by default counted from the first column.
            cache: from `make_cache`; extended in place.
            inputs: of each augment; None for one that reads the anchor's tokens, or that has read its prefix into the cache.

        Returns:
            (B, N, D).
        """
        past = 0 if cache is None else cache.length
        anchor: Any = self.anchor
        with self._composed(tokens, mask, positions, cache, inputs):
            hidden: Tensor = anchor.hidden(
                tokens, mask=mask, positions=positions, cache=None if cache is None else cache.anchor
            )
        if cache is not None:
            cache.length = past + tokens.shape[1]
        return hidden

    @property
    def head(self) -> Head | None:
        """The anchor's output layer; None if it does not show one."""
        return self.anchor.head if has_hidden(self.anchor) else None

    @property
    def num_tokens(self) -> int | None:
        """V, of the anchor."""
        return vocabulary_size(self.anchor)

    @property
    def max_seq_len(self) -> int | None:
        """The most tokens that the anchor and all augments that read them along can read; None if none of them says."""
        along = [reader.model for reader in self.readers if not (reader.prefix or reader.own)]
        return min((size for model in (self.anchor, *along) if (size := context_length(model)) is not None), default=None)

    @property
    def make_cache(self) -> Callable[[int, int], CALMCache] | None:
        """Room for the past of ``batch`` rows and ``length`` columns; None if a model that reads along has no cache."""
        along = [reader for reader in self.readers if not reader.prefix]
        if not has_cache(self.anchor) or any(reader.own or not has_cache(reader.model) for reader in along):
            return None
        return self._make_cache

    def _make_cache(self, batch: int, length: int) -> CALMCache:
        anchor: Any = self.anchor
        models: list[Any] = [reader.model for reader in self.readers]
        caches = [None if r.prefix else model.make_cache(batch, length) for r, model in zip(self.readers, models, strict=True)]
        return CALMCache(anchor.make_cache(batch, length), caches, length, [None] * len(self._spots))

    @property
    def blocks(self) -> list[nn.Module]:
        """The models' blocks, where they have a list of them: what a sharded strategy gathers one at a time."""
        models = (self.anchor, *self.augments)
        return [block for model in models for block in getattr(model, "blocks", ())]

    # -- composing

    @contextmanager
    def _composed(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: CALMCache | None,
        inputs: Inputs | None,
    ) -> Iterator[None]:
        """Read the augments; then, for the length of the block, add to what passes through the anchor."""
        if inputs is None:
            inputs = self._given(tokens) if callable(self._given) else self._given
        attended = self._attend(tokens, mask, positions, cache, inputs)

        def adder(ends: list[int]) -> Callable[[Tensor], Tensor]:
            return lambda hidden: self._add(hidden, ends, attended)

        with visiting({tap: adder(ends) for tap, ends in self._taps}):
            yield
        for tap, ends in self._taps:
            if tap.visits != 1:
                raise ValueError(
                    f"the anchor passed {tap.visits} times through layer {self._spots[ends[0]].anchor_layer}, expected once: "
                    "was the composition released, or the anchor compiled before it was composed?"
                )

    def _add(self, hidden: Tensor, ends: list[int], attended: list[Attended]) -> Tensor:
        result = hidden
        for i in ends:
            at = attended[i]
            seen = hidden if self.combine == "sum" else result
            added = self.connections[i](seen, at.k, at.v, at.positions, at.visible)
            if self._traces is not None:
                ratio = (added.detach().norm() / seen.detach().norm()).float()
                connection: Any = self.connections[i]
                weights = connection.attention(seen, at.k, at.positions, at.visible) if self._maps else None
                self._traces.append(Trace(self._spots[i].name, ratio, weights))
            result = result + added
        return result

    def _attend(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: CALMCache | None,
        inputs: Inputs | None,
    ) -> list[Attended]:
        past, new = (0 if cache is None else cache.length), tokens.shape[1]
        if inputs is None:
            inputs = [None] * len(self.readers)
        if len(inputs) != len(self.readers):
            raise ValueError(f"inputs are of {len(inputs)} augments, expected {len(self.readers)}, in their order")
        if positions is None:
            positions = torch.arange(past, past + new, device=tokens.device)
        attended: list[Attended] = []
        for index, (reader, given) in enumerate(zip(self.readers, inputs, strict=True)):
            mine = [i for i, spot in enumerate(self._spots) if spot.augment == index]
            if cache is not None and reader.prefix and past:
                attended += [at._replace(positions=positions) for i in mine if (at := cache.attended[i]) is not None]
                continue
            given, visible = self._visible(index, reader, given, tokens, mask, past, cache)
            if given.states is not None:
                states = dict(zip(reader.depths, given.states, strict=True))
            else:
                aligned = not (reader.prefix or reader.own)
                augment_cache = cache.augments[index] if cache is not None and aligned else None
                states = reader.read(given.tokens, given.mask, positions if aligned else None, augment_cache)
            at_anchor, at_augment = positions, positions
            if given.ends is not None and given.anchor_ends is not None:
                at_anchor, at_augment = given.anchor_ends, given.ends
            for i in mine:
                connection: Any = self.connections[i]
                k, v = connection.keys_values(states[self._spots[i].augment_layer], at_augment)
                if reader.prefix and k.shape[0] == 1:
                    k, v = (t.expand(tokens.shape[0], -1, -1, -1) for t in (k, v))
                at = Attended(k, v, at_anchor, visible)
                attended.append(at if cache is None else remember(cache, i, at, past, reader.prefix))
        return attended

    def _visible(
        self,
        index: int,
        reader: Reader,
        given: AugmentInput | None,
        tokens: Tensor,
        mask: Tensor | None,
        past: int,
        cache: CALMCache | None,
    ) -> tuple[AugmentInput, Visible]:
        """What an augment reads now, and which of it each position of the anchor may see."""
        if given is not None and given.ends is not None:
            check_realigned(index, prefix=reader.prefix, own=reader.own)
        if reader.prefix:
            if given is None and cache is not None:
                given = AugmentInput(tokens, mask)  # the prompt, of which the anchor makes its first columns
            if given is None:
                raise ValueError(f"augment {index} reads a prefix: give it as inputs[{index}]")
            if given.mask is not None and given.states is None:
                # Sampling pads on the left, and a model that learned its positions would count the pads. In which order a
                # prefix is seen makes no difference: keys of a prefix have no positions.
                order = (~given.mask).int().argsort(dim=1, stable=True)
                rows = torch.arange(len(order), device=order.device)[:, None]
                given = given._replace(tokens=given.tokens[rows, order], mask=given.mask[rows, order])
            return given, Visible(None) if given.mask is None else visible_where(given.mask.unsqueeze(1))
        if reader.own:
            if given is None or given.ends is None or given.anchor_ends is None:
                raise ValueError(
                    f"augment {index} has its own tokenizer: give its tokens and the characters at which they end, and those "
                    f"of the anchor, as inputs[{index}]"
                )
            allowed = given.ends[:, None, :] <= given.anchor_ends[:, :, None]
            if given.mask is not None:
                allowed = allowed & given.mask[:, None, :]
            return given, visible_where(allowed)
        states = None if given is None else given.states
        if mask is not None:
            visible = Visible(attention_mask(mask, tokens.shape[1], causal=True))
        elif cache is None:
            visible = Visible(None, causal=True)
        else:
            whole = torch.ones(tokens.shape[0], past + tokens.shape[1], dtype=torch.bool, device=tokens.device)
            visible = Visible(None if tokens.shape[1] == 1 else attention_mask(whole, tokens.shape[1], causal=True))
        return AugmentInput(tokens, mask, states=states), visible

    @contextmanager
    def given(self, inputs: "Inputs | Callable[[Tensor], Inputs]") -> Iterator[None]:
        """Give the augments their inputs for the length of a block, for callers that pass tokens only, as sampling does.

        Args:
            inputs: of each augment; of one row, which all rows then share, or of as many as will be asked for. Or a function
                from the anchor's tokens to them.
        """
        self._given = inputs
        try:
            yield
        finally:
            self._given = None

    @contextmanager
    def tracing(self, *, maps: bool = False) -> Iterator[list[Trace]]:
        """Record what each connection does, for the length of a block.

        Args:
            maps: whether to record the attention weights as well.
        """
        self._traces, self._maps = [], maps
        try:
            yield self._traces
        finally:
            self._traces, self._maps = None, False

    # -- frozen parts

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the connections; what is frozen is evaluated, always."""
        super().train(mode)
        self.anchor.eval()
        self.augments.eval()
        return self

    def release(self) -> None:
        """Take the hooks out and give the models back as they were: what trained, and in which mode."""
        for tap in [tap for tap, _ in self._taps] + [tap for reader in self.readers for tap in reader.taps.values()]:
            tap.remove()
        for module, training in self._before.items():
            module.training = training
        for parameter in self._trainable:
            parameter.requires_grad_(True)

    @property
    def identity(self) -> dict[str, str]:
        """SHA-256 of the weights of each frozen model; computed once, before they are sharded if they are."""
        if self._identity is None:
            models = {"anchor": self.anchor} | {f"augments.{i}": model for i, model in enumerate(self.augments)}
            self._identity = {name: weights_hash(model) for name, model in models.items()}
        return self._identity

    # -- the connections on file

    @property
    def spots(self) -> list[Spot]:
        """Where the connections stand, in the order of `connections`."""
        return list(self._spots)

    def depths(self, augment: int) -> list[int]:
        """The layers of an augment that are read, first to last: of these are `AugmentInput.states`."""
        return list(self.readers[augment].depths)

    def describe(self) -> str:
        """The connections, a line each."""
        trained = sum(p.numel() for p in self.connections.parameters())
        lines = [f"  augment {s.augment}, layer {s.augment_layer} -> anchor, layer {s.anchor_layer}" for s in self._spots]
        return "\n".join(
            [f"{len(lines)} connections, {trained:,} trained parameters, at layer {self.anchor_position}s:", *lines]
        )

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """The connections' weights, and nothing of the frozen models."""
        return {f"connections.{name}": value for name, value in self.connections.state_dict().items()}

    def save_connections(self, path: str | Path) -> None:
        """Write the connections to a safetensors file, with the identity of the models that they connect.

        Args:
            path: the file; written whole or not at all.
        """
        state = {name: value.detach().cpu().contiguous() for name, value in self.trainable_state_dict().items()}
        metadata = {**self.identity, "spots": json.dumps(self._spots)}
        publish(path, lambda temporary: save_file(state, temporary, metadata=metadata))

    def load_connections(self, path: str | Path) -> None:
        """Read what `save_connections` wrote.

        Args:
            path: the file.

        Raises:
            ValueError: if it is of other models or connects other layers.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {name.removeprefix("connections."): file.get_tensor(name) for name in file.keys()}
        except Exception as error:  # safetensors has its own kinds
            raise ValueError(f"{path}: cannot be read ({error}); give a file that save_connections wrote") from error
        spots = [list(spot) for spot in self._spots]
        if json.loads(metadata.get("spots", "null")) != spots:
            raise ValueError(
                f"{path}: has connections {metadata.get('spots')} (augment, its layer, anchor's layer), here they are {spots}"
            )
        check_frozen(self.identity, metadata, path)
        load_weights(self.connections, state, path)
