"""Random numbers that depend on what is drawn, and on nothing that happens to be computed beside it."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms(keys: Sequence[tuple[int, ...]], *, positions: int, draws: int) -> Tensor:
    """Uniform numbers in [0, 1), a stream a key.

    A stream is that of the counter-based generator Philox (Salmon et al. 2011) under a hash of its key: the number at a
    position is the same for any batch, order, number of ranks and number of positions asked for.

    Args:
        keys: one a row, such as (seed, iteration, prompt, sample).
        positions: N, numbers of tokens.
        draws: A, numbers a token.

    Returns:
        (B, N, A) float32, below 1.
    """
    table = np.empty((len(keys), positions, draws))
    for row, key in zip(table, keys, strict=True):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
        stream = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))
        stream.random(out=row)
    # Rounding to float32 may give 1.
    return torch.from_numpy(table).float().clamp_(max=1 - 2**-24)
