"""Causal language models of transformers, with the optional capabilities of a language model. Needs the extra `hf`."""

import importlib.util
import inspect
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_align.models.language_model import Head, declared_ends
from lightning_align.models.lora import is_adapted
from lightning_align.models.parallelize import compile_blocks, uncompiled
from lightning_align.models.peft_adapters import TRAINED, add_peft, has_peft, peft_disabled
from lightning_align.runtime.hub import out_of_reach

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TOLERANCE = 1e-3
"""The largest difference of recomputed logits that counts as equal, in standard deviations of the logits."""
SCALES, SOFTCAPS = ("logit_scale", "logits_scaling", "lm_head_multiplier"), ("final_logit_softcapping", "logits_soft_cap")
"""The configuration fields that hold a factor or divisor of the logits, and those that hold their soft cap."""


class PretrainedLM(nn.Module):
    """A causal language model of transformers. The attribute ``model`` is the model of transformers itself.

    In nearly all models, the logits are the output layer applied to the hidden states, possibly scaled or softly capped (as in
    Gemma 2). Log-probs are then computed in chunks, without all logits in memory at once. The constructor checks this. If the
    logits of a model are computed in another way, it logs a message, and log-probs are computed from whole logits.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        config: dict[str, Any] | None = None,
        dtype: Dtype = "float32",
        attention: str | None = None,
        revision: str | None = None,
        gradient_checkpointing: bool = False,
        compile: str | None = None,
        adapter: str | dict[str, Any] | None = None,
        eos_token_id: int | list[int] | None = None,
    ) -> None:
        """Load a model, or build one with random weights.

        Args:
            name: A folder with config.json and safetensors files, or a name on the Hugging Face hub. Code that comes with a
                model is never run, and pickled weights are never loaded.
            config: Without ``name``: a complete configuration with its ``model_type``, for a model with random weights. With
                ``name``: entries that replace those of the model's own configuration.
            dtype: The dtype of the weights. `auto` keeps the dtype of the files. Train in float32 (with
                `precision: bf16-mixed`) or in bfloat16.
            attention: The attention implementation, such as `sdpa`, `eager` or `flash_attention_2`. By default transformers
                chooses it.
            revision: The branch, tag or commit on the hub.
            gradient_checkpointing: Whether to recompute activations in the backward pass, which saves memory.
            compile: The backend of `torch.compile` for the layers, such as `inductor`. By default the layers are not compiled.
                Decoding with a cache is never compiled. Do not use it within CALM or RETRO, which read between layers.
            adapter: PEFT adapters (LoRA, DoRA, ...): a folder with trained adapters, or a configuration for new ones, such as
                `{r: 8, use_dora: true}`. Only the adapters train. With new adapters, the model with its adapters switched off
                can be the reference, which needs no extra memory.
            eos_token_id: The ids that end a response. Default is those in the generation settings of the model, which list
                several for most instruct models. A model with random weights has only those that `config` gives.

        Raises:
            ValueError: If the model does not exist, has no linear output layer or has no safetensors weights, or if the
                adapters do not fit it.
        """
        super().__init__()
        if importlib.util.find_spec("transformers") is None:
            raise ValueError("PretrainedLM needs transformers. Install it: pip install -c constraints.txt -e '.[cpu,hf]'")
        complete = config is not None and "model_type" in config
        if name is None and not complete:
            raise ValueError(
                "PretrainedLM: `name` or `config` must be set. Pass a folder or a name on the hub as `name`, or a `config` "
                "with `model_type`."
            )
        self.pretrained = name is not None
        """Whether building the model loads its weights. A checkpoint that contains only adapters can then be completed."""
        self._load_error: str | None = None
        options = {"dtype": dtype, "attn_implementation": attention}
        if name is None:
            self.model: Any = _build_random(config, options)
        else:
            try:
                self.model = _load(name, config, {**options, "revision": revision})
            except ValueError as error:
                if not complete:
                    raise
                # A complete configuration with a name comes from a checkpoint. Its folder may be gone, but the checkpoint
                # contains the weights, which are loaded after this.
                self._load_error = str(error)
                self.model = _build_random(config, options)
        described_adapter = None if adapter is None else add_peft(self.model, adapter)
        # None for trained adapters, also those of a checkpoint: training did not start from the model without adapters.
        self.adapters_off = peft_disabled if isinstance(adapter, dict) and not adapter.get(TRAINED) else None
        """A context manager that switches new adapters off, or None if there are none."""
        if gradient_checkpointing:
            # The method was renamed in transformers 5.
            enable = getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.config = self.model.config
        if eos_token_id is None:
            given = name is not None or "eos_token_id" in (config or {})
            eos_token_id = list(declared_ends(self.model)) if given else []
        self.eos_ids: tuple[int, ...] = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        """The end-of-sequence ids that the model declares, whatever the tokenizer."""
        described = json.loads(self.config.to_json_string(use_diff=True))
        self.init_args: dict[str, Any] = {
            "name": name,
            # Complete, so that a checkpoint can rebuild the model when the folder is gone.
            "config": {"model_type": self.config.model_type, **described},
            "dtype": dtype,
            "attention": attention,
            "revision": revision,
            "gradient_checkpointing": gradient_checkpointing,
            "eos_token_id": list(self.eos_ids),
            "adapter": described_adapter,  # not the folder, because a checkpoint contains the weights
        }
        self.model.eval()
        if not _has_selectable_cache(self.decoder, self.config):
            # Without `make_cache`, decoding recomputes the rows at each step, which is slower but correct.
            self.make_cache = None  # type: ignore[method-assign,assignment]
        self._softcap: float | None = None
        self._scale = self._probe()
        self.model.train()  # the initial mode of any module
        self.compile_backend = compile
        if compile is not None:
            compile_blocks(self.blocks, compile)
        self.register_load_state_dict_post_hook(_clear_load_error)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Compile the layers again, because copies and unpickled models lose their compilation."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # untyped in torch
        if self.compile_backend is not None:
            compile_blocks(self.blocks, self.compile_backend)

    # -- the interface of a language model

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits (B, N, V) of tokens (B, N). Padding, if any, is on the right."""
        self._check_loaded()
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: "PretrainedCache | None" = None,
    ) -> Tensor:
        """Compute the final hidden states. `head` turns them into logits.

        Args:
            tokens: (B, N) int64 token ids. With a cache, these are the tokens that follow the cached ones.
            mask: (B, M) bool, true at real tokens. M is the number of cached and new columns. None if there is no padding, or
                if it is on the right.
            positions: (N,) or (B, N) int64 positions. By default they are counted from the first column.
            cache: A cache from `make_cache`. It is extended in place.

        Returns:
            (B, N, D) hidden states, multiplied by the scale of the logits if there is one.
        """
        self._check_loaded()
        if positions is not None and positions.ndim == 1:
            positions = positions.expand(len(tokens), -1)
        past = None if cache is None else cache.past
        with nullcontext() if cache is None else uncompiled(self):
            out = self.decoder(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=past is not None
            )
        if cache is not None:
            cache.length += tokens.shape[1]
        hidden: Tensor = out.last_hidden_state
        return hidden if self._scale in (None, 1.0) else hidden * self._scale

    @property
    def head(self) -> Head | None:
        """The output layer. None if the logits are computed in another way, or if it has adapters that are not merged."""
        if self._scale is None:
            return None
        layer = self.model.get_output_embeddings()
        if is_adapted(layer):
            return None
        return Head(layer.weight, layer.bias, self._softcap)

    @property
    def decoder(self) -> Any:
        """The model without its output layer."""
        return getattr(self.model, self.model.base_model_prefix)

    @property
    def num_tokens(self) -> int:
        """The vocabulary size V: the number of rows of the output layer."""
        size: int = self.model.get_output_embeddings().weight.shape[0]
        return size

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers: the list of modules with the most parameters."""
        lists = [module for module in self.decoder.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()))

    def make_cache(self, batch: int, length: int) -> "PretrainedCache":
        """Create an empty key-value cache.

        The cache of transformers grows by itself, so the arguments are not used.

        Args:
            batch: The number of rows B.
            length: The number of columns S.
        """
        from transformers import DynamicCache

        return PretrainedCache(DynamicCache(config=self.config))

    def _check_loaded(self) -> None:
        if self._load_error is not None:
            raise ValueError(f"{self._load_error} No checkpoint has been loaded since then, so the model has no weights.")

    @torch.no_grad()
    def _probe(self) -> float | None:
        """Find the factor and the soft cap with which the output layer turns hidden states into the logits of the model.

        Both are found by computing a few logits, because configurations have many names for them. This sets the soft cap and
        returns the factor. It returns None if the logits are computed in another way.
        """
        layer = self.model.get_output_embeddings()
        if has_peft(self.model) and not isinstance(layer, nn.Linear):
            return None  # the output layer has an adapter
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"{type(self.model).__name__} must be a causal language model with a linear output layer, but has none."
            )
        if layer.weight.is_meta:
            return 1.0
        tokens = torch.arange(min(8, layer.weight.shape[0]), device=layer.weight.device)[None]
        logits = self.model(input_ids=tokens, use_cache=False).logits.float()
        linear = F.linear(self.decoder(input_ids=tokens, use_cache=False).last_hidden_state, layer.weight, layer.bias).float()
        values = {key: float(value) for key, value in self.config.to_dict().items() if key in (*SCALES, *SOFTCAPS) and value}
        scale = 1.0 if layer.bias is not None else float((logits * linear).sum() / linear.square().sum().clamp(min=1e-30))
        factors = [factor for key in SCALES if key in values for factor in (values[key], 1 / values[key])]
        # Use 1 or a value of the configuration, whichever is nearest to the measured scale. The measured scale is not exact.
        scale = min((1.0, *factors), key=lambda factor: abs(factor - scale))
        candidates: list[tuple[float, float | None]] = [
            (scale, None),
            *((1.0, values[key]) for key in SOFTCAPS if key in values),
        ]
        tolerance = TOLERANCE if logits.dtype is layer.weight.dtype else 30 * TOLERANCE
        for factor, softcap in candidates:
            recomputed = Head(layer.weight, layer.bias, softcap).capped(linear * factor)
            error = (logits - recomputed).abs().max() / logits.std().clamp(min=1e-6)
            if float(error) <= tolerance:
                self._softcap = softcap
                return factor
        rank_zero_info(
            f"{type(self.model).__name__}: the logits are not the output layer applied to the hidden states. They differ by "
            f"{float(error):.1e} of their standard deviation. Log-probs are computed from whole logits, which takes more "
            "memory and time."
        )
        return None


class PretrainedCache:
    """A key-value cache of transformers, with the interface of `KVCache` that decoding needs."""

    def __init__(self, past: Any) -> None:
        """Wrap a cache.

        Args:
            past: A cache of transformers.
        """
        self.past = past
        self.length = 0
        """The number of filled columns."""
        if not _joins(past):
            self.join = None  # type: ignore[method-assign,assignment]

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, (B',) int64, in this order. A repeated row is copied."""
        self.past.batch_select_indices(rows)

    def join(self, other: "PretrainedCache", *, columns: int, capacity: int) -> None:
        """Append the rows of another cache. See `KVCache.join`. A cache of transformers grows by itself, without `capacity`."""
        for layer, added in zip(self.past.layers, other.past.layers, strict=True):
            if not layer.is_initialized:  # a layer that uses the keys of another one
                continue
            width = columns
            if layer.is_sliding:
                width = min(columns, layer.sliding_window - 1)
                layer.cumulative_length = columns
            layer.keys = torch.cat((_last(layer.keys, width), _last(added.keys, width)))
            layer.values = torch.cat((_last(layer.values, width), _last(added.values, width)))
        self.length = columns


