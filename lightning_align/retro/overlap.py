"""How much of a chunk could have been copied: the longest run of tokens that it shares with one of its neighbours.

Borgeaud et al. 2021, section 2.6: r(C) = s / m, with s the longest token substring that the chunk C shares with its neighbours
and their continuations, and m its length. Bits per byte over the chunks with r(C) <= alpha say what retrieval gives where it
gives no text to copy.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_align.retrieval.tables import Bools, ChunkTable, Ints, Neighbors

NUM_NEIGHBORS = 10
"""Neighbours that are looked at, as in the paper, however many the model reads."""
BLOCK = 4096


def longest_common_run(a: Ints, a_mask: Bools, b: Ints, b_mask: Bools) -> Ints:
    """Length of the longest run of tokens that two rows share.

    Args:
        a: (..., N) tokens.
        a_mask: (..., N) true at tokens that exist.
        b: (..., M) tokens.
        b_mask: (..., M) true at tokens that exist.

    Returns:
        (...).
    """
    # run[j]: tokens that agree up to a[i] and b[j]. Each token of `a` shifts all runs by one and ends those that do not agree.
    run = np.zeros(b.shape, np.int64)
    longest = np.zeros(b.shape[:-1], np.int64)
    for i in range(a.shape[-1]):
        shifted = np.concatenate((np.zeros_like(run[..., :1]), run[..., :-1]), axis=-1)
        run = np.where((a[..., i, None] == b) & a_mask[..., i, None] & b_mask, shifted + 1, 0)
        longest = np.maximum(longest, run.max(axis=-1))
    return longest


def overlaps(table: ChunkTable, neighbors: Neighbors, database: ChunkTable) -> NDArray[np.float32]:
    """r(C) of every chunk of a table.

    Args:
        table: of C chunks.
        neighbors: those of its chunks.
        database: the chunks that they are.

    Returns:
        (C,) from 0 to 1.
    """
    shares = np.zeros(len(table), np.float32)
    for start in range(0, len(table), BLOCK):
        chunks = np.arange(start, min(start + BLOCK, len(table)))
        own, own_mask = table.gather(chunks)
        found, there = neighbors.ids[chunks, :NUM_NEIGHBORS], neighbors.mask[chunks, :NUM_NEIGHBORS]
        other, other_mask = database.gather(np.where(there, found, 0), 2 * table.chunk_size)
        runs = longest_common_run(own[:, None], own_mask[:, None], other, other_mask & there[..., None])
        shares[chunks] = runs.max(axis=1, initial=0) / table.lengths(chunks)
    return shares
