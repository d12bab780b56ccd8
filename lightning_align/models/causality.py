"""The check that a language model is causal: the logits at a position do not depend on later tokens."""

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_align.models.deferred import is_deferring
from lightning_align.models.language_model import context_length, logits_of, vocabulary_size
from lightning_align.runtime.modes import evaluating

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""The largest change of earlier logits that counts as rounding, in standard deviations of the logits. The rounding of a causal
model can change too: a mixture of experts groups the tokens of an expert in one matrix product, and long convolutions may be
computed by a Fourier transform."""
COARSE = 0.03
"""The same for dtypes with fewer bits."""
COPIED = 2**27
"""Models with fewer bits than float32 and up to this many weights are checked as a float32 copy, which takes 0.5 GB."""
WIDTH = 12
"""The number of tokens of the check."""


def _fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Keep the random number generators of the CPU and of a device as they are."""
    # MPS has a single generator, which `fork_rng` cannot address. A runtime that has not begun has none yet.
    if device.type in ("cpu", "mps") or not getattr(torch, device.type).is_initialized():
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def check_causal(model: nn.Module, *, remedy: str = "") -> None:
    """Raise if a language model reads later tokens.

    The check changes the last token of a row and compares the logits at the earlier positions, with two forward passes of 12
    tokens in evaluation mode. It does not change the model. Models whose weights are on the meta device, and models that have
    passed the check before, are not checked. Models that cannot be checked are named in the log.

    Args:
        model: A language model; see `lightning_align.models.language_model`.
        remedy: What the user can do, for the message.

    Raises:
        ValueError: If the logits at earlier positions depend on the last token.
    """
    if getattr(model, "known_causal", False) or is_deferring():
        return  # a model that has no weights yet is checked when it has them
    name, weight = type(getattr(model, "model", model)).__name__, next(model.parameters(), None)
    if any(parameter.is_meta for parameter in model.parameters()):
        rank_zero_info(
            f"{name}: Whether it is causal was not checked, because its weights are not initialized yet (meta device)."
        )
        return
    small = sum(parameter.numel() for parameter in model.parameters()) <= COPIED
    if weight is not None and weight.dtype.itemsize < 4 and small and not isinstance(weight, DTensor):
        model = copy.deepcopy(model).float()
    first, second = _rows(model, torch.device("cpu") if weight is None else weight.device)
    if first is None:
        return  # a context of one token or a vocabulary of one token shows nothing
    device = torch.device("cpu") if weight is None else weight.device
    try:
        with evaluating(model), _fork_rng(device):
            logits, changed = _logits(model, first), _logits(model, second)
            dtype = logits.dtype
            limit = TOLERANCE.get(dtype, COARSE) if weight is None else max(TOLERANCE.get(d, COARSE) for d in _dtypes(model))
            change = _distance(logits, changed)
            if change <= limit:
                return
            repeated = _distance(logits, _logits(model, first))
    except (RuntimeError, TypeError, IndexError, NotImplementedError) as error:
        summary = str(error).splitlines()[0][:200] if str(error) else ""
        rank_zero_info(f"{name}: Whether it is causal was not checked, because it failed on {WIDTH} tokens ({summary}).")
        return
    if repeated > change / 10:
        rank_zero_info(
            f"{name}: Whether it is causal was not checked, because its logits in evaluation mode differ from call to call by "
            f"{repeated:.1e} of their standard deviation."
        )
        return
    raise ValueError(
        f"The language model must be causal, but {name} is not: if the last token of a row changes, its logits at earlier "
        f"positions change by up to {change:.1e} of their standard deviation. The log-prob of a response would then depend on "
        f"the response itself. {remedy or 'Use a model with a causal attention mask.'}"
    )


def _rows(model: nn.Module, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Return two rows (1, N) that differ in the last token, or None if there are none."""
    size, context = vocabulary_size(model) or 2, context_length(model) or WIDTH
    width = min(WIDTH, context)
    # Ids over the whole vocabulary. Not the first ones, which are often special tokens.
    ids = [(index + 1) * (size - 1) // (width + 1) for index in range(width)]
    first = torch.tensor([ids], device=device)
    second = first.clone()
    second[0, -1] = size - 1 if ids[-1] != size - 1 else 0
    return (None if size < 2 or width < 2 else first), second


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


def _logits(model: Any, tokens: Tensor) -> Tensor:
    return logits_of(model, tokens)[0, :-1].double().cpu() if tokens.device.type == "mps" else logits_of(model, tokens)[0, :-1]


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, in standard deviations. NaN logits count as equal, because they show nothing."""
    one, other = one.detach().double(), other.detach().double()
    finite = one.isfinite() & other.isfinite()
    if not bool(finite.any()):
        return 0.0
    spread = one[finite].std(correction=0).clamp(min=1e-30)
    return float((one - other)[finite].abs().max() / spread)
