"""PEFT adapters in models of transformers: all kinds that PEFT injects into layers, such as DoRA. Needs the extra `hf`."""

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_align.models.integrity import read_tensors
from lightning_align.models.peft_starts import prepared_start
from lightning_align.models.ties import tie_again, untie
from lightning_align.runtime.checksums import check_sums, read_object
from lightning_align.runtime.modes import evaluating

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINED = "inference_mode"
"""The key that PEFT sets in the configuration of adapters that it saved. Without it, a configuration is for new adapters."""
PREFIX = "base_model.model."
"""The prefix of the weight names in PEFT's adapter files, before the names of the model's layers."""


def add_peft(model: Any, adapter: str | dict[str, Any]) -> dict[str, Any]:
    """Add PEFT adapters to a model of transformers. Afterwards only the adapters are trainable.

    Args:
        model: A model of transformers. It is changed in place.
        adapter: A folder that PEFT's ``save_pretrained`` wrote, or the configuration of new adapters: the arguments of the
            configuration class of PEFT, with ``peft_type`` if it is not LORA.

    Returns:
        The configuration, in a form that can be saved in a checkpoint.

    Raises:
        ValueError: If the adapters cannot be created or read, or do not fit the model.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("PretrainedLM: `adapter` needs PEFT. Install it: pip install -c constraints.txt -e '.[cpu,hf]'")
    import peft

    if isinstance(adapter, dict):
        described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **adapter}
        try:
            config = peft.get_peft_config(dict(described))
            config.inference_mode = False  # a configuration of trained adapters, as in a checkpoint, has True
            _inject(model, config, trained=bool(adapter.get(TRAINED)))
        except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            raise ValueError(
                f"PretrainedLM: `adapter` must be a configuration of PEFT, but {adapter} is not valid ({error})."
            ) from error
        return described
    folder = Path(adapter)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(
                f"adapter {adapter} must contain {file}, but does not. Pass a folder that PEFT's save_pretrained wrote "
                "(safetensors)."
            )
    check_sums(folder)
    content = read_object(folder / ADAPTER_CONFIG)
    # Not `load_adapter` of transformers, which does not load the magnitudes of DoRA.
    weights = {name.removeprefix(PREFIX): value for name, value in read_tensors(folder / ADAPTER_WEIGHTS).items()}
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        _inject(model, config, trained=True)
        found = peft.set_peft_model_state_dict(model, weights)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"adapter {adapter} does not fit {type(model).__name__} ({str(error)[:300]}). Pass the base model that the "
            "adapters were trained on."
        ) from error
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wrong := sorted({*found.unexpected_keys, *own & set(found.missing_keys)}):
        raise ValueError(
            f"adapter {adapter} is of another base model than this {type(model).__name__}. Only one of them has the weights "
            f"{', '.join(wrong[:3])}. Pass the base model that the adapters were trained on."
        )
    return content | {TRAINED: True}


def _inject(model: Any, config: Any, *, trained: bool) -> None:
    with warnings.catch_warnings(), prepared_start(model, config, trained=trained):
        # Merging gives a tied layer with an adapter its own weight (see `unload_peft`).
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        model.add_adapter(config)


@contextmanager
def stirred(model: nn.Module) -> Iterator[None]:
    """Add noise to the parameters that train within a ``with`` block.

    Most adapters begin with zeros, so that checks of what they compute would see nothing. Layers that are trained whole have no
    zeros and are left as they are.
    """
    generator = torch.Generator().manual_seed(0)
    kept: list[tuple[Tensor, Tensor]] = []
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.numel() <= 2**22 and not parameter.is_meta:
            kept.append((parameter.data, parameter.data.clone()))
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data += noise.to(parameter.device, parameter.dtype)
    try:
        yield
    finally:
        for value, before in kept:
            value.copy_(before)


class AdapterStart(NamedTuple):
    """How new adapters begin. A reference policy relies on both."""

    on_is_base: bool
    """Whether the model computes what the base model computes. Adapters with random values do not."""
    off_is_base: bool
    """Whether the model with its adapters off is the base model and stays it.

    It is not if the adapters moved the base weights when they were created (PiSSA, OLoRA, CorDA), or if base weights train
    beside them (`bias`).
    """


@contextmanager
def watch_start(model: Any) -> Iterator[list[AdapterStart]]:
    """Compare a model before and after adapters are added within a ``with`` block.

    Args:
        model: A model of transformers.

    Yields:
        A list, to which the result is added at the end of the block.
    """
    before, base = _logits(model), list(model.parameters())
    found: list[AdapterStart] = []
    yield found
    with _adapters_off(model):
        off = _logits(model)
    try:
        on = _logits(model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"PretrainedLM: `adapter` must be of a kind that needs only tokens, but this kind needs more ({error}). "
            "Choose another."
        ) from error
    still = not any(parameter.requires_grad for parameter in base)
    rounding = 1e-3 if base[0].dtype is torch.float32 else 3e-2
    # Without adapters, the same products give the same bits. With them, the terms that should be 0 are rounded.
    found.append(AdapterStart(_error(on, before) <= rounding, still and _error(off, before) <= 1e-6))


def _logits(model: Any) -> Tensor:
    """Compute the logits of a few tokens from the whole vocabulary: (1, N, V)."""
    weight = next(model.parameters())
    if weight.is_meta:
        return torch.zeros(1)
    with evaluating(model):
        tokens = torch.linspace(0, model.get_output_embeddings().weight.shape[0] - 1, 16, device=weight.device).long()[None]
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits.float()
        return logits


def _error(logits: Tensor, base: Tensor) -> float:
    """Return the largest difference, in standard deviations of the logits."""
    return float((logits - base).abs().max() / base.std(correction=0).clamp(min=1e-6))


def has_peft(model: nn.Module) -> bool:
    """Return whether a model of transformers has PEFT adapters."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def peft_disabled(model: nn.Module) -> Iterator[None]:
    """Switch the PEFT adapters of a `PretrainedLM` off within a ``with`` block."""
    with _adapters_off(model.model):
        yield


