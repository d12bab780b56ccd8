"""What can be found out about models before they are composed: weights that are no numbers, layouts, leaks of the future."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.calm.layers import Layer, Tap, visiting
from lightning_align.calm.reading import run_model


def check_finite(model: nn.Module, what: str) -> None:
    """Raise a ValueError if a weight is NaN or infinite."""
    for name, value in model.named_parameters():
        if not value.is_meta and not bool(value.detach().isfinite().all()):
            raise ValueError(f"{what} ({type(model).__name__}) has a weight that is no number, in {name}: load it again")


@torch.no_grad()
def probe_width(model: nn.Module, layers: Sequence[Layer], *, what: str, causal: bool, check: bool) -> int:
    """Width of a model's residual stream, found by running two rows of three tokens that differ in the last.

    Args:
        model: in evaluation mode.
        layers: of the model.
        what: its name in errors.
        causal: whether its positions may not see later ones.
        check: whether to look at the values, and not at the shapes alone.

    Raises:
        ValueError: if it cannot be run on tokens, does not keep rows and positions in the first two dimensions, gives NaN, or
            sees the future.
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
            f"{name} cannot be run on token ids {tuple(tokens.shape)} ({error}); where it takes something else give the width "
            "of its hidden states as `dim`"
        ) from error
    finally:
        for tap in taps:
            tap.remove()
    if len(seen) != len(taps):
        raise ValueError(f"{name} passed {len(seen)} of the {len(taps)} ends of its layers: was it compiled? Compose first")
    wrong = next((hidden for hidden in seen if hidden.ndim != 3 or hidden.shape[:2] != tokens.shape), None)
    if wrong is not None:
        raise ValueError(
            f"{name} has hidden states {tuple(wrong.shape)} for token ids {tuple(tokens.shape)}; expected (rows, positions, "
            "width)"
        )
    if check and not tokens.is_meta:
        _check_values(seen, name, causal=causal)
    return seen[-1].shape[-1]


def _check_values(seen: Sequence[Tensor], name: str, *, causal: bool) -> None:
    for depth, hidden in enumerate(seen):
        if not bool(hidden.isfinite().all()):
            raise ValueError(f"{name} gives NaN or infinite hidden states after layer {depth}: its weights are damaged")
        change = (hidden[0, :2] - hidden[1, :2]).abs().max()
        # Twice the same numbers in another order of adding would differ by rounding, and by no more.
        if causal and bool(change > 64 * torch.finfo(hidden.dtype).eps * hidden.abs().max()):
            raise ValueError(
                f"{name} sees the future: another last token changes its hidden states before it, after layer {depth}. Aligned "
                "models are causal; one that is not can encode a prefix (`alignment: prefix`)"
            )


def check_frozen(here: Mapping[str, str], there: Mapping[str, Any], path: str | Path) -> None:
    """Compare the frozen models with those that connections were trained for.

    Args:
        here: hash of each model.
        there: the same, of the file.
        path: the file, for the error.

    Raises:
        ValueError: naming the models that differ.
    """
    others = [name for name, value in here.items() if there.get(name) != value]
    if others:
        raise ValueError(
            f"{path}: its connections were trained for other weights of {' and '.join(others)}: give the models that they were "
            "trained with, weights and all"
        )
