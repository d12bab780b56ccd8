"""Causal language models of transformers, with the fast paths of this package. Needs the extra `hf`."""

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

from lightning_align.models.language_model import Head
from lightning_align.models.lora import is_adapted
from lightning_align.models.parallelize import compile_blocks, uncompiled
from lightning_align.models.peft_adapters import TRAINED, add_peft, has_peft, peft_disabled
from lightning_align.runtime.hub import out_of_reach

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TOLERANCE = 1e-3
"""Difference of probe logits, over their spread, up to which an output layer is said to have made them."""
SCALES, SOFTCAPS = ("logit_scale", "logits_scaling", "lm_head_multiplier"), ("final_logit_softcapping", "logits_soft_cap")
"""What configurations call what logits are multiplied with, or divided by, and what they are softly capped at."""


class PretrainedLM(nn.Module):
    """Any causal language model of transformers.

    Where logits are the output layer applied to the hidden states, perhaps scaled, as in nearly all models, log-probs are
    computed from these two, and logits never exist as a whole; so they are where logits are softly capped, as of Gemma 2.
    Where logits are something else it says so, and goes by them. The model of transformers is ``model``.
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
    ) -> None:
        """Read a model, or make one with random weights.

        Args:
            name: folder with config.json and safetensors, or name on the Hugging Face hub. Code that comes with a model is
                never run, pickled weights are never read.
            config: without ``name``, a whole configuration with its ``model_type``, for random weights; with it, entries that
                replace those of the model.
            dtype: of the weights; `auto` is that of the files. Train in float32 (with `precision: bf16-mixed`) or in bfloat16.
            attention: implementation: `sdpa`, `eager`, `flash_attention_2`, ...; by default the one that suits the model best.
            revision: branch, tag or commit on the hub.
            gradient_checkpointing: whether to compute activations again in the backward pass, to save memory.
            compile: backend of `torch.compile` for the layers, as `inductor`; by default they run as they are, as they always
                do when decoding. Not within CALM or RETRO, which read between layers.
            adapter: adapters of PEFT (LoRA, DoRA, ...), which then train alone: a folder with some that are trained, or a
                configuration for new ones, as `{r: 8, use_dora: true}`. What the model was with new ones is a reference that
                costs no memory.

        Raises:
            ValueError: if there is no such model, it has no output layer, its weights are no safetensors, or the adapters are
                of another.
        """
        super().__init__()
        if importlib.util.find_spec("transformers") is None:
            raise ValueError("PretrainedLM needs transformers: pip install -c constraints.txt -e '.[cpu,hf]'")
        whole = config is not None and "model_type" in config
        if name is None and not whole:
            raise ValueError("PretrainedLM: give `name`, a folder or a name on the hub, or a `config` with its model_type")
        self.pretrained = name is not None
        """Whether weights come with it, so that a checkpoint of adapters alone can be completed."""
        self._missing: str | None = None
        options = {"dtype": dtype, "attn_implementation": attention}
        if name is None:
            self.model: Any = _make(config, options)
        else:
            try:
                self.model = _read(name, config, {**options, "revision": revision})
            except ValueError as error:
                if not whole:
                    raise
                # A checkpoint is being read whose model came from a folder that is gone: its own weights follow.
                self._missing = str(error)
                self.model = _make(config, options)
        described_adapter = None if adapter is None else add_peft(self.model, adapter)
        # Not for trained ones, those that a checkpoint describes included: what they began as is not the bare model.
        self.adapters_off = peft_disabled if isinstance(adapter, dict) and not adapter.get(TRAINED) else None
        """Context in which the model is what it was without its new adapters."""
        if gradient_checkpointing:
            # Renamed in transformers 5.
            enable = getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.config = self.model.config
        described = json.loads(self.config.to_json_string(use_diff=True))
        self.init_args: dict[str, Any] = {
            "name": name,
            "config": {"model_type": self.config.model_type, **described},  # whole: see above
            "dtype": dtype,
            "attention": attention,
            "revision": revision,
            "gradient_checkpointing": gradient_checkpointing,
            "adapter": described_adapter,  # without its folder: a checkpoint has the weights
        }
        self.model.eval()
        if not _keeps_keys(self.decoder, self.config):
            # Found by capability: without it, decoding reads the rows again at every step, which is slower and right.
            self.make_cache = None  # type: ignore[method-assign,assignment]
        self._softcap: float | None = None
        self._scale = self._probe()
        self.model.train()  # as any module begins
        self.compile_backend = compile
        if compile is not None:
            compile_blocks(self.blocks, compile)
        self.register_load_state_dict_post_hook(_weights_came)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Compile the layers of a copy, which torch forgets."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it without types
        if self.compile_backend is not None:
            compile_blocks(self.blocks, self.compile_backend)

    # -- what a language model offers

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, N, V) for tokens (B, N), padded on the right if at all."""
        self._check()
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
        """Final hidden states, of which `head` makes the logits.

        Args:
            tokens: (B, N) int64; with a cache, the tokens after those that it holds.
            mask: (B, M) bool, true at tokens that exist; M counts the cached columns and the new ones. None if all exist, or if
                what does not stands on the right.
            positions: (N,) or (B, N) int64; by default counted from the first column.
            cache: from `make_cache`; extended in place.

        Returns:
            (B, N, D).
        """
        self._check()
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
        """The output layer; None where logits are more than it and a scale."""
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
        """V, the rows of the output layer."""
        size: int = self.model.get_output_embeddings().weight.shape[0]
        return size

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers: the longest list of modules."""
        lists = [module for module in self.decoder.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))

    def make_cache(self, batch: int, length: int) -> "PretrainedCache":
        """Room for the past of rows, which grows by itself."""
        from transformers import DynamicCache

        return PretrainedCache(DynamicCache(config=self.config))

    def _check(self) -> None:
        if self._missing is not None:
            raise ValueError(f"{self._missing}. Nor has a checkpoint brought the weights since")

    @torch.no_grad()
    def _probe(self) -> float | None:
        """By what hidden states are scaled before the output layer; None if the two do not make the logits.

        Found by trying, with the weights that are there, since configurations have many names for what they do to logits.
        """
        layer = self.model.get_output_embeddings()
        if has_peft(self.model) and not isinstance(layer, nn.Linear):
            return None  # an adapter on the output layer
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{type(self.model).__name__} has no linear output layer, expected a causal language model")
        if layer.weight.is_meta:
            return 1.0
        tokens = torch.arange(min(8, layer.weight.shape[0]), device=layer.weight.device)[None]
        logits = self.model(input_ids=tokens, use_cache=False).logits.float()
        made = F.linear(self.decoder(input_ids=tokens, use_cache=False).last_hidden_state, layer.weight, layer.bias).float()
        said = {key: float(value) for key, value in self.config.to_dict().items() if key in (*SCALES, *SOFTCAPS) and value}
        scale = 1.0 if layer.bias is not None else float((logits * made).sum() / made.square().sum().clamp(min=1e-30))
        named = [factor for key in SCALES if key in said for factor in (said[key], 1 / said[key])]
        # What the configuration says is exact, what was measured is not.
        scale = min((1.0, *named), key=lambda factor: abs(factor - scale))
        found: list[tuple[float, float | None]] = [(scale, None), *((1.0, said[key]) for key in SOFTCAPS if key in said)]
        tolerance = TOLERANCE if logits.dtype is layer.weight.dtype else 30 * TOLERANCE
        for factor, softcap in found:
            again = Head(layer.weight, layer.bias, softcap).capped(made * factor)
            error = (logits - again).abs().max() / logits.std().clamp(min=1e-6)
            if float(error) <= tolerance:
                self._softcap = softcap
                return factor
        rank_zero_info(
            f"{type(self.model).__name__}: its logits are not its output layer applied to its hidden states (they differ by "
            f"{float(error):.1e} of their spread): log-probs are computed from whole logits, which takes more memory and time"
        )
        return None


class PretrainedCache:
    """Keys and values of the past, as transformers keeps them."""

    def __init__(self, past: Any) -> None:
        """Wrap.

        Args:
            past: a cache of transformers.
        """
        self.past = past
        self.length = 0
        """Columns so far."""

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (int64), which may repeat."""
        self.past.batch_select_indices(rows)