@contextmanager
def _adapters_off(model: Any) -> Iterator[None]:
    # Not `disable_adapters` and `enable_adapters` of transformers: the second leaves layers that are trained whole off.
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)
        for parameter in trainable:  # PEFT freezes what it switches off
            parameter.requires_grad_(True)


def unload_peft(model: Any, *, merge: bool = True) -> None:
    """Remove the PEFT adapters from a model, after merging them into the weights.

    Layers that were trained whole (``modules_to_save``) and tokens that were trained alone (``trainable_token_indices``) take
    the place of the originals. A tied layer with an adapter gets its own weight first.

    Args:
        model: A model of transformers. It is changed in place.
        merge: Whether to merge the adapters, or to restore the original layers.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    replaced: list[str] = []
    tied = merge and bool(getattr(model.config, "tie_word_embeddings", False))
    for name, layer in list(model.named_modules()):
        if any(name.startswith(f"{outer}.") for outer in replaced):
            continue
        if isinstance(layer, AuxiliaryTrainingWrapper):
            if merge:
                _untie(model, layer.original_module)
                for inner in layer.modules():
                    if isinstance(inner, BaseTunerLayer):
                        _untie(model, inner.get_base_layer())
            plain = layer.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=None)
        elif isinstance(layer, BaseTunerLayer):
            if merge:
                _untie(model, layer.get_base_layer())
                for inner in layer.modules():  # several, where the weights of one module of experts have an adapter each
                    if isinstance(inner, BaseTunerLayer):
                        _merge(inner)
            plain = layer.get_base_layer()
        else:
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
        replaced.append(name)
    model._hf_peft_config_loaded = False
    del model.peft_config
    if tied:
        tie_again(model, model.get_input_embeddings(), model.get_output_embeddings())


def check_mergeable(model: nn.Module) -> None:
    """Check that the PEFT adapters of a model can be merged into its weights, on a copy of one layer of each kind.

    Raises:
        ValueError: If they cannot.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    tried = set()
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer) or any(isinstance(value, DTensor) for value in layer.parameters()):
            continue
        plain = layer.get_base_layer()
        kind = type(layer), type(plain), getattr(plain, "bias", None) is None
        if kind not in tried:
            tried.add(kind)
            _merge(copy.deepcopy(layer))


def _merge(layer: Any) -> None:
    try:
        layer.merge()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"PEFT adapters of the kind {type(layer).__name__} cannot be merged into this model ({error}). Write the adapters "
            "alone (`adapter_only`), or choose another kind of adapter."
        ) from error


def _untie(model: nn.Module, layer: nn.Module) -> None:
    if isinstance(getattr(layer, "weight", None), nn.Parameter):
        untie(model, layer)
