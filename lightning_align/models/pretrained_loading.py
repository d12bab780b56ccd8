"""Loading models of transformers, and finding the part of them that reads text."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_align.models.deferred import CannotDefer, is_deferring
from lightning_align.models.pretrained_shards import build_deferred_pretrained
from lightning_align.runtime.checksums import check_sums
from lightning_align.runtime.gguf import split_gguf
from lightning_align.runtime.hub import out_of_reach

NO_TEXT_DECODER = "It is an encoder-decoder, whose prompts and responses have different networks. Use a decoder-only model."


def build_random(config: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    """Build a model with random weights.

    Args:
        config: A complete configuration with its ``model_type``.
        options: ``dtype`` and ``attn_implementation``.

    Raises:
        ValueError: If the configuration does not describe a causal language model.
    """
    from transformers import AutoConfig

    fields = dict(config or {})
    kind = fields.pop("model_type")
    dtype = options["dtype"]
    options = {**options, "dtype": torch.float32 if dtype == "auto" else getattr(torch, dtype)}
    try:
        found = AutoConfig.for_model(kind, **fields)
        return _class_for(found).from_config(found, **options)
    except Exception as error:  # configurations and models raise many types here
        raise ValueError(
            f"PretrainedLM: `config` must describe a causal language model, but model_type {kind!r} does not give one "
            f"({summary(error)})."
        ) from error


def load_pretrained(name: str, config: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    """Load a model with its weights.

    Args:
        name: A folder, a GGUF file or a name on the hub. Quantized weights of a GGUF file are dequantized.
        config: Entries that replace those of the model's own configuration.
        options: ``dtype``, ``attn_implementation`` and ``revision``.

    Raises:
        ValueError: If the model does not exist, or cannot be loaded as a causal language model.
    """
    from transformers import AutoConfig

    place, gguf = split_gguf(name, what="model")
    if gguf and is_deferring():
        raise CannotDefer("a GGUF file is read as a whole")
    folder = Path(place)
    if not gguf and folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model {name!r} has no config.json. Pass a folder that `save_pretrained` or `export` wrote.")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"model {name!r}: there is no such folder (the working directory is {Path.cwd()}).")
    if not gguf:
        check_sums(folder)
    overrides = {key: value for key, value in (config or {}).items() if key != "model_type"}
    revision = options["revision"] or "main"
    source = {
        "revision": revision,
        "trust_remote_code": False,
        "local_files_only": not folder.is_dir() and out_of_reach(name, revision),
        **gguf,
    }
    try:
        loaded_config = AutoConfig.from_pretrained(place, **source)
        for key, value in overrides.items():
            setattr(loaded_config, key, value)
        kind = _class_for(loaded_config)
        if is_deferring():
            return build_deferred_pretrained(kind, loaded_config, name, {**options, **source})
        weights = _dequantized() if gguf else {"use_safetensors": True}
        return kind.from_pretrained(place, config=loaded_config, **weights, **{**options, **source})
    except OSError as error:
        if folder.is_dir() and not gguf:
            raise ValueError(
                f"model {name!r} cannot be loaded ({summary(error)}). Its weights must be safetensors, because loading other "
                "formats can run code. Convert them with `model.save_pretrained(folder)`."
            ) from error
        if gguf:
            raise ValueError(f"model {name!r} cannot be read ({summary(error)}). Is the file complete?") from error
        raise ValueError(
            f"model {name!r} is not a local folder, and the Hugging Face hub did not provide it ({summary(error)}). Without a "
            "network, pass the path of a folder with config.json and *.safetensors, such as ./my-model."
        ) from error
    except Exception as error:  # configurations and models raise many types here
        raise ValueError(f"model {name!r} cannot be built as a causal language model ({summary(error)}).") from error


def _dequantized() -> dict[str, Any]:
    """Return the arguments with which transformers dequantizes a GGUF file. Releases without the setting always do."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def _class_for(config: Any) -> Any:
    """Return the class of transformers that builds the model: one for text, or one for images and text.

    Raises:
        ValueError: If the configuration is of an encoder-decoder.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    def knows(auto: Any) -> bool:
        return type(config) in auto._model_mapping.keys()  # a lazy mapping, which loads a class if asked for it

    if knows(AutoModelForCausalLM):
        return AutoModelForCausalLM
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(NO_TEXT_DECODER)
    return AutoModelForImageTextToText if knows(AutoModelForImageTextToText) else AutoModelForCausalLM


def find_decoder(model: Any) -> Any:
    """Return the part of a model that turns tokens into hidden states: for models of images and text, the text model.

    Args:
        model: A model of transformers with its output layer.
    """
    base = getattr(model, model.base_model_prefix, None)
    if not isinstance(base, nn.Module):
        # For example, the prefix of Llama 4 names an attribute that only its multimodal class has.
        base = getattr(model, "model", None)
    if is_composite(model):
        text = model.config.get_text_config(decoder=True)
        within = [part for part in model.modules() if getattr(part, "config", None) is text and part is not model]
        # Some classes contain a whole causal language model, with the output layer.
        base = next((part for part in within if getattr(part, "lm_head", None) is None), base)
    if not isinstance(base, nn.Module):
        base = model.get_decoder()
    return base


def is_composite(model: Any) -> bool:
    """Return whether a model has a text model as one of several parts, such as a vision tower."""
    return model.config.get_text_config(decoder=True) is not model.config


def freeze_other_parts(model: Any, decoder: nn.Module) -> None:
    """Freeze the weights that text does not use, such as those of a vision tower. They would get no gradients.

    Args:
        model: A composite model. It is changed in place.
        decoder: Its text model.
    """
    used = {
        id(parameter)
        for part in (decoder, model.get_output_embeddings())
        if part is not None
        for parameter in part.parameters()
    }
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def causal_remedy(config: Any) -> str:
    """Return what makes a model of transformers causal."""
    if getattr(config, "is_decoder", None) is False:
        return "Set `config: {is_decoder: true}` to give it a causal mask, or use a model that was trained with one."
    return ""


def summary(error: Exception) -> str:
    """Return the type of an error and the first line of its message, because the messages of transformers are long."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
