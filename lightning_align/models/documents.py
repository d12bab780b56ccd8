"""Several documents in one row: their positions and masks, and a check that a model keeps them apart.

A packed row holds several documents. (B, N) int64 numbers say which document each token belongs to. They ascend, and are -1 at
padding. A model that takes them as the argument ``documents`` computes each document as if it were a row of its own: attention
stays within the document and positions start again with it.
"""

import inspect
from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_align.models.language_model import context_length, has_hidden, logits_of, vocabulary_size
from lightning_align.models.parallelize import uncompiled
from lightning_align.runtime.modes import evaluating

TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-2
"""The largest difference of outputs that counts as equal, in standard deviations, in float32 and in 16 bits.

Trained models amplify rounding: on some processors, the hidden states of a token of a pretrained model are off by 5e-4 when its
row is computed alone. The same models depend more on their context. So the first is multiplied by the difference that mixing
the rows makes, where this is above 1: about 17 for that model, of which a single position that is off by 1 changes 0.2 to 1.3.
"""
_PROBED = ((7, 12), (5, 1, 9))
"""The lengths of the documents of each row that the check packs."""
_SHARED = ((12, 0), (19, 7), (14, 10), (9, 0), (11, 7))
"""The length of each row of the check of common beginnings, and the length of its beginning that it shares with the first."""
_problems: "WeakKeyDictionary[nn.Module, str | None]" = WeakKeyDictionary()


def document_positions(documents: Tensor) -> Tensor:
    """Count the positions of each document from 0.

    Args:
        documents: (B, N) int64 numbers of documents, -1 at padding.

    Returns:
        (B, N) int64 positions, 0 at padding.
    """
    columns = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    new = documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0
    return (columns - columns.where(new, 0).cummax(dim=1).values).where(documents >= 0, 0)


def document_mask(documents: Tensor) -> Tensor:
    """Return which tokens are in the same document: (B, N) -> (B, N, N) bool. Padding is in none."""
    return (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, :, None]


def check_packing(model: nn.Module) -> None:
    """Check once per model that it keeps documents apart.

    Args:
        model: Any language model.

    Raises:
        ValueError: If it does not.
    """
    if model not in _problems:
        _problems[model] = packing_problem(model)
    if (problem := _problems[model]) is not None:
        raise ValueError(
            f"`packing` must be false for {_name(model)}, but got true: {problem}. Set `packing: false`. Rows of similar "
            "length are then padded together, which gives the same loss."
        )


def packing_problem(model: nn.Module) -> str | None:
    """Compare a few packed documents with each of them alone.

    The check needs a few small forward passes. It finds recurrent states, and attention and positions that ignore where a
    document starts.

    Args:
        model: Any language model. Its mode and the state of the random numbers do not change.

    Returns:
        Why its outputs for packed documents are wrong, or None if they are right.
    """
    if "documents" not in inspect.signature(model.forward).parameters:
        return "its forward pass has no argument `documents`"
    return probe_documents(model, partial(_outputs, model))


