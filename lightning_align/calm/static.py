"""The static form of a composition's cache. See `lightning_align.models.static_cache`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_align.models.static_cache import Buffers, write


def has_static(cache: Any) -> bool:
    """Return whether a cache has a static form.

    An augment with its own tokenizer reads a number of tokens per step that depends on the text, and prefixes have any length.
    """
    return all(callable(getattr(part, "static", None)) for part in (cache.anchor, *cache.augments))


class StaticCALM:
    """The static caches of all models, and the buffers of each connection's keys and values.

    Args:
        cache: A cache of prompts that have been read.
        batch: The number of rows.
        length: The number of columns.
    """

    def __init__(self, cache: Any, batch: int, length: int) -> None:
        self._models = [part.static(batch, length) for part in (cache.anchor, *cache.augments)]
        self._connections = Buffers(_parts(cache), batch, length)

    def insert(self, cache: Any, first: int, copies: int) -> None:
        """See `StaticCache.insert`."""
        for static, usual in zip(self._models, (cache.anchor, *cache.augments), strict=True):
            static.insert(usual, first, copies)
        self._connections.insert(_parts(cache), cache.length, first, copies)

    def select(self, rows: Tensor, columns: int) -> None:
        """See `StaticCache.select`."""
        for static in (*self._models, self._connections):
            static.select(rows, columns)

    def resize(self, batch: int, length: int) -> None:
        """See `StaticCache.resize`."""
        for static in (*self._models, self._connections):
            static.resize(batch, length)

    def step(self, columns: Tensor, width: int) -> "StepCALM":
        """See `StaticCache.step`."""
        anchor, *augments = (static.step(columns, width) for static in self._models)
        return StepCALM(anchor, augments, self._connections.views(len(columns), width), columns)


class StepCALM:
    """The cache of a step of `StaticCALM`."""

    length = 0

    def __init__(self, anchor: Any, augments: Sequence[Any], views: Sequence[Tensor], columns: Tensor) -> None:
        self.anchor, self.augments = anchor, list(augments)
        self._views, self._columns = views, columns

    def update(self, index: int, new: Any, past: int, prefix: bool) -> Any:
        """See `CALMCache.update`."""
        k, v = self._views[2 * index : 2 * index + 2]
        write(k, self._columns, new.k)
        write(v, self._columns, new.v)
        return new._replace(k=k, v=v)

    def advance(self, new: int) -> None:
        """Do nothing: the caller advances the columns of the rows."""


def _parts(cache: Any) -> list[Tensor]:
    return [part for attended in cache.attended if attended is not None for part in (attended.k, attended.v)]
