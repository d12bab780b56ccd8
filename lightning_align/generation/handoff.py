"""The hand-off to another engine: a folder with the model as transformers and vLLM read it, and the sampling settings."""

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_align.generation.ends import Ends
from lightning_align.generation.sampler import GenerationConfig
from lightning_align.models.building import backbone_spec
from lightning_align.models.formats import write_model
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.weights import state_hash
from lightning_align.runtime.checksums import check_sums, read_object, sealed, unsealed, write_sums
from lightning_align.runtime.files import publish_text, temporary_path

RECORD = "handoff.json"
"""The file in the model folder that holds the hash of the weights."""


@dataclasses.dataclass(frozen=True)
class Served:
    """A model for another engine.

    Args:
        model: The model.
        weights: Its weights, gathered and with merged adapters, from `merged_weights`.
        tokenizer: The tokenizer of the data. None if there is none.
        ends: How responses end, and which ids exist.
        config: The sampling settings.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    tokenizer: Any
    ends: Ends
    config: GenerationConfig


def write_served(folder: Path, served: Served, *, iteration: int) -> None:
    """Write a model folder, unless it exists with the same weights. A reader never sees a partial folder.

    For a `PretrainedLM` the folder opens in transformers, vLLM and SGLang. Its ``generation_config.json`` has the
    end-of-sequence ids and the sampling settings.

    Args:
        folder: The folder to write.
        served: The model, its tokenizer and its settings.
        iteration: The iteration.

    Raises:
        ValueError: If the folder has other weights. What an engine generated from it then comes from another model.
    """
    own = state_hash(dict(served.weights))
    if folder.is_dir():
        path = folder / RECORD
        found = str(read_object(path).get("sha256")) if path.is_file() else "unknown"
        if found != own:
            raise ValueError(
                f"{folder} has other weights ({found[:12]}) than iteration {iteration} of this run ({own[:12]}). What is in "
                f"this folder comes from another run. Give the backend another `folder`, or remove {folder.parent}."
            )
        check_sums(folder)  # an engine that reads them does not
        return
    temporary = temporary_path(folder)
    if backbone_spec(served.model) is None and not isinstance(served.model, PretrainedLM):
        temporary.mkdir(parents=True)  # a model that nothing can rebuild is only weights
        save_file(dict(served.weights), temporary / "model.safetensors")
    else:
        write_model(served.model, served.weights, temporary, tokenizer=served.tokenizer, eos_ids=served.ends.ids)
    settings = temporary / "generation_config.json"
    known = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if isinstance(served.model, PretrainedLM):
        known |= transformers_settings(served.config, served.ends)
        settings.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (temporary / RECORD).write_text(json.dumps({"iteration": iteration, "sha256": own}, indent=2) + "\n", encoding="utf-8")
    write_sums(temporary)
    os.replace(temporary, folder)


def transformers_settings(config: GenerationConfig, ends: Ends) -> dict[str, Any]:
    """Return the settings as ``generation_config.json`` of transformers names them. Filters that are off are named too."""
    sampled = config.temperature > 0
    filters = {
        "temperature": config.temperature,
        "top_k": config.top_k or 0,
        "top_p": config.top_p,
        "min_p": config.min_p or None,
        "typical_p": config.typical_p,
    }
    ids = list(ends.ids)
    return {
        "do_sample": sampled,
        "max_new_tokens": config.max_new_tokens,
        "repetition_penalty": config.repetition_penalty,
        "no_repeat_ngram_size": config.no_repeat_ngram_size,
        **({"eos_token_id": ids[0] if len(ids) == 1 else ids} if ids else {}),
        **(filters if sampled else {}),
    }


def engine_settings(config: GenerationConfig, ends: Ends) -> dict[str, Any]:
    """Return the sampling settings as vLLM's ``SamplingParams`` names them.

    `top_k` is 0 if it is off. `stop_token_ids` are the end-of-sequence ids, and `stop` texts stay in the response.
    """
    return {
        "n": config.num_samples,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k or 0,
        "min_p": config.min_p,
        "repetition_penalty": config.repetition_penalty,
        "max_tokens": config.max_new_tokens,
        "seed": config.seed,
        "stop": list(ends.stop.texts) if ends.stop is not None else [],
        "stop_token_ids": list(ends.ids),
        "include_stop_str_in_output": True,
    }


def write_settings(path: Path, config: GenerationConfig, ends: Ends, *, iteration: int) -> None:
    """Write the settings of an iteration, unless they exist and are the same.

    Raises:
        ValueError: If the file has other settings. Responses in its folder would come from these.
    """
    settings: dict[str, Any] = {
        "iteration": iteration,
        "model": "model",
        "sampling": engine_settings(config, ends),
        "ends": ends.described(),
        "unsupported_by_vllm": {"typical_p": config.typical_p, "no_repeat_ngram_size": config.no_repeat_ngram_size},
    }
    if not path.exists():
        publish_text(path, json.dumps(sealed(settings), indent=2, ensure_ascii=False) + "\n")
        return
    try:
        found = unsealed(read_object(path))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Remove {path.parent}, and let the engine generate again.") from error
    own = json.loads(json.dumps(settings))
    changes = [
        f"`{name}` was {_get(found, group, name)!r} and is now {value!r}"
        for group in ("sampling", "ends", "unsupported_by_vllm")
        for name, value in own[group].items()
        if _get(found, group, name) != value
    ]
    if changes:
        raise ValueError(
            f"{path} has other settings: {', '.join(changes)}. An engine may have generated with them. Give the backend "
            f"another `folder`, remove {path.parent}, or set them back."
        )


def _get(settings: Any, group: str, name: str) -> Any:
    return settings.get(group, {}).get(name)


def request_seed(seed: int, iteration: int, prompt: int) -> int:
    """Return the seed of a request: another one for each seed, iteration and prompt, from 0 to 2^31 - 1."""
    return zlib.crc32(f"{seed}-{iteration}-{prompt}".encode()) & 0x7FFFFFFF