def _keeps_keys(decoder: nn.Module, config: Any) -> bool:
    """Whether all that a model remembers are keys and values a column, of which rows can be chosen.

    Recurrent models keep a state, in a cache of their own or in layers that rows cannot be chosen from.
    """
    from transformers import DynamicCache

    if "past_key_values" not in inspect.signature(decoder.forward).parameters:
        return False
    return all(hasattr(layer, "batch_select_indices") for layer in DynamicCache(config=config).layers)


def _weights_came(module: nn.Module, _: Any) -> None:
    assert isinstance(module, PretrainedLM)
    module._missing = None


def _make(config: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    """A model of random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config or {})
    kind = fields.pop("model_type")
    dtype = options["dtype"]
    options = {**options, "dtype": torch.float32 if dtype == "auto" else getattr(torch, dtype)}
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), **options)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(
            f"PretrainedLM: config of model_type {kind!r} makes no causal language model ({_first(error)})"
        ) from error


def _read(name: str, config: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    """A model with its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model {name!r}: the folder has no config.json; give one that save_pretrained or `export` wrote")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"model {name!r}: there is no such folder (looked from {Path.cwd()})")
    overrides = {key: value for key, value in (config or {}).items() if key != "model_type"}
    revision = options["revision"] or "main"
    source = {
        "revision": revision,
        "trust_remote_code": False,
        "local_files_only": not folder.is_dir() and out_of_reach(name, revision),
    }
    try:
        read = AutoConfig.from_pretrained(name, **source)
        for key, value in overrides.items():
            setattr(read, key, value)
        return AutoModelForCausalLM.from_pretrained(name, config=read, use_safetensors=True, **{**options, **source})
    except OSError as error:
        if folder.is_dir():
            raise ValueError(
                f"model {name!r}: cannot be read ({_first(error)}); the weights must be safetensors, since others may run code "
                "when they are read: convert them with `model.save_pretrained(folder)`"
            ) from error
        raise ValueError(
            f"model {name!r}: is no folder here, and the Hugging Face hub did not give it ({_first(error)}). Without a network "
            "give the path of a folder with config.json and *.safetensors, as ./my-model"
        ) from error
    except (ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"model {name!r}: cannot be built as a causal language model ({_first(error)})") from error


def _first(error: Exception) -> str:
    """The first line of what transformers says, which is long."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
