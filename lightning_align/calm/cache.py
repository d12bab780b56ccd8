"""What a composition keeps from one token to the next: three caches, of the anchor, of the augments, of what passes between."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lightning_align.calm.connections import Visible


class Attended(NamedTuple):
    """What a connection attends to."""

    k: Tensor
    v: Tensor
    positions: Tensor
    """Of the anchor, in the unit of the keys' positions."""
    visible: Visible


@dataclass
class CALMCache:
    """The past of a composition: the anchor's, the augments', and the projected keys and values of each connection."""

    anchor: Any
    augments: list[Any]
    capacity: int
    attended: list[Attended | None] = field(default_factory=list)
    """Of each connection; of an aligned one the keys and values have room for `capacity` columns."""
    length: int = 0


def remember(cache: CALMCache, index: int, new: Attended, past: int, prefix: bool) -> Attended:
    """Put a connection's new keys and values into the cache, and give all that it holds."""
    if prefix:
        cache.attended[index] = new
        return new
    stop = past + new.k.shape[2]
    room = cache.attended[index]
    if room is None:
        shape = (*new.k.shape[:2], cache.capacity, new.k.shape[3])
        room = new._replace(k=new.k.new_empty(shape), v=new.v.new_empty(shape))
        cache.attended[index] = room
    room.k[:, :, past:stop], room.v[:, :, past:stop] = new.k, new.v
    return new._replace(k=room.k[:, :, :stop], v=room.v[:, :, :stop])
