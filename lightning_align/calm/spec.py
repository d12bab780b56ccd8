"""The description of a composition: the augments, how each is connected, and what it reads."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self, final

from torch import Tensor, nn

from lightning_align.calm.connections import check_pairs, even_pairs
from lightning_align.calm.layers import LayerChoice, Position
from lightning_align.models.building import Backbone
from lightning_align.runtime.plain import plain

LAYERS_PER_CONNECTION = 4
"""The paper's N_A / n, the number of augment layers per connection in all its experiments."""


# Not a dataclass: OmegaConf makes configurations of dataclasses in a list, and knows no modules.
@final
class Augment:
    """An augmenting model and how it is connected. Set at most one of `connections`, `num_connections` and `every`.

    Args:
        model: The model. In code, a module or a factory. In YAML, `class_path` and `init_args`, or the path of a checkpoint.
        connections: Pairs [layer of this model, layer of the anchor], counted from 1. In code, also modules.
        num_connections: The number of connections, evenly spaced over both models, including their last layers.
        every: The number of layers of this model per connection. The connections are evenly spaced over both models. Default is
            4, or a single connection if the model has fewer than 4 layers.
        position: Whether to read a layer's input or its output, or a list with one of them per connection.
        layers: The names of the model's layers, such as `transformer.h.*`, or a list of names. In code, also a list of modules,
            or a function of the model that returns one. By default they are found automatically.
        alignment: With `aligned`, both models read the same text. With `prefix`, this model reads a separate input once, and
            every position of the anchor sees all of it.
        tokens: With `shared`, the model reads the anchor's token ids. With `own`, it has its own tokenizer and reads the text
            of these ids. By default, it reads the anchor's token ids, and both vocabularies must have the same size. Set
            `shared` to allow different sizes.
        dim: The width of the model's hidden states. A model that does not read tokens needs this or `input_shape`.
        input_shape: The shape of one input of a model that does not read tokens, without the batch, such as [3, 32, 32].
        anchor_position: Whether to add to an anchor layer's input or to its output, or a list with one of them per connection.
            Default is the setting of the composition.
        mask_kwarg: The name of the argument with which the model takes the mask of its input, true at real positions. The
            argument `key_padding_mask` of torch is true at pads. By default `attention_mask` or `mask`, if the model has it.
        return_hiddens: Whether to read the hidden states that the model returns: a list of them, or `hidden_states` of what it
            returns, as in transformers. Its layers need not be found then.
    """

    settings: ClassVar[tuple[str, ...]] = (
        "connections",
        "num_connections",
        "every",
        "position",
        "layers",
        "alignment",
        "tokens",
        "dim",
        "input_shape",
        "anchor_position",
        "mask_kwarg",
        "return_hiddens",
    )
    """The names of all arguments but the model."""

    def __init__(
        self,
        model: str | Backbone,
        connections: Sequence[Sequence[Any]] | None = None,
        num_connections: int | None = None,
        every: int | None = None,
        position: Position | list[Position] = "output",
        layers: LayerChoice | None = None,
        alignment: Literal["aligned", "prefix"] = "aligned",
        tokens: Literal["shared", "own"] | None = None,
        dim: int | None = None,
        input_shape: list[int] | None = None,
        anchor_position: Position | list[Position] | None = None,
        mask_kwarg: str | None = None,
        return_hiddens: bool = False,
    ) -> None:
        """Keep the arguments."""
        self.model, self.connections, self.num_connections, self.every = model, connections, num_connections, every
        self.position, self.layers, self.alignment, self.tokens = position, layers, alignment, tokens
        self.dim, self.input_shape, self.anchor_position = dim, input_shape, anchor_position
        self.mask_kwarg, self.return_hiddens = mask_kwarg, return_hiddens

    def __repr__(self) -> str:
        """Name the kind of the model and the settings that are not the defaults."""
        default = Augment("")
        changed = {name: getattr(self, name) for name in self.settings if getattr(self, name) != getattr(default, name)}
        model = self.model if isinstance(self.model, (str, Mapping)) else type(self.model).__name__
        return f"Augment({model}{''.join(f', {name}={value!r}' for name, value in changed.items())})"

    def with_changes(self, **changes: Any) -> Self:
        """Return a copy with other arguments."""
        return type(self)(**{"model": self.model, **{name: getattr(self, name) for name in self.settings}, **changes})


class AugmentInput(NamedTuple):
    """The input of an augment that does not simply read the anchor's tokens."""

    tokens: Tensor
    """(B, M) token ids, or whatever the model takes as its first argument."""
    mask: Tensor | None = None
    """(B, M) bool, true at real tokens. None if all are real."""
    ends: Tensor | None = None
    """(B, M) int64, the number of characters up to and including each token, for an augment with its own tokenizer."""
    anchor_ends: Tensor | None = None
    """(B, N) int64, the same number for each token of the anchor."""
    states: Sequence[Tensor] | None = None
    """Precomputed hidden states (B, M, A) of the layers that are read, first to last. None to compute them."""
    columns: Tensor | None = None
    """(B, M) int64, the first column of the anchor that may see each token, for an augment with its own tokenizer. By default,
    a token is visible from the first column whose ``anchor_ends`` is not before its ``ends``."""


