"""Causal language models of transformers, with the optional capabilities of a language model. Needs the extra `hf`."""

import importlib.util
import inspect
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_align.models.causality import check_causal
from lightning_align.models.deferred import CannotDefer, is_deferring
from lightning_align.models.documents import document_positions
from lightning_align.models.embeddings import check_new_rows_train, with_new_tokens
from lightning_align.models.embeddings import resize_embeddings as resize
from lightning_align.models.head_probe import probe_head
from lightning_align.models.language_model import Head, declared_ends
from lightning_align.models.lora import is_adapted
from lightning_align.models.parallelize import compile_blocks, uncompiled
from lightning_align.models.peft_adapters import TRAINED, AdapterStart, add_peft, peft_disabled, stirred, watch_start
from lightning_align.models.pretrained_cache import PretrainedCache, cache_fault, continuation_fault, has_selectable_layers
from lightning_align.models.pretrained_loading import (
    build_random,
    causal_remedy,
    find_decoder,
    freeze_other_parts,
    is_composite,
    load_pretrained,
)
from lightning_align.models.pretrained_static import StepPretrained, static_form
from lightning_align.models.pretrained_unpadded import UnpaddedDecoder
from lightning_align.models.routers import RouterRecord, find_routers
from lightning_align.runtime.ranks import is_sharded, local

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class PretrainedLM(UnpaddedDecoder):
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
        resize_embeddings: int | None = None,
    ) -> None:
        """Load a model, or build one with random weights.

        Args:
            name: A folder with config.json and safetensors files, a GGUF file, or a name on the Hugging Face hub. Code that
                comes with a model is never run, and pickled weights are never loaded. Quantized weights of a GGUF file are
                dequantized, and train like others.
            config: Without ``name``: a complete configuration with its ``model_type``, for a model with random weights. With
                ``name``: entries that replace those of the model's own configuration.
            dtype: The dtype of the weights. `auto` keeps the dtype of the files. Train in float32 (with
                `precision: bf16-mixed`) or in bfloat16.
            attention: The attention implementation, such as `sdpa`, `eager` or `flash_attention_2`. By default transformers
                chooses it.
            revision: The branch, tag or commit on the hub.
            gradient_checkpointing: Whether to recompute activations in the backward pass, which saves memory.
            compile: The backend of `torch.compile` for the layers, such as `inductor`. By default the layers are not compiled.
                Decoding is compiled only on CUDA. Do not use it within CALM or RETRO, which read between layers.
            adapter: PEFT adapters (LoRA, DoRA, ...): a folder with trained adapters, or a configuration for new ones, such as
                `{r: 8, use_dora: true}`. Only the adapters train. With new adapters, the model with its adapters switched off
                can be the reference, which needs no extra memory.
            eos_token_id: The ids that end a response. Default is those in the generation settings of the model, which list
                several for most instruct models. A model with random weights has only those that `config` gives.
            resize_embeddings: The vocabulary size, for a tokenizer with more tokens than the model. The rows of new tokens
                start at the mean of the others. Beside new LoRA adapters they train too.

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
        load_error: str | None = None
        if is_deferring() and (adapter is not None or resize_embeddings is not None):
            raise CannotDefer("new adapters and new embeddings may start from the weights")
        options = {"dtype": dtype, "attn_implementation": attention}
        if name is None:
            self.model: Any = build_random(config, options)
        else:
            try:
                self.model = load_pretrained(name, config, {**options, "revision": revision})
            except ValueError as error:
                if not complete:
                    raise
                # A complete configuration with a name comes from a checkpoint. Its folder may be gone, but the checkpoint
                # contains the weights, which are loaded after this.
                load_error = str(error)
                self.model = build_random(config, options)
        described = json.loads(self.model.config.to_json_string(use_diff=True))
        self.num_new_tokens = 0 if resize_embeddings is None else resize(self.model, resize_embeddings)
        """The number of tokens that `resize_embeddings` added."""
        self.composite = is_composite(self.model)
        """Whether the text model is one of several parts. The others, such as a vision tower, are frozen."""
        if self.composite:
            freeze_other_parts(self.model, self.decoder)
        self.start: AdapterStart | None = None
        """How new adapters begin. None without adapters, and for trained ones: their training began from another model."""
        described_adapter: dict[str, Any] | None = None
        if isinstance(adapter, dict) and not adapter.get(TRAINED):
            with watch_start(self.model) as found:
                described_adapter = add_peft(self.model, with_new_tokens(self.model, adapter, self.num_new_tokens))
            (self.start,) = found
            check_new_rows_train(self.model, self.num_new_tokens)
        elif adapter is not None:
            described_adapter = add_peft(self.model, adapter)
        self.adapters_off = peft_disabled if self.start is not None and self.start.off_is_base else None
        """A context manager that switches new adapters off, or None if the model is then not the base model."""
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
        self.routers = find_routers(self.model)
        """The expert routers, or None if the model has none."""
        self.router_record: RouterRecord | None = None
        """Where the next forward passes with gradients record their router logits; see `recording_routers`."""
        self.init_args: dict[str, Any] = {
            "name": name,
            # Complete, so that a checkpoint can rebuild the model when the folder is gone.
            "config": {"model_type": self.config.model_type, **described},
            "dtype": dtype,
            "attention": attention,
            "revision": revision,
            "gradient_checkpointing": gradient_checkpointing,
            "eos_token_id": list(self.eos_ids),
            "resize_embeddings": resize_embeddings,
            "adapter": described_adapter,  # not the folder, because a checkpoint contains the weights
        }
        self.model.eval()
        self._cache_checked: bool | None = None
        self.awaits_probe = is_deferring()
        """Whether `probe_head` and `check_causal` are still to be called, when the weights are there."""
        self._scale: float | None = 1.0
        self._softcap: float | None = None
        if not self.awaits_probe:
            self._probe()
        self.compile_backend: str | None = None
        self.known_causal = False
        check_causal(self, remedy=causal_remedy(self.config))
        if self.start is not None:
            with stirred(self.model):
                check_causal(self, remedy="Use another kind of adapter: this one mixes tokens, once its values are not 0.")
        self.known_causal = not self.awaits_probe
        """That `check_causal` need not be repeated."""
        self._load_error = load_error
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

    def forward(self, tokens: Tensor, *, documents: Tensor | None = None) -> Tensor:
        """Compute the logits (B, N, V) of tokens (B, N). Padding, if any, is on the right. For ``documents`` see `hidden`."""
        self._check_loaded()
        if self.composite and self._scale is not None:
            hidden = self.hidden(tokens, documents=documents)
            return Head(hidden, None, self._softcap).capped(self.model.get_output_embeddings()(hidden))
        record = self.router_record if torch.is_grad_enabled() else None
        options: dict[str, Any] = {} if record is None else {"output_router_logits": True}
        ids = tokens
        if documents is not None:
            ids, options["position_ids"] = self._document_inputs(tokens, documents)
        out = self.model(input_ids=ids, use_cache=False, **options)
        if record is not None:
            record.add(out.router_logits, None)
        logits: Tensor = out.logits.view(*tokens.shape, -1)
        return logits

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: PretrainedCache | StepPretrained | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Compute the final hidden states. `head` turns them into logits.

        Args:
            tokens: (B, N) int64 token ids. With a cache, these are the tokens that follow the cached ones.
            mask: (B, M) bool, true at real tokens. M is the number of cached and new columns. None if there is no padding, or
                if it is on the right. (B, 1, N, M) is used as it is.
            positions: (N,) or (B, N) int64 positions. By default they are counted from the first column.
            cache: A cache from `make_cache`. It is extended in place.
            documents: (B, N) int64 numbers of documents, as in a `TokenBatch`. Each document is computed as if it were a row of
                its own, if the model can do that (`packing_problem`). It takes the place of the other arguments.

        Returns:
            (B, N, D) hidden states, multiplied by the scale of the logits if there is one.
        """
        self._check_loaded()
        shape = tokens.shape
        if documents is not None:
            tokens, positions = self._document_inputs(tokens, documents)
        if positions is not None and positions.ndim == 1:
            positions = positions.expand(len(tokens), -1)
        options: dict[str, Any] = {"position_ids": positions, "use_cache": False}
        if cache is not None:
            options |= {"past_key_values": cache.past, "use_cache": True}
        record = self.router_record if torch.is_grad_enabled() else None
        if record is not None:
            options["output_router_logits"] = True
        self.use_fast_attention(tokens.device)
        with nullcontext() if cache is None else uncompiled(self):
            out = self.decoder(input_ids=tokens, attention_mask=mask, **options)
        if record is not None:
            record.add(out.router_logits, None if cache is not None else mask)
        if cache is not None:
            cache.advance(tokens.shape[1])
        hidden: Tensor = out.last_hidden_state.view(*shape, -1)
        return hidden if self._scale in (None, 1.0) else hidden * self._scale

    def _document_inputs(self, tokens: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens and positions of documents. Without a mask, transformers splits a row where positions restart."""
        positions = document_positions(documents)
        if str(self.config._attn_implementation).startswith("flash"):
            return tokens.reshape(1, -1), positions.reshape(1, -1)  # flash attention finds documents only in a single row
        return tokens, positions

    @property
    def head(self) -> Head | None:
        """The output layer. None if the logits are computed in another way, or if it has adapters that are not merged."""
        if self._scale is None:
            return None
        layer = self.model.get_output_embeddings()
        if is_adapted(layer):
            return None
        return Head(local(layer.weight), None if layer.bias is None else local(layer.bias), self._softcap)

    @property
    def decoder(self) -> Any:
        """The model without its output layer. Of a model of images and text, only the text model."""
        return find_decoder(self.model)

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

    @property
    def make_cache(self) -> "Callable[[int, int], PretrainedCache] | None":
        """A function that creates an empty key-value cache for B rows and S columns. None if the cache cannot be used.

        Without a cache, decoding computes the rows again at each step, which is slower but correct. This is so for models
        whose cache holds more than keys and values per column, and for those whose logits with the cache are not those without
        it. Both are found out when a cache is first wanted, by reading a few tokens.
        """
        if self._cache_checked is None and self._load_error is None:
            self._cache_checked = self._check_cache()
        return self.new_cache if self._cache_checked else None

    def new_cache(self, batch: int = 1, length: int = 0) -> PretrainedCache:
        """Create an empty key-value cache.

        The cache of transformers grows by itself, so the arguments are not used.

        Args:
            batch: The number of rows B.
            length: The number of columns S.
        """
        from transformers import DynamicCache

        past = DynamicCache(config=self.config)
        return PretrainedCache(past, static=partial(static_form, self), extends=lambda: continuation_fault(self) is None)

    def _check_cache(self) -> bool:
        """Return whether rows can be decoded with a cache."""
        if "past_key_values" not in inspect.signature(self.decoder.forward).parameters or self._scale is None:
            return False
        if not has_selectable_layers(self.config):
            return False
        if is_sharded(self):
            return True  # the ranks might find different rounding, and would then wait for each other
        fault = cache_fault(self)
        if fault is not None:
            rank_zero_info(
                f"{type(self.model).__name__}: Decoding does not use the key-value cache, so each token takes more time. With "
                f"it, rows of different lengths are not decoded as they are without it ({fault})."
            )
        return fault is None

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are those of the folder or of a checkpoint, and not random because the folder is gone."""
        return self._load_error is None

    def without_adapters(self) -> "PretrainedLM | None":
        """Load the base model of new adapters again, or return None if its weights are only in this model."""
        if self.init_args["name"] is None or self._load_error is not None:
            return None
        base = PretrainedLM(**{**self.init_args, "adapter": None})
        return base if base.is_loaded else None

    def _probe(self) -> float | None:
        """Find out how logits come from hidden states, also after the weights were changed. Return the factor."""
        self._scale, self._softcap = probe_head(self)
        return self._scale

    def take_probe(self, found: tuple[float | None, float | None]) -> None:
        """Take what `probe_head` has found on the first rank of a sharded run."""
        self._scale, self._softcap = found
        self.awaits_probe = False

    def _check_loaded(self) -> None:
        if self._load_error is not None:
            raise ValueError(f"{self._load_error} No checkpoint has been loaded since then, so the model has no weights.")


def _clear_load_error(module: nn.Module, _: Any) -> None:
    assert isinstance(module, PretrainedLM)
    module._load_error = None
