"""From the description of an augment to its reader: layers, connections and widths."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.calm.layers import Layer, Position, find_layers
from lightning_align.calm.probe import check_values, probe_width
from lightning_align.calm.reading import Reader, mask_argument
from lightning_align.calm.spec import Augment, pairs_of
from lightning_align.calm.streams import returned_states
from lightning_align.models.language_model import has_hidden
from lightning_align.models.unpadded import Unpadded


class OutputReader(Reader):
    """A reader of the hidden states that the model itself returns. The whole model runs, and no hooks are needed."""

    def __init__(self, model: nn.Module, depths: Sequence[int], *, prefix: bool, own: bool, mask_kwarg: str | None) -> None:
        super().__init__(model, (), {}, prefix=prefix, own=own, mask_kwarg=mask_kwarg)
        self.places = dict.fromkeys(depths, "output")
        self.depths = list(depths)
        self.has_cache = False

    @property
    def site(self) -> str:
        """See `Reader`."""
        return f"{self.depths} returned"

    def read(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Any,
        *,
        unpadded: Unpadded | None = None,
    ) -> dict[int, Tensor]:
        """Run the model and return the hidden states (B, M, A) of the layers that are read. See `Reader.read`."""
        assert unpadded is None, "without taps"
        states = run_returning(self.model, tokens, self.input_mask(tokens, mask), self.mask_kwarg)
        return {depth: states[depth - 1] for depth in self.depths}


@torch.no_grad()
def run_returning(model: nn.Module, tokens: Tensor, mask: Tensor | None, mask_kwarg: str | None) -> list[Tensor]:
    """Run a model and return the hidden states (B, M, A) that it returns, first layer to last."""
    options: dict[str, Any] = dict(mask_argument(model, mask, mask_kwarg))
    accepted = inspect.signature(model.forward).parameters
    # The models of transformers take it in their `kwargs`.
    if "output_hidden_states" in accepted or (hasattr(model, "config") and "kwargs" in accepted):
        options["output_hidden_states"] = True
    return [state.detach() for state in returned_states(model(tokens, **options))]


def build_reader(
    spec: Augment, model: nn.Module, anchor_layers: Sequence[Layer], what: str, *, check: bool
) -> tuple[Reader, list[tuple[int, int]], list[int]]:
    """Build the reader of an augment.

    Args:
        spec: The augment and how it is connected.
        model: The model of the augment, in evaluation mode.
        anchor_layers: The layers of the anchor.
        what: The name of the augment in errors.
        check: Whether to check the values of hidden states on a few tokens.

    Returns:
        The reader, the pairs (augment layer, anchor layer) of its connections, and the width A of the hidden state that each
        connection reads.

    Raises:
        ValueError: If the layers, connections or hidden states do not fit.
    """
    prefix, own = spec.alignment == "prefix", spec.tokens == "own"
    _check_mask_name(model, spec.mask_kwarg, what)
    returned = _probe_returned(spec, model, what, causal=not prefix, check=check) if spec.return_hiddens else None
    layers = [] if returned is not None else find_layers(model, spec.layers)
    if spec.connections is not None:
        listed = [_numbered(pair, layers, anchor_layers, what) for pair in spec.connections]
        spec = spec.with_changes(connections=listed)
    pairs = pairs_of(spec, len(returned or layers), len(anchor_layers), what)
    if returned is not None:
        depths = sorted({depth for depth, _ in pairs})
        reader: Reader = OutputReader(model, depths, prefix=prefix, own=own, mask_kwarg=spec.mask_kwarg)
        return reader, pairs, [returned[depth - 1].shape[-1] for depth, _ in pairs]
    places = _places(spec, pairs, what)
    width = spec.dim
    if width is None and spec.input_shape is None:
        width = probe_width(model, layers, what=what, causal=not prefix, check=check)
    reader = Reader(model, layers, places, prefix=prefix, own=own, mask_kwarg=spec.mask_kwarg)
    if spec.layers is not None:
        names = {module: name for name, module in model.named_modules()}
        reader.named = [names[layers[depth - 1].site(at).module] for depth, at in reader.places.items()]
    if width is not None:
        return reader, pairs, [width] * len(pairs)
    try:
        states = reader.read(_example(model, spec.input_shape or []), None, None, None)
        _check_states(list(states.values()), f"{what} ({type(model).__name__})", check=check)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        for tap in reader.taps.values():
            tap.remove()
        message = str(error) if isinstance(error, ValueError) else _cannot_run(model, spec, what, error)
        raise ValueError(message) from error
    return reader, pairs, [states[depth].shape[-1] for depth, _ in pairs]


def anchor_places(spec: Augment, pairs: Sequence[tuple[int, int]], default: Position, what: str) -> list[tuple[int, Position]]:
    """Return the anchor layer of each connection of an augment, and whether to add to its input or to its output."""
    given = default if spec.anchor_position is None else spec.anchor_position
    return list(zip([anchor for _, anchor in pairs], positions_of(given, len(pairs), what, "anchor_position"), strict=True))


def positions_of(given: Position | Sequence[Position], count: int, what: str, name: str) -> list[Position]:
    """Return the position of each connection.

    Args:
        given: One for all, or one per connection.
        count: The number of connections.
        what: The name of the augment in errors.
        name: The name of the setting in errors.

    Raises:
        ValueError: If a position is neither `input` nor `output`, or their number is wrong.
    """
    listed: list[Position] = [given] * count if isinstance(given, str) else list(given)
    if len(listed) != count or not all(at in ("input", "output") for at in listed):
        raise ValueError(
            f"{what}: `{name}` must be 'input' or 'output', or a list with one of them per connection, {count} in all, "
            f"but got {given!r}."
        )
    return listed


def _places(spec: Augment, pairs: Sequence[tuple[int, int]], what: str) -> dict[int, Position]:
    """Return the layers of the augment that are read, and where."""
    places: dict[int, Position] = {}
    for (depth, _), at in zip(pairs, positions_of(spec.position, len(pairs), what, "position"), strict=True):
        if places.setdefault(depth, at) != at:
            raise ValueError(
                f"{what}: `position` must be the same for all connections of one layer, but layer {depth} is read at its input "
                "and at its output. Read the output of the layer before it instead of its input."
            )
    return places


def _numbered(pair: Sequence[Any], layers: Sequence[Layer], anchor_layers: Sequence[Layer], what: str) -> list[Any]:
    """Replace the modules in a pair by the numbers of their layers, counted from 1."""
    numbers = []
    for entry, found in zip(pair, (layers, anchor_layers), strict=False):
        if isinstance(entry, nn.Module):
            number = next((n for n, layer in enumerate(found, 1) if entry is layer.after.module or entry in layer.parts), None)
            if number is None:
                raise ValueError(
                    f"{what}: `connections` contains a {type(entry).__name__} that is not one of the layers. List such modules "
                    f"in `{'layers' if found is layers else 'anchor_layers'}`."
                )
            entry = number
        numbers.append(entry)
    return [*numbers, *pair[2:]]


def _check_mask_name(model: nn.Module, name: str | None, what: str) -> None:
    if name is None:
        return
    accepted = inspect.signature(model.forward).parameters
    if has_hidden(model) or not (name in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())):
        raise ValueError(
            f"{what}: `mask_kwarg` must be an argument of the forward method of the {type(model).__name__}, but got {name!r}. "
            + ("Leave it out: the model has the method `hidden`, which takes `mask`." if has_hidden(model) else "")
        )


def _example(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Return an input (1, *shape) for a first run."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return torch.linspace(-1, 1, math.prod(shape), dtype=weight.dtype, device=weight.device).view(1, *shape)


def _probe_returned(spec: Augment, model: nn.Module, what: str, *, causal: bool, check: bool) -> list[Tensor]:
    """Run a model once and return the hidden states that it returns."""
    name = f"{what} ({type(model).__name__})"
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tokens = torch.tensor([[0, 0, 0], [0, 0, 1]], device=device)
    example = tokens if spec.input_shape is None else _example(model, spec.input_shape)
    if spec.position != "output" or spec.layers is not None:
        raise ValueError(f"{what}: `position` and `layers` cannot be set with `return_hiddens`. Remove them.")
    try:
        states = run_returning(model, example, None, spec.mask_kwarg)
    except ValueError as error:
        raise ValueError(f"{name} must return its hidden states for `return_hiddens`, but returned {error}.") from error
    except (TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ValueError(_cannot_run(model, spec, what, error)) from error
    _check_states(states, name, check=check and spec.input_shape is not None)
    if check and spec.input_shape is None and not tokens.is_meta:
        check_values(states, name, causal=causal)
    return states


def _check_states(states: Sequence[Tensor], name: str, *, check: bool) -> None:
    wrong = next((state for state in states if state.ndim != 3), None)
    if wrong is not None:
        raise ValueError(
            f"{name} must have hidden states of shape (rows, positions, width), but got {tuple(wrong.shape)}. Name other "
            "modules with `layers`."
        )
    if check and not states[0].is_meta:
        check_values(states, name, causal=False)


def _cannot_run(model: nn.Module, spec: Augment, what: str, error: Exception) -> str:
    kind = "token ids" if spec.input_shape is None else f"an input of shape {(1, *spec.input_shape)}"
    remedy = "Set `input_shape` to the shape of one of its inputs, without the batch."
    return f"{what} ({type(model).__name__}) cannot be run on {kind}: {error}. {remedy}"