Inputs = Sequence[AugmentInput | None]
"""The input of each augment. None for an augment that reads the anchor's tokens."""


class Spot(NamedTuple):
    """The two layers that a connection connects."""

    augment: int
    """Index of the augment, from 0."""
    augment_layer: int
    """Layer of the augment, from 1."""
    anchor_layer: int
    """Layer of the anchor, from 1."""

    @property
    def name(self) -> str:
        """The name of the connection in logs."""
        return f"augment{self.augment}_layer{self.augment_layer}_to_layer{self.anchor_layer}"


def check_realigned(index: int, *, prefix: bool, own: bool) -> None:
    """Check that an augment may get text that was encoded again with another tokenizer.

    Args:
        index: The index of the augment.
        prefix: Whether the augment reads a prefix.
        own: Whether the augment has its own tokenizer.

    Raises:
        ValueError: If the augment reads the anchor's ids, or a prefix. A prefix must not include the response.
    """
    if prefix:
        raise ValueError(
            f"augment_tokenizers[{index}] must be null, because augment {index} reads a prefix and the tokenizer would encode "
            "whole rows with their responses. With null, the augment reads the prompt in the anchor's ids. To give it another "
            "prefix, put an AugmentInput without `ends` into the batches."
        )
    if not own:
        raise ValueError(
            f"augment_tokenizers[{index}] must be null, because augment {index} reads the anchor's token ids. Set "
            "`tokens: own` if the augment has its own tokenizer. Use null if both models share a tokenizer."
        )


def storable(choice: Any, model: Any) -> Any:
    """Return layers or connections as a checkpoint can hold them: with names in place of modules, and no functions.

    Args:
        choice: What the user gave as layers or connections.
        model: The model, or what it is built from. Without a module, there are no names.
    """
    if isinstance(choice, nn.Module) and not isinstance(choice, (nn.ModuleList, nn.Sequential)):
        modules = model.named_modules() if isinstance(model, nn.Module) else ()
        return next((name for name, module in modules if module is choice), None)
    if choice is None or isinstance(choice, (str, int)):
        return choice
    if isinstance(choice, (Sequence, nn.ModuleList, nn.Sequential)):
        return [storable(part, model) for part in choice]
    return f"{choice.__module__}.{choice.__qualname__}"  # no layer has this name, so that a checkpoint needs the function again


def described_augment(spec: Augment) -> dict[str, Any]:
    """Return the settings of an augment, without its model, as a checkpoint can hold them."""
    settings = {name: getattr(spec, name) for name in spec.settings}
    return {**settings, **{name: storable(settings[name], spec.model) for name in ("layers", "connections")}}


def described_model(source: Any) -> Any:
    """Return what a checkpoint can store about the source of a model: a path or a description, else None."""
    if isinstance(source, nn.Module):
        return None
    source = plain(source)
    return source if isinstance(source, (str, dict)) else None


def augment_model(spec: Augment) -> nn.Module:
    """Return the module of an augment.

    Raises:
        ValueError: If the model is a path, a factory or a description, and not an ``nn.Module``.
    """
    if not isinstance(spec.model, nn.Module):
        raise ValueError(
            f"CALM: the `model` of an augment must be an nn.Module, but got a {type(spec.model).__name__}. Build it first, or "
            "use CALMModule, which builds it."
        )
    return spec.model


def pairs_of(spec: Augment, num_augment: int, num_anchor: int, what: str) -> list[tuple[int, int]]:
    """Determine the pairs of layers that the connections of an augment connect.

    Args:
        spec: The augment and how it is connected.
        num_augment: The number of layers of the augment.
        num_anchor: The number of layers of the anchor.
        what: The name of the augment in errors.

    Returns:
        Pairs (augment layer, anchor layer), counted from 1.

    Raises:
        ValueError: If a layer does not exist, or more than one of the options is set.
    """
    ways = {"connections": spec.connections, "num_connections": spec.num_connections, "every": spec.every}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{what}: only one of {' and '.join(given)} can be set, but all of them are. Remove all but one.")
    try:
        if spec.connections is not None:
            return check_pairs(spec.connections, num_augment, num_anchor)
        if spec.num_connections is not None:
            return even_pairs(num_augment, num_anchor, spec.num_connections)
        if spec.every is not None and not 1 <= spec.every <= num_augment:
            raise ValueError(
                f"`every` must be between 1 and {num_augment}, the number of layers of the augment, but got {spec.every}."
            )
        return even_pairs(num_augment, num_anchor, max(1, num_augment // (spec.every or LAYERS_PER_CONNECTION)))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
