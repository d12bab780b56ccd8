"""Decoding with an augment that has its own tokenizer: each new token of the anchor costs the new tokens of the augment.

The augment's tokens of a row are only ever appended, because what is encoded does not depend on what follows. In a step, rows
get different numbers of tokens. The shorter ones are padded on the right, so the cache has holes, which the mask hides. When
the cache is full, it is made anew with twice the columns and without holes, so each token is read at most a few times.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.calm.alignment import Alignment
from lightning_align.calm.cache import Attended, CALMCache
from lightning_align.calm.connections import Connection, visible_where
from lightning_align.calm.context import warn_cut
from lightning_align.calm.reading import Reader
from lightning_align.calm.text import Cutter, Placed
from lightning_align.models.language_model import context_length, has_cache
from lightning_align.models.parallelize import uncompiled
from lightning_align.models.pretrained_cache import COARSE, TOLERANCE
from lightning_align.runtime.modes import evaluating
from lightning_align.runtime.ranks import is_sharded

_ROOM = 64
"""The number of free columns of a new cache, at least."""


class _Row:
    """What an augment has read of a row."""

    def __init__(self) -> None:
        self.cutter: Cutter | None = None
        self.is_whole = True
        self.placed: list[Placed] = []


class OwnCache:
    """The cache of one augment with its own tokenizer.

    Args:
        reader: The reader of the augment.
        connections: The connections of the augment, each with the layer that it reads.
        alignment: The conversion of rows.
        index: The index of the augment.
        batch: B, the number of rows.
    """

    def __init__(
        self,
        reader: Reader,
        connections: Sequence[tuple[int, Connection]],
        alignment: Alignment,
        index: int,
        batch: int,
    ) -> None:
        own = alignment.own[index]
        assert own is not None
        self.reader, self.connections = reader, connections
        self._alignment, self._own, self._index = alignment, own, index
        self._rows = [_Row() for _ in range(batch)]
        self._context = context_length(reader.model)
        self._cache: Any = None
        self._capacity = self._length = 0
        self._placed = torch.zeros(3, batch, 0, dtype=torch.long)
        """(3, B, M) the mask, the characters and the columns of the tokens that the cache holds."""
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def read(self, tokens: Tensor, mask: Tensor | None, past: int) -> list[Attended]:
        """Read new tokens of the anchor.

        Args:
            tokens: (B, N) token ids. In the first call these are the prompts.
            mask: (B, M) bool over the cached and the new columns, true at real tokens. None if all are real.
            past: The number of cached columns.

        Returns:
            What each connection attends to.
        """
        new = tokens.shape[1]
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask[:, past:]
        ends = torch.zeros(tokens.shape, dtype=torch.long)
        # The augment cannot read the text of tokens that the host does not know. This is the only wait for the device.
        ids_and_real = torch.stack((tokens, real.to(tokens.dtype))).tolist()
        added = [
            self._feed(row, ids, [bool(one) for one in is_real], past, end)
            for row, ids, is_real, end in zip(self._rows, *ids_and_real, ends, strict=True)
        ]
        if any(added) or self._cache is None:
            self._append(added, tokens.device)
        ends = ends.to(tokens.device, non_blocking=True)
        exists, columns = (part[:, None] for part in self._placed[[0, 2]].to(tokens.device, non_blocking=True))
        visible = visible_where(exists.bool() & (columns <= torch.arange(past, past + new, device=tokens.device)[:, None]))
        stop = self._length
        return [
            Attended(keys[:, :, :stop], values[:, :, :stop], ends, visible)
            for keys, values in zip(self._keys, self._values, strict=True)
        ]

    def _feed(self, row: _Row, ids: list[int], is_real: list[bool], past: int, ends: Tensor) -> list[Placed]:
        """Read the new tokens of a row, write their characters to ``ends``, and return the new tokens of the augment."""
        ids = [token for token, real in zip(ids, is_real, strict=True) if real]
        if not ids:
            return []
        pieces, found = [], list[Placed]()
        prompt: Sequence[int] | None = None
        first = len(is_real) - len(ids)  # prompts are padded on the left
        if row.cutter is None:
            row.cutter = self._own.cutter(num_prompt=len(ids), column=past + first)
            prompt = self._alignment.prompt(self._index, ids)
            row.is_whole = prompt is None
            if row.is_whole and self._own.other.bos_id is not None:
                found.append((self._own.other.bos_id, 0, past + first))
        for place, token in enumerate(ids, first):
            pieces += row.cutter.feed(token)
            ends[place] = row.cutter.num_characters
        if prompt is not None:
            found += self._own.place(prompt, end=row.cutter.num_characters, column=row.cutter.column - 1)
        else:
            found += self._own.encode(pieces, is_whole=row.is_whole)
        if self._context is not None and len(row.placed) + len(found) > self._context:
            warn_cut(self._index, self.reader)
            found = found[: self._context - len(row.placed)]
        row.placed += found
        return found

    def _append(self, added: list[list[Placed]], device: torch.device) -> None:
        width = max(map(len, added))
        if self._length + width > self._capacity or self._cache is None:
            added = [row.placed for row in self._rows]
            width = max([1, *map(len, added)])
            self._capacity = 2 * width + _ROOM
            model: Any = self.reader.model
            self._cache, self._length = model.make_cache(len(added), self._capacity), 0
            self._placed = self._placed[:, :, :0]
            self._keys = self._values = []
        filled = [[*row, *[(0, 0, 0)] * (width - len(row))] for row in added]
        ids, ends, columns = torch.tensor(filled).permute(2, 0, 1)
        exists = torch.arange(width) < torch.tensor([len(row) for row in added])[:, None]
        positions = self._placed[0].sum(dim=1)[:, None] + torch.arange(width)
        if self._context is not None:
            positions = positions.clamp(max=self._context - 1)  # of pads
        self._placed = torch.cat((self._placed, torch.stack((exists.long(), ends, columns))), dim=2)
        mask = self._placed[0].bool()
        ids, mask, positions, ends = (part.to(device, non_blocking=True) for part in (ids, mask, positions, ends))
        states = self.reader.read(ids, mask, positions, self._cache)
        new = [connection.keys_values(states[layer], ends) for layer, connection in self.connections]
        stop = self._length + width
        if not self._keys:
            self._keys, self._values = (
                [part.new_empty(*part.shape[:2], self._capacity, part.shape[3]) for part in parts]
                for parts in zip(*new, strict=True)
            )
        for keys, values, (k, v) in zip(self._keys, self._values, new, strict=True):
            keys[:, :, self._length : stop], values[:, :, self._length : stop] = k, v
        self._length = stop


def reads_with_holes(model: nn.Module) -> bool:
    """Return whether a model reads a row with a hole in its cache as it reads the row without it."""
    if not has_cache(model) or is_sharded(model):
        return False  # the ranks of a sharded model would read at different steps
    config = getattr(model, "config", None)
    if isinstance(getattr(config, "sliding_window", None), int) and getattr(config, "use_sliding_window", True):
        return False  # a window counts columns, and holes are columns
    device = next(model.parameters()).device
    tokens = torch.tensor([[1, 2, 0, 0], [2, 1, 0, 1]], device=device)
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 0, 1, 1]], device=device).bool()
    with evaluating(model), torch.autocast(device.type, enabled=False), uncompiled(model):
        cache = model.make_cache(2, 8)
        model.hidden(tokens, mask=mask[:, :4], positions=mask[:, :4].cumsum(1) - 1, cache=cache)
        last, places = tokens[:, :1], mask.sum(dim=1, keepdim=True) - 1
        found = model.hidden(last, mask=mask, positions=places, cache=cache)[:, -1]
        rows = [torch.cat((row[real[:4]], row[:1]))[None] for row, real in zip(tokens, mask, strict=True)]
        right = torch.cat([model.hidden(row)[:, -1] for row in rows])
    limit = TOLERANCE.get(right.dtype, COARSE)
    return bool((found - right).abs().max() <= limit * right.std())


def can_cache(model: Any) -> bool:
    """Return whether a composition can be decoded with a cache."""
    readers = [reader for reader in model.readers if not reader.prefix]
    if not has_cache(model.anchor) or not all(reader.has_cache for reader in readers):
        return False
    for reader in readers:
        if reader.own:
            if model.alignment is None:
                return False
            if reader.reads_with_holes is None:
                reader.reads_with_holes = reads_with_holes(reader.model)
    return all(reader.reads_with_holes for reader in readers if reader.own)


def make_cache(model: Any, batch: int, length: int) -> CALMCache:
    """Make the cache of a composition for B rows and a number of columns."""
    caches: list[Any] = []
    for index, reader in enumerate(model.readers):
        if reader.own:
            pairs = zip(model.spots, model.connections, strict=True)
            used = [(spot.augment_layer, connection) for spot, connection in pairs if spot.augment == index]
            caches.append(OwnCache(reader, used, model.alignment, index, batch))
        else:
            caches.append(None if reader.prefix else reader.model.make_cache(batch, length))
    return CALMCache(model.anchor.make_cache(batch, length), caches, length, [None] * len(model.spots))
