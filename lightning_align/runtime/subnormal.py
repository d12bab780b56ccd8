"""Subnormal float32 numbers, which are slow to compute with on many CPUs."""

import numpy as np
import torch


def flush_subnormal() -> None:
    """Replace subnormal results by 0 in this thread and in those that it starts.

    Moments of optimizers decay to subnormal numbers where gradients are 0, such as those of the embeddings of rare tokens. The
    setting is one of a thread, and a new thread inherits it. It must therefore be made before torch starts its threads, which
    the first operation on a large tensor does. CPUs that cannot do this compute as before.
    """
    # numpy's limits of floats are computed once, and some versions warn if subnormal numbers are 0 then.
    np.finfo(np.float32), np.finfo(np.float64)
    torch.set_flush_denormal(True)