@torch.no_grad()
def probe_documents(model: nn.Module, run: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    """Compare a few packed documents with each of them alone. See `packing_problem`.

    Args:
        model: Any language model.
        run: What computes the outputs (B, N, D) or (B N, D) of tokens and documents, (B, N) each.
    """
    if (fault := _too_short(model, max(map(max, _PROBED)))) is not None:
        return fault
    width = max(sum(lengths) for lengths in _PROBED) + 2  # the last columns are padding
    tokens = _spread_tokens(model, len(_PROBED), width)
    documents = torch.full_like(tokens, -1)
    alone, mixed = [], []
    with evaluating(model), uncompiled(model):
        number = 0
        for row, lengths in enumerate(_PROBED):
            start = 0
            for length in lengths:
                documents[row, start : start + length] = number
                alone.append(_outputs(model, tokens[row : row + 1, start : start + length]))
                number, start = number + 1, start + length
            mixed.append(_mixed(model, tokens[row : row + 1, :start], max(lengths)))
        error = _difference(model, lambda: run(tokens, documents).flatten(0, -2)[documents.flatten() >= 0], alone, mixed)
    if error is None or isinstance(error, str):
        return error
    return (
        f"its outputs for a row change by {error:.1e} standard deviations if other rows come before it in the same sequence, "
        "as with recurrent layers, or if positions do not start again"
    )


@torch.no_grad()
def probe_rows(model: nn.Module, run: Callable[[Tensor, list[int]], Tensor]) -> str | None:
    """Compare a few rows whose beginnings are computed together with each of them alone.

    Args:
        model: Any language model. Its mode and the state of the random numbers do not change.
        run: What computes the outputs (B, N, D) of tokens (B, N) and the lengths of rows.

    Returns:
        Why the outputs are wrong, or None if they are right.
    """
    lengths = [length for length, _ in _SHARED]
    if (fault := _too_short(model, max(lengths))) is not None:
        return fault
    tokens = _spread_tokens(model, len(lengths), max(lengths))
    for row, (_, shared) in enumerate(_SHARED):
        tokens[row, :shared] = tokens[0, :shared]
    with evaluating(model), uncompiled(model):
        alone = [_outputs(model, tokens[row : row + 1, :length]) for row, length in enumerate(lengths)]
        sequence = torch.cat([tokens[row, :length] for row, length in enumerate(lengths)])[None]
        mixed = [_mixed(model, sequence, max(lengths))]
        real = torch.arange(max(lengths), device=tokens.device) < torch.tensor(lengths, device=tokens.device)[:, None]
        error = _difference(model, lambda: run(tokens, lengths)[real], alone, mixed)
    if error is None or isinstance(error, str):
        return error
    return f"its outputs for an answer change by {error:.1e} standard deviations if another answer is computed beside it"


def _spread_tokens(model: nn.Module, rows: int, width: int) -> Tensor:
    """Return (rows, width) ids that look random, without drawing any."""
    device = next(model.parameters()).device
    ids = (torch.arange(rows * width, device=device) * 7919 + 13) % 104729 % (vocabulary_size(model) or 2)
    return ids.view(rows, width)


def _difference(model: nn.Module, run: Callable[[], Tensor], alone: list[Tensor], mixed: list[Tensor]) -> float | str | None:
    """Compare outputs (T, D) with those of rows alone: the difference, an error's message, or None if they are equal.

    Args:
        model: The model.
        run: What computes the outputs.
        alone: The outputs of each row alone.
        mixed: The outputs of a model that does not keep rows apart at all.
    """
    try:
        found = run()
        found = found.to(torch.promote_types(found.dtype, torch.float32))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError) as raised:
        return f"it raises {type(raised).__name__}: {str(raised)[:200]}"
    expected = torch.cat(alone)
    scale = float(expected.std().clamp(min=1e-6))
    error = float((found - expected).abs().max()) / scale
    apart = float((torch.cat(mixed) - expected).abs().max()) / scale
    # In 16 bits the difference of mixed rows can be as small as the tolerance.
    equal = error <= TOLERANCE * max(1, apart) or (_is_half(model) and error <= min(HALF_TOLERANCE, apart / 4))
    return None if equal else error


def _too_short(model: nn.Module, length: int) -> str | None:
    """Return why a model cannot be checked with rows of a length, if it reads fewer tokens."""
    context = context_length(model)
    return None if context is None or context >= length else f"its context of {context} tokens is too short to compare rows"


def _mixed(model: nn.Module, tokens: Tensor, width: int) -> Tensor:
    """Compute the (N, D) outputs of tokens (1, N) of several rows, in parts of `width` tokens that mix them.

    All of them can be more than a model reads. Parts as long as one row are not.
    """
    return torch.cat([_outputs(model, part) for part in tokens.split(width, dim=1)])


def _outputs(model: nn.Module, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """Compute the (B * N, D) hidden states or logits in at least float32."""
    if has_hidden(model):
        out = model.hidden(tokens) if documents is None else model.hidden(tokens, documents=documents)
    else:
        out = logits_of(model, tokens, documents=documents)
    return out.flatten(0, 1).to(torch.promote_types(out.dtype, torch.float32))


def _is_half(model: nn.Module) -> bool:
    """Return whether a model computes in 16 bits."""
    parameter = next(model.parameters())
    return parameter.dtype.itemsize < 4 or torch.is_autocast_enabled(parameter.device.type)


def _name(model: nn.Module) -> str:
    inner = getattr(model, "model", None)
    return f"{type(model).__name__}({type(inner).__name__})" if isinstance(inner, nn.Module) else type(model).__name__
