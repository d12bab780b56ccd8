"""The decoding cache of a composition: the anchor's cache, the augments' caches, and each connection's keys and values."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from lightning_align.calm.connections import Visible
from lightning_align.calm.static import StaticCALM, has_static


class Attended(NamedTuple):
    """What one connection attends to in one forward pass."""

    k: Tensor
    """(B, H, M, K) keys."""
    v: Tensor
    """(B, H, M, K) values."""
    positions: Tensor
    """(N,) or (B, N) int64, positions of the anchor's tokens, in the unit of the keys' positions (columns or characters)."""
    visible: Visible
    """Which keys each position of the anchor may see."""


@dataclass
class CALMCache:
    """The state of a composition between decoding steps."""

    anchor: Any
    """The anchor's cache."""
    augments: list[Any]
    """The cache of each augment. None for an augment that reads a prefix."""
    capacity: int
    """The number of columns that the cache can hold."""
    attended: list[Attended | None] = field(default_factory=list)
    """The keys and values of each connection. Those of an aligned augment are allocated for `capacity` columns."""
    length: int = 0
    """The number of columns read so far."""

    def update(self, index: int, new: Attended, past: int, prefix: bool) -> Attended:
        """Add a connection's new keys and values to the cache, in place.

        Args:
            index: The index of the connection.
            new: The new keys and values.
            past: The number of columns that the cache held before.
            prefix: Whether the augment reads a prefix. Its keys and values are stored as they are, not appended.

        Returns:
            ``new``, with all keys and values that the cache now holds for this connection.
        """
        if prefix:
            self.attended[index] = new
            return new
        stop = past + new.k.shape[2]
        stored = self.attended[index]
        if stored is None:
            shape = (*new.k.shape[:2], self.capacity, new.k.shape[3])
            stored = new._replace(k=new.k.new_empty(shape), v=new.v.new_empty(shape))
            self.attended[index] = stored
        stored.k[:, :, past:stop], stored.v[:, :, past:stop] = new.k, new.v
        return new._replace(k=stored.k[:, :, :stop], v=stored.v[:, :, :stop])

    def advance(self, new: int) -> None:
        """Count new columns as read."""
        self.length += new

    @property
    def static(self) -> Callable[[int, int], Any] | None:
        """A function that makes an empty cache of fixed size. See `lightning_align.models.static_cache`."""
        return partial(StaticCALM, self) if has_static(self) else None
