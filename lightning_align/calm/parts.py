"""The models of a composition: building them from descriptions, and describing them for checkpoints and folders."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.calm.spec import Augment, AugmentInput, Spot, storable
from lightning_align.models.building import backbone_spec, build_backbone
from lightning_align.models.checkpoint import load_policy
from lightning_align.models.language_model import vocabulary_size
from lightning_align.models.pretrained import PretrainedLM

SOURCE = "loaded_from"
"""The attribute of a model that holds the path which it was loaded from."""


def build_part(source: Any) -> nn.Module:
    """Build an anchor or the model of an augment.

    Args:
        source: A module, which is returned as it is, the path of a checkpoint or folder, a factory, or a description with
            `class_path` and `init_args`.
    """
    if not isinstance(source, (str, Path)):
        built = build_backbone(source)
        if isinstance(built, PretrainedLM) and not built.is_loaded:
            # What refers to it by a name has no weights to replace the random ones.
            raise ValueError(f"The model {built.init_args['name']!r} was not found. Pass the path or name that it has now.")
        return built
    model = load_policy(source)
    setattr(model, SOURCE, str(source))
    return model


def build_augments(augments: Any) -> list[Augment]:
    """Return what a composition gets as `augments`, as a list of `Augment` with modules."""
    given = [augments] if isinstance(augments, (Augment, nn.Module, str, Mapping)) or callable(augments) else list(augments)
    specs = [Augment(**a) if isinstance(a, Mapping) and "model" in a else a for a in given]
    specs = [spec if isinstance(spec, Augment) else Augment(spec) for spec in specs]
    return [spec.with_changes(model=build_part(spec.model)) for spec in specs]


def reference_of(model: nn.Module) -> Any:
    """Return the path or the description with which a model and its weights are found again, or None."""
    if (source := getattr(model, SOURCE, None)) is not None:
        return source
    if isinstance(model, PretrainedLM) and model.init_args["name"] is not None and model.init_args["adapter"] is None:
        return backbone_spec(model)
    return None


def described_part(model: nn.Module) -> Any:
    """Return what builds a model: its `reference_of`, or else a description without its weights. None if there is none."""
    return reference_of(model) or backbone_spec(model)


def source_names(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the paths and names of the models that were loaded from files, for messages."""
    found = {name: reference_of(model) for name, model in models.items()}
    return {
        name: str(source["init_args"]["name"] if isinstance(source, Mapping) else source)
        for name, source in found.items()
        if source is not None
    }


def described_augment(spec: Augment, spots: Sequence[Spot], index: int) -> dict[str, Any]:
    """Describe how an augment is connected, in JSON types. The connections are listed, whatever rule they came from.

    Args:
        spec: The augment.
        spots: The layers that each connection connects.
        index: The index of the augment.
    """
    described = {name: getattr(spec, name) for name in spec.settings}
    pairs = [[spot.augment_layer, spot.anchor_layer] for spot in spots if spot.augment == index]
    described |= {"connections": pairs, "num_connections": None, "every": None}
    return {**described, "layers": layer_names(spec.layers, spec.model)}


def layer_names(choice: Any, model: Any) -> Any:
    """Return a choice of layers with the names of modules in place of the modules.

    Args:
        choice: None, a name, a list of names or modules, or a function from the model to such a list.
        model: The model.
    """
    return storable(choice(model) if callable(choice) and not isinstance(choice, nn.Module) else choice, model)


def described_composition(
    anchor: nn.Module, specs: Sequence[Augment], spots: Sequence[Spot], arguments: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Describe a composition for a checkpoint: the arguments that build it. None if a model or an argument cannot be described.

    Args:
        anchor: The anchor.
        specs: The augments, with modules.
        spots: The layers that each connection connects.
        arguments: The other arguments.
    """
    models = [described_part(anchor), *(described_part(spec.model) for spec in specs)]  # type: ignore[arg-type]  # modules
    if any(model is None for model in models):
        return None
    augments = [
        {"model": model, **described_augment(spec, spots, index)}
        for index, (spec, model) in enumerate(zip(specs, models[1:], strict=True))
    ]
    described = {"anchor": models[0], "augments": augments, **described_arguments(arguments, anchor)}
    try:
        content: dict[str, Any] = json.loads(json.dumps(described))
    except TypeError:  # a checkpoint holds only primitives
        return None
    return content


def described_arguments(arguments: Mapping[str, Any], anchor: nn.Module) -> dict[str, Any]:
    """Describe the arguments of a composition besides its models."""
    connection = arguments.get("connection")
    return {
        **arguments,
        "connection": dataclasses.asdict(connection) if dataclasses.is_dataclass(connection) else connection,  # type: ignore[arg-type]
        "anchor_layers": layer_names(arguments.get("anchor_layers"), anchor),
    }


# -- the inputs of the proof


def readable_tokens(anchor: nn.Module, specs: Sequence[Augment]) -> int:
    """Return the number of token ids that the anchor and all augments that read its tokens have."""
    shared = [spec.model for spec in specs if spec.alignment == "aligned" and spec.tokens != "own"]
    sizes = [vocabulary_size(model) for model in (anchor, *shared)]  # type: ignore[arg-type]  # modules
    return min((size for size in sizes if size is not None), default=2)


def proof_inputs(readers: Sequence[Any], tokens: Tensor, widths: Sequence[list[int]]) -> list[Any]:
    """Return an input of each augment for a fixed batch of the anchor, which only the batch and the models determine.

    Args:
        readers: The reader of each augment.
        tokens: (B, N) token ids of the anchor.
        widths: The width of each hidden state that is read, for each augment.
    """
    inputs: list[Any] = []
    ends = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).expand_as(tokens)
    for reader, wide in zip(readers, widths, strict=True):
        size = vocabulary_size(reader.model)
        if size is None and (reader.prefix or reader.own):
            # It reads something other than tokens. The hash of its weights stands for the model itself.
            states = [torch.linspace(-1, 1, 2 * width, device=tokens.device).view(1, 2, width) for width in wide]
            dtype = next((p.dtype for p in reader.model.parameters()), torch.float32)
            rows = [state.to(dtype).expand(len(tokens), -1, -1) for state in states]
            place = torch.zeros(len(tokens), 2, dtype=torch.long, device=tokens.device)
            inputs.append(AugmentInput(place, states=rows))
        elif reader.own:
            inputs.append(AugmentInput(tokens % (size or 2), ends=ends, anchor_ends=ends))
        elif reader.prefix:
            inputs.append(AugmentInput(tokens[:, :4] % (size or 2)))
        else:
            inputs.append(None)
    return inputs
