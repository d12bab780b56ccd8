"""The check at the end of every export: the model that was written is the model that was trained.

Writers change names, merge adapters and drop what readers do not need, and each of these steps can lose weights without an
error. So each writer computes the logits of a fixed batch before it writes, reads its files with the class that users read them
with, and compares.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_align.models.composed import proving
from lightning_align.models.language_model import context_length, logits_of, vocabulary_size
from lightning_align.runtime.modes import evaluating

ROWS, COLUMNS = 2, 16
"""The shape of the fixed batch."""
KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys")
"""What transformers reports about the weights of a folder."""
TOLERANCE, TOLERANCE_16_BIT = 1e-3, 5e-2
"""The largest difference of logits that is rounding, in standard deviations of the logits, in float32 and in 16 bits.

Merging an adapter rounds each weight once more. Models of real size differ by 1e-5 in float32 and by 1e-2 in bfloat16.
"""


class Expected(NamedTuple):
    """What a model computes for the fixed batch."""

    tokens: Tensor
    """(2, N) int64 token ids on the CPU."""
    logits: Tensor
    """(2, N, V) float32 logits on the CPU."""
    tolerance: float
    """The largest difference that is rounding, in standard deviations of the logits."""


@contextmanager
def _exact(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients and without the shortened float32 products of a GPU."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with evaluating(model), proving(model):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def fixed_batch(model: nn.Module) -> Tensor:
    """Choose token ids from the whole vocabulary of a model: (2, N) int64, with N up to 16.

    The ids that PEFT trains alone (``trainable_token_indices``) come first, because no other id would show that they were lost.
    """
    size = getattr(model, "readable_tokens", None) or vocabulary_size(model) or 2
    columns = min(COLUMNS, context_length(model) or COLUMNS)
    trained = [index for module in model.modules() for index in _token_indices(module)][: ROWS * columns // 2]
    spread = torch.linspace(0, size - 1, ROWS * columns).long()
    spread[: len(trained)] = torch.tensor(trained, dtype=torch.int64)
    return spread.view(ROWS, columns)


def _token_indices(module: nn.Module) -> list[int]:
    found = getattr(module, "token_indices", None)  # a dictionary by adapter in PEFT's TrainableTokensLayer
    return [int(index) for indices in found.values() for index in indices] if isinstance(found, dict) else []


def expected_logits(model: nn.Module) -> Expected:
    """Compute the logits of the fixed batch. If the weights are sharded, all ranks must call this (a collective).

    Args:
        model: A language model. Its adapters stay as they are.
    """
    tokens = fixed_batch(model)
    weight = next(model.parameters())
    with _exact(model):
        logits = logits_of(model, tokens.to(weight.device))
    tolerance = TOLERANCE if logits.dtype is weight.dtype is torch.float32 else TOLERANCE_16_BIT
    return Expected(tokens, logits.float().cpu(), tolerance)


def prove(read: nn.Module, expected: Expected, folder: str | Path) -> None:
    """Compare a model that was read from a folder with the model that was written.

    Args:
        read: The model as its users read it, on the CPU.
        expected: The logits of the model that was written, from `expected_logits`.
        folder: The folder, for the message.

    Raises:
        ValueError: If the logits differ by more than rounding, or are not numbers.
    """
    with _exact(read):
        logits = _read_logits(read, expected.tokens).float()
    if logits.shape != expected.logits.shape:
        raise ValueError(
            f"The model read from {folder} must have the vocabulary of the trained model, but has {logits.shape[-1]} tokens "
            f"instead of {expected.logits.shape[-1]}. Nothing was exported."
        )
    if not expected.logits.isfinite().all():
        raise ValueError(
            f"The trained model must have finite logits, but {int((~expected.logits.isfinite()).sum())} of "
            f"{expected.logits.numel()} logits of a fixed batch are not. Nothing was exported. Export an earlier checkpoint."
        )
    difference = (logits - expected.logits).abs()
    error = float(difference.max() / expected.logits.std().clamp(min=1e-6))
    if not error <= expected.tolerance:
        row, column = divmod(int(difference.amax(-1).argmax()), difference.shape[1])
        raise ValueError(
            f"The model read from {folder} must compute what the trained model computes, but its logits differ by {error:.2g} "
            f"of their standard deviation, most at token {int(expected.tokens[row, column])} (up to {expected.tolerance:.0e} "
            "is rounding). Nothing was exported. A part of the model, such as an adapter or a layer trained beside it, cannot "
            "be written in this format."
        )


def _read_logits(read: Any, tokens: Tensor) -> Tensor:
    """Compute the logits of a model of this package or of transformers. Some of the latter fail with their default cache."""
    if hasattr(read, "generation_config"):
        logits: Tensor = read(input_ids=tokens, use_cache=False).logits
        return logits
    return logits_of(read, tokens)


def prove_embeddings(trained: nn.Module, read: nn.Module, folder: str | Path) -> None:
    """Compare the input embeddings of all tokens, which a fixed batch does not read.

    Args:
        trained: The input embedding layer of the model that was written, not sharded.
        read: The same layer of the model that was read.
        folder: The folder, for the message.

    Raises:
        ValueError: If the embedding of a token differs by more than rounding.
    """
    device = next(trained.parameters()).device
    size = next(read.parameters()).shape[0]
    with _exact(trained), _exact(read):
        for ids in torch.arange(size).split(8192):
            ours, theirs = trained(ids.to(device)).float().cpu(), read(ids).float()
            error = (ours - theirs).abs().amax(-1) / ours.std().clamp(min=1e-6)
            tolerance = TOLERANCE if next(read.parameters()).dtype is torch.float32 else TOLERANCE_16_BIT
            if float(error.max()) > tolerance:
                raise ValueError(
                    f"The model read from {folder} must have the embeddings of the trained model, but that of token "
                    f"{int(ids[int(error.argmax())])} differs by {float(error.max()):.2g} standard deviations. Nothing was "
                    "exported."
                )


def read_transformers(folder: str | Path, kind: Any, *, attention: str | None = None) -> Any:
    """Read a folder as users of transformers do.

    Args:
        folder: A folder with config.json and safetensors files.
        kind: The class of transformers that config.json names. The auto classes load it.
        attention: The attention implementation. Default is the choice of transformers.

    Raises:
        ValueError: If the folder has other weights than the class expects.
    """
    options = {"dtype": "auto", "attn_implementation": attention, "use_safetensors": True, "local_files_only": True}
    try:
        model, found = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(
            f"The model in {folder} must load with {kind.__name__}, but does not ({str(error).splitlines()[0][:200]}). "
            "Nothing was exported."
        ) from error
    wrong = {
        kind: sorted(map(str, found[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if found[kind]
    }
    if wrong:
        names = ", ".join(f"{kind.replace('_', ' ')} {', '.join(names[:3])}" for kind, names in wrong.items())
        raise ValueError(
            f"The files in {folder} must have the weights that {type(model).__name__} expects, but have {names}. Nothing was "
            "exported."
        )
    return model.eval()
