"""Embeddings for tokens that were added to a tokenizer, and how they train beside adapters."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.models.palm import PaLM

NOISE = 1e-9
"""The variance of new rows, relative to that of the others. It is that of ``mean_resizing`` in transformers."""


@torch.no_grad()
def fill_new_rows(weight: Tensor, old: int, generator: torch.Generator) -> None:
    """Set the rows of new tokens to the mean of the other rows, with a little noise.

    The mean keeps the probabilities of the other tokens (Hewitt 2021, "Initializing new word embeddings for pretrained language
    models"). ``mean_resizing`` of transformers does the same. Here the numbers do not depend on the random state or on the
    number of threads, so that a run which is resumed builds the same model.

    Args:
        weight: (V, ...) weight or bias. It is changed in place.
        old: The number of rows that existed before.
        generator: The source of the noise, on the CPU.
    """
    rows = weight[:old].double()
    noise = torch.randn(weight[old:].shape, generator=generator, dtype=torch.float64).to(weight.device)
    weight[old:] = (rows.mean(0) + noise * rows.std(0, correction=0) * NOISE**0.5).to(weight.dtype)


def resize_embeddings(model: nn.Module, num_tokens: int) -> int:
    """Give a model embeddings for more tokens. New rows start at the mean of the others.

    Args:
        model: A `PaLM`, or a model of transformers. It is changed in place.
        num_tokens: The new vocabulary size.

    Returns:
        The number of new tokens.

    Raises:
        ValueError: If the model has more tokens already, or its layers cannot be resized.
    """
    if isinstance(model, PaLM):
        old = int(model.init_args["num_tokens"])
    else:
        old = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    if num_tokens < old:
        raise ValueError(
            f"`resize_embeddings` must be at least the {old} tokens that the model has, but got {num_tokens}. Remove it: the "
            "embeddings have room for such a tokenizer."
        )
    if num_tokens == old:
        return 0
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, PaLM):
        _resize_palm(model, num_tokens, generator)
    else:
        _resize_transformers(model, num_tokens, old, generator)
    return num_tokens - old


def _grown(weight: Any, num_tokens: int, generator: torch.Generator) -> nn.Parameter:
    grown = weight.new_empty(num_tokens, *weight.shape[1:])
    grown[: len(weight)] = weight.detach()
    fill_new_rows(grown, len(weight), generator)
    return nn.Parameter(grown, requires_grad=weight.requires_grad)


@torch.no_grad()
def _resize_palm(model: PaLM, num_tokens: int, generator: torch.Generator) -> None:
    model.token_emb.weight = _grown(model.token_emb.weight, num_tokens, generator)
    model.token_emb.num_embeddings = num_tokens
    if model.to_logits is not None:
        model.to_logits.weight = _grown(model.to_logits.weight, num_tokens, generator)
        model.to_logits.out_features = num_tokens
    model.init_args["num_tokens"] = num_tokens


def _resize_transformers(model: Any, num_tokens: int, old: int, generator: torch.Generator) -> None:
    before = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.random.fork_rng(devices=[]):
        try:
            model.resize_token_embeddings(num_tokens, mean_resizing=False)
        except (TypeError, NotImplementedError, AttributeError) as error:
            raise ValueError(
                f"`resize_embeddings`: the embeddings of {type(model).__name__} cannot be resized ({error}). Use a tokenizer "
                f"with at most {old} tokens."
            ) from error
    first, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not (len(first.weight) == len(head.weight) == num_tokens) or (first.weight is head.weight) != before:
        raise ValueError(
            f"`resize_embeddings`: the layers of {type(model).__name__} have {len(first.weight)} and {len(head.weight)} rows "
            f"after resizing to {num_tokens}. Use a tokenizer with at most {old} tokens."
        )
    fill_new_rows(first.weight, old, generator)
    if head.weight is not first.weight:
        fill_new_rows(head.weight, old, generator)
    if getattr(head, "bias", None) is not None:
        fill_new_rows(head.bias, old, generator)


def with_new_tokens(model: Any, adapter: dict[str, Any], new: int) -> dict[str, Any]:
    """Return a configuration of new PEFT adapters with which the rows of new tokens train.

    LoRA trains them by ``trainable_token_indices``, unless the configuration says how the embeddings train.

    Args:
        model: The model of transformers, with the rows of the new tokens.
        adapter: The configuration.
        new: The number of new tokens.
    """
    names = layer_names(model)
    told = [adapter.get(key) for key in ("modules_to_save", "target_modules")]
    mentioned = any(name in (value if isinstance(value, list) else [value]) for value in told for name in names)
    if not new or mentioned or adapter.get("trainable_token_indices") or str(adapter.get("peft_type", "LORA")) != "LORA":
        return adapter
    head = model.get_output_embeddings()
    indices = list(range(len(head.weight) - new, len(head.weight)))
    if getattr(head, "bias", None) is None:
        return {**adapter, "trainable_token_indices": {name: indices for name in names}}
    # PEFT leaves out the bias of an output layer of which it trains some rows.
    told = adapter.get("modules_to_save") or []
    return {**adapter, "modules_to_save": [*told, names[-1]], "trainable_token_indices": {names[0]: indices}}


def trains_rows_whole(model: Any) -> bool:
    """Return whether rows of the embedding train as they are beside adapters of PEFT, and not by a product of two factors.

    Args:
        model: The model of transformers, with its adapters.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(model.get_input_embeddings(), AuxiliaryTrainingWrapper)


def layer_names(model: Any) -> list[str]:
    """Return the last parts of the names of the embedding and, if it is not tied to it, of the output layer."""
    first, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [first] if head.weight is first.weight else [first, head]
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)].rpartition(".")[2] for layer in layers]


def check_new_rows_train(model: Any, new: int) -> None:
    """Check that the rows of new tokens train beside adapters.

    Args:
        model: The model of transformers, with its adapters.
        new: The number of new tokens.

    Raises:
        ValueError: If a layer with new rows is frozen.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    if new and getattr(getattr(layers[1], "token_adapter", None), "base_layer", None) is not None:
        if getattr(layers[1].token_adapter.base_layer, "bias", None) is not None:
            raise ValueError(
                "`trainable_token_indices` cannot train rows of this output layer, because PEFT leaves out its bias. Name the "
                "layer in `modules_to_save` instead."
            )
    frozen = [layer for layer in layers if not any(parameter.requires_grad for parameter in layer.parameters())]
    if new and frozen:
        raise ValueError(
            f"`resize_embeddings` adds {new} tokens, whose rows would not train beside this `adapter`. Name the embedding and "
            "the output layer in `modules_to_save`, give their ids as `trainable_token_indices`, or use LoRA without either."
        )
