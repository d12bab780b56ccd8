"""Checks of models before they are composed: non-finite weights, the layout of hidden states, and causality."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_align.calm.layers import Layer, Tap, visiting
from lightning_align.calm.reading import run_model


def check_finite(model: nn.Module, what: str) -> None:
    """Check that all weights of a model are finite.

    Args:
        model: The model.
        what: The name of the model in errors.

    Raises:
        ValueError: If a weight is NaN or infinite.
    """
    for name, value in model.named_parameters():
        if not value.is_meta and not bool(value.detach().isfinite().all()):
            raise ValueError(
                f"{what} ({type(model).__name__}) must have finite weights, but {name} contains NaN or infinity. "
                "Load its weights again."
            )


@torch.no_grad()
def probe_width(model: nn.Module, layers: Sequence[Layer], *, what: str, causal: bool, check: bool) -> int:
    """Run a model on two short rows, check its hidden states, and return the width of its residual stream.

    The rows have three tokens and differ only in the last token.

    Args:
        model: The model, in eval mode.
        layers: The layers of the model.
        what: The name of the model in errors.
        causal: Whether the model must be causal.
        check: Whether to check the values of the hidden states, and not only their shapes.

    Returns:
        The width of the residual stream after the last layer.

    Raises:
        ValueError: If the model does not run on token ids, its hidden states do not have rows and positions as the first two
            dimensions, they contain NaN or infinity, or a position depends on a later token although ``causal`` is true.
    """
    name = f"{what} ({type(model).__name__})"
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tokens = torch.tensor([[0, 0, 0], [0, 0, 1]], device=device)
    seen: list[Tensor] = []
    taps = [Tap(layers[0].before), *(Tap(layer.after) for layer in layers)]
    try:
        with visiting({tap: lambda hidden: seen.append(hidden.detach().clone()) for tap in taps}):
            run_model(model, tokens)
    except (TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{name} cannot be run on token ids of shape {tuple(tokens.shape)}: {error}. If it takes other inputs, set "
            "`dim` to the width of its hidden states."
        ) from error
    finally:
        for tap in taps:
            tap.remove()
    if len(seen) != len(taps):
        raise ValueError(
            f"{name} must pass each end of its layers once, but it passed {len(seen)} times at {len(taps)} ends. If the model "
            "is compiled, compose it first and compile it afterwards."
        )
    wrong = next((hidden for hidden in seen if hidden.ndim != 3 or hidden.shape[:2] != tokens.shape), None)
    if wrong is not None:
        raise ValueError(
            f"{name} must have hidden states of shape (rows, positions, width), but got {tuple(wrong.shape)} for token ids of "
            f"shape {tuple(tokens.shape)}."
        )
    if check and not tokens.is_meta:
        check_values(seen, name, causal=causal)
    return seen[-1].shape[-1]


def check_values(seen: Sequence[Tensor], name: str, *, causal: bool) -> None:
    """Check that hidden states are finite and, if ``causal``, that the last token changes only those of its own position.

    Args:
        seen: (2, M, A) hidden states of two rows that differ only in the last token, by layer.
        name: The name of the model in errors.
        causal: Whether the model must be causal.

    Raises:
        ValueError: If a hidden state is not as it should be.
    """
    for depth, hidden in enumerate(seen):
        if not bool(hidden.isfinite().all()):
            raise ValueError(
                f"{name} must have finite hidden states, but they are NaN or infinite after layer {depth}. Check its weights."
            )
        change = (hidden[0, :2] - hidden[-1, :2]).abs().max()
        # The same sums in another order differ by rounding errors only.
        if causal and bool(change > 64 * torch.finfo(hidden.dtype).eps * hidden.abs().max()):
            raise ValueError(
                f"{name} must be causal, but changing the last token changes hidden states of earlier positions after layer "
                f"{depth}. Use a causal model. An augment that is not causal can read a prefix (`alignment: prefix`)."
            )
