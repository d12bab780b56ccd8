"""Starts of new PEFT adapters that need more than the model: CorDA, EVA, LoRA-GA, and PiSSA by a random decomposition."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESIDUAL = (
    "Or prepare it with PEFT: save the base model without its adapters, and the adapters with `init_lora_weights: true`. Then "
    "pass both folders as `name` and `adapter`."
)


@contextmanager
def prepared_start(model: Any, config: Any, *, trained: bool) -> Iterator[None]:
    """Prepare a model for adapters whose start depends on data, while they are added within a ``with`` block.

    Args:
        model: A model of transformers.
        config: The configuration of PEFT.
        trained: Whether the values of the adapters are read from a file after this.

    Raises:
        ValueError: If the start cannot be computed, or cannot be computed again when a run is resumed.
    """
    start = str(getattr(config, "init_lora_weights", "")).lower()
    if start.startswith("pissa_niter") and trained:
        raise ValueError(
            f"`init_lora_weights` is {start!r}, which took the adapters out of the base weights by a random decomposition, so "
            "the base weights that belong to these adapters cannot be computed again. Pass `path_initial_model_for_weight_"
            "conversion` to PEFT's save_pretrained. It writes adapters of the unchanged base model"
        )
    if start == "lora_ga" or (start == "eva" and not trained):
        raise ValueError(
            f"`init_lora_weights` is {start!r}, whose start is computed from gradients or activations of training rows, which "
            f"are not known here. Use another start, such as true or 'pissa'. {RESIDUAL.removesuffix('.')}"
        )
    if start != "corda":
        yield
        return
    cache = getattr(config.corda_config, "cache_file", None)
    if cache is None or not Path(cache).is_file():
        raise ValueError(
            f"`init_lora_weights` is 'corda', whose start is computed from activations of rows, but `corda_config` names "
            f"{'no `cache_file`' if cache is None else f'a `cache_file` that does not exist ({cache})'}. Call PEFT's "
            "preprocess_corda on the base model once, with a `cache_file`, and pass the same `corda_config`. "
            f"{RESIDUAL.removesuffix('.')}"
        )
    from peft.tuners.lora.corda import preprocess_corda

    preprocess_corda(model, config)
    try:
        yield
    finally:
        for module in model.modules():
            if hasattr(module, "eigens"):
                del module.eigens
