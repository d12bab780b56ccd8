"""The documents of a batch without their padding, for models of transformers.

Their layers ask for an attention function by name. Under the name `NAME` they get one that computes documents without padding
(`lightning_align.models.varlen`), if the call has them, and ``sdpa`` otherwise. Whether a model then computes each document as
if it were alone is found out by computing a few.
"""

import math
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_align.models.attention import Attend, attention_dtype
from lightning_align.models.documents import probe_documents
from lightning_align.models.parallelize import uncompiled
from lightning_align.models.sdpa import attend_in_float32, in_float32
from lightning_align.models.unpadded import Unpadded
from lightning_align.models.varlen import Segments, choose_kernel

NAME = "lightning_align"
UNKNOWN = ("softcap", "s_aux", "position_bias")
"""Arguments of attention that the kernels do not have."""
WINDOWS = ("sliding_window", "attention_chunk_size")
"""The configuration fields with the number of keys that a query of some layers attends to."""


class UnpaddedDecoder(nn.Module):
    """What a model of transformers computes without padding. `PretrainedLM` inherits it."""

    model: Any
    compile_backend: str | None
    _unpadded_exact: bool | None = None
    """Whether documents are exact without padding. None before it is known."""
    _fast_attention: bool = False
    """Whether `use_fast_attention` has chosen."""

    def longest_unpadded(self, device: torch.device) -> float | None:
        """Return the length of the longest document that `unpadded_hidden` computes, or None if it should not be used.

        The first call changes the attention of the model, computes a few documents, and logs which way is taken.

        Args:
            device: The device of the tokens.
        """
        if self._unpadded_exact is None:
            fault = self._use()
            self._unpadded_exact = fault is None
            name = type(self.model).__name__
            if fault is None:
                rank_zero_info(f"{name}: Rows are computed without their padding.")
            else:
                rank_zero_info(f"{name}: Rows are computed with their padding, because {fault}.")
        if not self._unpadded_exact or (self.compile_backend is not None and self._kernel(device, 64) == "groups"):
            return None
        text = self.model.config.get_text_config(decoder=True)
        sizes = [size for field in WINDOWS if isinstance(size := getattr(text, field, None), int)]
        return min(sizes, default=math.inf)

    def unpadded_hidden(self, unpadded: Unpadded) -> Tensor:
        """Compute the final hidden states (T, D) of documents, each as if it were a row of its own, without padding.

        Args:
            unpadded: The tokens of all documents.
        """
        model: Any = self
        model._check_loaded()
        tokens, positions = unpadded.tokens[None], unpadded.positions[None]
        # A mask of four dimensions is not looked at. Without one, transformers would look for documents in the positions.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
        text = self.model.config.get_text_config(decoder=True)
        dim_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        dropout = self.training and float(getattr(text, "attention_dropout", 0.0) or 0.0) > 0
        dtype = attention_dtype(next(self.parameters()))
        documents = _Documents(unpadded, dtype=dtype, dim_head=dim_head, dropout=dropout)
        out = model.decoder(
            input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False, unpadded_documents=documents
        )
        hidden: Tensor = out.last_hidden_state.squeeze(0)
        return hidden if model._scale in (None, 1.0) else hidden * model._scale

    def _kernel(self, device: torch.device, dim_head: int) -> str:
        weight = next(self.parameters())
        return choose_kernel(device, attention_dtype(weight), dim_head, dropout=0.0)

    def use_fast_attention(self, device: torch.device) -> None:
        """Give the model attention in float32 under autocast on a CPU; see `in_float32`.

        Args:
            device: The device of the tokens.
        """
        if device.type != "cpu" or not torch.is_autocast_enabled("cpu") or self._fast_attention:
            return
        self._fast_attention = True
        if {config._attn_implementation for config in self._configs()} == {"sdpa"}:
            _register()
            for config in self._configs():
                config._attn_implementation = NAME

    def _use(self) -> str | None:
        """Give the model the attention of documents. Return why it cannot be used, and then restore its own."""
        before = {id(config): config._attn_implementation for config in self._configs()}
        if not set(before.values()) <= {"sdpa", NAME}:
            return f"its attention is {', '.join(map(str, sorted(set(before.values()), key=str)))} and not sdpa"
        if getattr(self, "_scale", None) is None:
            return "its logits are not computed from hidden states alone"
        _register()
        for config in self._configs():
            config._attn_implementation = NAME
        with uncompiled(self):
            fault = probe_documents(self, self._probed)
        if fault is not None:
            for config in self._configs():
                config._attn_implementation = before[id(config)]
        return fault

    def _configs(self) -> list[Any]:
        found = {id(part.config): part.config for part in self.model.modules() if hasattr(part, "config")}
        return [config for config in found.values() if hasattr(config, "_attn_implementation")]

    def _probed(self, tokens: Tensor, documents: Tensor) -> Tensor:
        lengths = documents[documents >= 0].bincount().tolist()
        unpadded = Unpadded.of(tokens, documents >= 0, Segments.of_lengths(lengths, tokens.device))
        return unpadded.padded(self.unpadded_hidden(unpadded))


class _Documents:
    """The documents of one forward pass, and their attention, which layers share."""

    def __init__(self, unpadded: Unpadded, *, dtype: torch.dtype, dim_head: int, dropout: bool) -> None:
        """Prepare the attention before the layers run, because they may be compiled.

        Args:
            unpadded: The documents.
            dtype: The dtype of queries that the layers are expected to have.
            dim_head: The width of their heads.
            dropout: Whether they have dropout.
        """
        self.unpadded, self.expected = unpadded, (dtype, dim_head, dropout)
        self.shared = self._make(*self.expected)

    def _make(self, dtype: torch.dtype, dim_head: int, dropout: bool) -> Attend:
        kernel = choose_kernel(self.unpadded.tokens.device, dtype, dim_head, dropout=float(dropout))
        return self.unpadded.attention(kernel)

    def attention(self, like: Tensor, dropout: float) -> Attend:
        """Return the attention for queries like given ones (..., K)."""
        kind = attention_dtype(like) if like.dtype is torch.float32 else like.dtype, like.shape[-1], dropout > 0
        return self.shared if kind == self.expected else self._make(*kind)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        unpadded_documents: _Documents | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if unpadded_documents is None:

            def attend_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
                out: Tensor = sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling, **options)[0]
                return out

            if in_float32(query):
                return attend_in_float32(query, key, value, attention_mask, attend_padded), None
            return attend_padded(query, key, value, attention_mask), None
        given = [name for name in UNKNOWN if options.get(name) is not None]
        if given or key.shape[-1] != value.shape[-1] or options.get("is_causal") is False:
            raise NotImplementedError(
                f"attention with {', '.join(given) or 'values of another width than keys, or not causal'}"
            )
        attend = unpadded_documents.attention(query, dropout)
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        return attend(q, k, v, scale=scale, dropout=dropout).unsqueeze(0), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
