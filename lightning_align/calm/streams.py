"""The hidden state within what a module takes or returns: a tensor, a tuple, a dictionary, a dataclass."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

NAMES = ("hidden_states", "last_hidden_state", "hidden_state", "hidden", "x", "inputs_embeds")
"""Names of the hidden state among arguments and fields, in this order. Without one of them, the first tensor is taken."""
_ALL_STATES = ("hidden_states", "layer_hiddens", "hiddens")


def stream_of(output: Any) -> Tensor:
    """Return the hidden state in what a layer or a model returned.

    Args:
        output: A tensor, or a tuple, list, mapping or dataclass that holds one. The first tensor of a tuple or list is the
            hidden state, and for the others see `NAMES`.

    Raises:
        ValueError: If there is no tensor in it.
    """
    return output if isinstance(output, Tensor) else _parts(output)[_place(output)]


def with_stream(output: Any, hidden: Tensor) -> Any:
    """Return a copy of what `stream_of` took, of the same type, with another hidden state."""
    if isinstance(output, Tensor):
        return hidden
    place = _place(output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **{place: hidden})
    if isinstance(output, Mapping):
        return type(output)({**output, place: hidden})  # type: ignore[call-arg]  # a dictionary's constructor
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[place]: hidden})
    return type(output)((*output[:place], hidden, *output[place + 1 :]))


def stream_argument(arguments: Mapping[str, Any]) -> str:
    """Return the name of the keyword argument that is the hidden state.

    Args:
        arguments: The keyword arguments of a layer that got no positional ones.

    Raises:
        ValueError: If none of them is a tensor.
    """
    return str(_place(dict(arguments)))


def returned_states(output: Any) -> list[Tensor]:
    """Return the hidden states that a model returned, first layer to last.

    Args:
        output: A list or tuple of hidden states, or a mapping, dataclass or tuple that holds such a list. A list under
            ``hidden_states`` starts with the embeddings, as in transformers, which are not a layer.

    Returns:
        The hidden states, each (B, M, A).

    Raises:
        ValueError: If there is no list of tensors in it.
    """
    found = next(_lists(output), None)
    if found is None:
        raise ValueError(f"a {type(output).__name__} without a list of hidden states")
    return found


def _lists(output: Any) -> Iterator[list[Tensor]]:
    """Yield the lists of hidden states in an output, the most likely one first."""
    if isinstance(output, Tensor) or output is None:
        return
    named = output if isinstance(output, Mapping) else {name: getattr(output, name, None) for name in _ALL_STATES}
    for name in _ALL_STATES:
        states = named.get(name)
        if isinstance(states, Sequence) and len(states) and all(isinstance(state, Tensor) for state in states):
            yield list(states[1:] if name == "hidden_states" and len(states) > 1 else states)
    if isinstance(output, (list, tuple)):
        if output and all(isinstance(state, Tensor) and state.ndim == 3 for state in output):
            yield list(output)
        for part in output:
            yield from _lists(part)


def _parts(output: Any) -> Any:
    """Return the tensors of an output by index or name."""
    if isinstance(output, (list, tuple)):
        return dict(enumerate(output))
    if isinstance(output, Mapping):
        return dict(output)
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {}


def _place(output: Any) -> Any:
    """Return the index or name of the hidden state."""
    parts = {place: part for place, part in _parts(output).items() if isinstance(part, Tensor)}
    places = [name for name in NAMES if name in parts] or [p for p, part in parts.items() if part.is_floating_point()]
    if not places:
        raise ValueError(
            f"A layer must take and return its hidden state as a tensor, or in a tuple, dictionary or dataclass, but there is "
            f"none in a {type(output).__name__}. Name other modules with `layers`."
        )
    return places[0]