def _last(states: Tensor, width: int) -> Tensor:
    """Return the last columns of (B, H, S, K) states. Missing columns are zero."""
    states = states[:, :, max(0, states.shape[2] - width) :]
    return F.pad(states, (0, 0, width - states.shape[2], 0))


def _joins(past: Any) -> bool:
    """Return whether a cache contains only keys and values per column, so that columns can be dropped and added."""
    from transformers import cache_utils

    return all(type(layer) in (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer) for layer in past.layers)


def _has_selectable_cache(decoder: nn.Module, config: Any) -> bool:
    """Return whether the cache of a model contains only keys and values per column, so that rows can be selected.

    Recurrent models keep a state instead, in another cache or in layers that do not support row selection.
    """
    from transformers import DynamicCache

    if "past_key_values" not in inspect.signature(decoder.forward).parameters:
        return False
    return all(hasattr(layer, "batch_select_indices") for layer in DynamicCache(config=config).layers)


def _clear_load_error(module: nn.Module, _: Any) -> None:
    assert isinstance(module, PretrainedLM)
    module._load_error = None


def _build_random(config: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    """Build a model with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config or {})
    kind = fields.pop("model_type")
    dtype = options["dtype"]
    options = {**options, "dtype": torch.float32 if dtype == "auto" else getattr(torch, dtype)}
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), **options)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(
            f"PretrainedLM: `config` must describe a causal language model, but model_type {kind!r} does not give one "
            f"({_summary(error)})."
        ) from error


def _load(name: str, config: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    """Load a model with its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model {name!r} has no config.json. Pass a folder that `save_pretrained` or `export` wrote.")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"model {name!r}: there is no such folder (the working directory is {Path.cwd()}).")
    overrides = {key: value for key, value in (config or {}).items() if key != "model_type"}
    revision = options["revision"] or "main"
    source = {
        "revision": revision,
        "trust_remote_code": False,
        "local_files_only": not folder.is_dir() and out_of_reach(name, revision),
    }
    try:
        loaded_config = AutoConfig.from_pretrained(name, **source)
        for key, value in overrides.items():
            setattr(loaded_config, key, value)
        return AutoModelForCausalLM.from_pretrained(name, config=loaded_config, use_safetensors=True, **{**options, **source})
    except OSError as error:
        if folder.is_dir():
            raise ValueError(
                f"model {name!r} cannot be loaded ({_summary(error)}). Its weights must be safetensors, because loading other "
                "formats can run code. Convert them with `model.save_pretrained(folder)`."
            ) from error
        raise ValueError(
            f"model {name!r} is not a local folder, and the Hugging Face hub did not provide it ({_summary(error)}). Without a "
            "network, pass the path of a folder with config.json and *.safetensors, such as ./my-model."
        ) from error
    except (ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"model {name!r} cannot be built as a causal language model ({_summary(error)}).") from error


def _summary(error: Exception) -> str:
    """Return the type of an error and the first line of its message, because the messages of transformers are long."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
