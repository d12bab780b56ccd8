"""The overlap of a chunk with its neighbors: the share of the chunk that could be copied from one of them.

Borgeaud et al. 2021, section 2.6: r(C) = s / m. Here s is the length of the longest token substring that chunk C shares with
its neighbors and their continuations, and m is the length of the chunk. Bits per byte over the chunks with r(C) <= alpha show
the effect of retrieval where there is little text to copy.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_align.retrieval.tables import Bools, ChunkTable, Ints, Neighbors

NUM_NEIGHBORS = 10
"""The number of neighbors that the overlap considers, as in the paper. It does not depend on the number that the model uses."""
BLOCK = 4096
"""The number of chunks that are processed together."""


def longest_common_run(a: Ints, a_mask: Bools, b: Ints, b_mask: Bools) -> Ints:
    """Compute the length of the longest run of tokens that two rows share.

    Args:
        a: (..., N) token ids.
        a_mask: (..., N) true at real tokens.
        b: (..., M) token ids.
        b_mask: (..., M) true at real tokens.

    Returns:
        (...) lengths, in tokens.
    """
    # run[j] is the length of the common run that ends at a[i] and b[j]. Each step in i shifts all runs by one place, extends
    # those that match and resets the others to 0.
    run = np.zeros(b.shape, np.int64)
    longest = np.zeros(b.shape[:-1], np.int64)
    for i in range(a.shape[-1]):
        shifted = np.concatenate((np.zeros_like(run[..., :1]), run[..., :-1]), axis=-1)
        run = np.where((a[..., i, None] == b) & a_mask[..., i, None] & b_mask, shifted + 1, 0)
        longest = np.maximum(longest, run.max(axis=-1))
    return longest


def overlaps(table: ChunkTable, neighbors: Neighbors, database: ChunkTable) -> NDArray[np.float32]:
    """Compute the overlap r(C) of each chunk of a table.

    Args:
        table: The table of C chunks.
        neighbors: The neighbors of these chunks.
        database: The table that the neighbors are in.

    Returns:
        (C,) overlaps from 0 to 1.
    """
    shares = np.zeros(len(table), np.float32)
    for start in range(0, len(table), BLOCK):
        chunks = np.arange(start, min(start + BLOCK, len(table)))
        own, own_mask = table.gather(chunks)
        found, exists = neighbors.ids[chunks, :NUM_NEIGHBORS], neighbors.mask[chunks, :NUM_NEIGHBORS]
        other, other_mask = database.gather(np.where(exists, found, 0), 2 * table.chunk_size)
        runs = longest_common_run(own[:, None], own_mask[:, None], other, other_mask & exists[..., None])
        shares[chunks] = runs.max(axis=1, initial=0) / table.lengths(chunks)
    return shares
