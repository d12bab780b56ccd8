"""Random numbers that depend only on a key and a position, not on the rest of the batch."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms(keys: Sequence[tuple[int, ...]], *, positions: int, draws: int) -> Tensor:
    """Compute uniform numbers in [0, 1), with one stream per key.

    Each stream comes from the counter-based generator Philox (Salmon et al. 2011), keyed by a hash of the key. The number at
    a position is the same for any batch, order, number of ranks and number of positions.

    Args:
        keys: The key of each row, such as (seed, iteration, prompt, sample).
        positions: N, the number of tokens.
        draws: A, the number of draws per token.

    Returns:
        The numbers, (B, N, A) float32, below 1.
    """
    table = np.empty((len(keys), positions, draws))
    for row, key in zip(table, keys, strict=True):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
        stream = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))
        stream.random(out=row)
    # Rounding to float32 may give 1, so the numbers are clamped.
    return torch.from_numpy(table).float().clamp_(max=1 - 2**-24)
