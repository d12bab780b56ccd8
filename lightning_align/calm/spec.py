"""What a composition is told: which models, how each is connected, and what an augment reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from lightning_align.calm.connections import check_pairs, even_pairs
from lightning_align.calm.layers import Position
from lightning_align.models.building import Backbone

LAYERS_PER_CONNECTION = 4
"""The paper's N_A / n, in all its experiments."""


@dataclass
class Augment:
    """An augmenting model and how it is connected; of `connections`, `num_connections` and `every` give one or none.

    Args:
        model: the model: a module or a factory in code, `class_path` and `init_args` or the path of a checkpoint in YAML.
        connections: pairs [layer of this model, layer of the anchor], counted from 1.
        num_connections: as many, evenly spaced over both models, their last layers included.
        every: a connection for each so many layers of this model, evenly spaced over the anchor; by default 4, or one
            connection if it has fewer layers.
        position: whether a layer's input or its output is read.
        layers: names of the model's layers, such as `transformer.h.*`; by default they are found.
        alignment: `aligned`, both models read the same text; or `prefix`, this one reads something else, once.
        tokens: whether it reads the anchor's token ids (`shared`) or has its `own` tokenizer, and is aligned by characters; by
            default shared, if the vocabularies are of one size.
        dim: width of its hidden states; needed only where it does not read tokens.
    """

    model: str | Backbone
    connections: Sequence[Sequence[int]] | None = None
    num_connections: int | None = None
    every: int | None = None
    position: Position = "output"
    layers: str | None = None
    alignment: Literal["aligned", "prefix"] = "aligned"
    tokens: Literal["shared", "own"] | None = None
    dim: int | None = None


class AugmentInput(NamedTuple):
    """What an augment reads besides, or in place of, the anchor's tokens."""

    tokens: Tensor
    """(B, M) ids, or whatever the model takes as its first argument."""
    mask: Tensor | None = None
    """(B, M) bool, true at what exists; None if all does."""
    ends: Tensor | None = None
    """(B, M) int64, the characters of the text up to and with each token; for an augment with a tokenizer of its own."""
    anchor_ends: Tensor | None = None
    """(B, N) int64, the same of the anchor's tokens."""
    states: Sequence[Tensor] | None = None
    """Hidden states (B, M, A) of the layers that are read, first to last, if they are known already."""


Inputs = Sequence[AugmentInput | None]


class Spot(NamedTuple):
    """Where a connection stands."""

    augment: int
    augment_layer: int
    anchor_layer: int

    @property
    def name(self) -> str:
        """Its name in logs."""
        return f"augment{self.augment}_layer{self.augment_layer}_to_layer{self.anchor_layer}"


def check_realigned(index: int, *, prefix: bool, own: bool) -> None:
    """Refuse a text that was encoded again for an augment that does not read it by characters.

    Args:
        index: of the augment.
        prefix: whether it reads something of its own, once.
        own: whether it has a tokenizer of its own.

    Raises:
        ValueError: if it would read other ids than these or, as a prefix, the response as well.
    """
    if prefix:
        raise ValueError(
            f"augment {index} reads a prefix, and augment_tokenizers[{index}] encodes whole rows for it, responses and all: "
            "make that null, and it reads the prompt in the anchor's ids, or put an AugmentInput without ends into the batches"
        )
    if not own:
        raise ValueError(
            f"augment {index} reads the anchor's ids, and augment_tokenizers[{index}] gives it others: set `tokens: own` if "
            "this is its own tokenizer, or make that null if both models have one"
        )


def augment_model(spec: Augment) -> nn.Module:
    """The module of an augment; a ValueError if it is none, but something to build one from."""
    if not isinstance(spec.model, nn.Module):
        raise ValueError(
            f"CALM: an augment's model is a {type(spec.model).__name__}, expected an nn.Module (CALMModule builds one)"
        )
    return spec.model


def pairs_of(spec: Augment, num_augment: int, num_anchor: int, what: str) -> list[tuple[int, int]]:
    """The connections of an augment.

    Args:
        spec: which says how it is connected.
        num_augment: its layers.
        num_anchor: the anchor's.
        what: its name in errors.

    Returns:
        (augment layer, anchor layer), counted from 1.

    Raises:
        ValueError: if there are no such layers, or it says two things.
    """
    ways = {"connections": spec.connections, "num_connections": spec.num_connections, "every": spec.every}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{what} has {' and '.join(given)}: give one of them")
    try:
        if spec.connections is not None:
            return check_pairs(spec.connections, num_augment, num_anchor)
        if spec.num_connections is not None:
            return even_pairs(num_augment, num_anchor, spec.num_connections)
        if spec.every is not None and not 1 <= spec.every <= num_augment:
            raise ValueError(f"every is {spec.every}, expected 1 to {num_augment}, the layers that it has")
        return even_pairs(num_augment, num_anchor, max(1, num_augment // (spec.every or LAYERS_PER_CONNECTION)))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
