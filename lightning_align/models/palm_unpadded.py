"""The documents of a batch without their padding, for PaLM."""

import math

import torch
from torch import Tensor, nn

from lightning_align.models.attention import Attend, attention_dtype
from lightning_align.models.unpadded import Unpadded
from lightning_align.models.varlen import Kernel, Segments, choose_kernel


class WithoutPadding(nn.Module):
    """What PaLM computes without padding, by its layers on packed tokens (T, D)."""

    causal: bool
    dim_head: int
    compile_backend: str | None
    token_emb: nn.Embedding
    blocks: nn.ModuleList

    def _packed(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Compute the (T, D) hidden states of (T,) tokens at (T,) positions."""
        raise AssertionError("defined by PaLM")

    def longest_unpadded(self, device: torch.device) -> float | None:
        """Return the length of the longest document that `unpadded_hidden` computes. None if it should not be used.

        With groups of documents, whose shapes differ from batch to batch, compiled layers would be compiled for each batch.

        Args:
            device: The device of the tokens.
        """
        grouped = self.compile_backend is not None and self._kernel(device) == "groups"
        return math.inf if self.causal and not grouped else None

    def unpadded_hidden(self, unpadded: Unpadded) -> Tensor:
        """Compute the final hidden states (T, D) of documents, each as if it were a row of its own, without padding.

        Args:
            unpadded: The tokens of all documents.
        """
        return self._unpadded(unpadded)

    def _unpadded(self, unpadded: Unpadded) -> Tensor:
        return self._packed(unpadded.tokens, unpadded.positions, unpadded.attention(self._kernel(unpadded.tokens.device)))

    def _kernel(self, device: torch.device) -> Kernel:
        dropout = max(float(getattr(block, "attn_dropout", 0.0)) for block in self.blocks) if self.training else 0.0
        return choose_kernel(device, attention_dtype(self.token_emb.weight), self.dim_head, dropout=dropout)

    def _document_hidden(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """Compute the (B, N, D) hidden states of documents on a CPU, without the padding between them."""
        mask = documents >= 0
        lengths = documents[mask].unique_consecutive(return_counts=True)[1].tolist()
        unpadded = Unpadded.of(tokens, mask, Segments.of_lengths(lengths, tokens.device))
        # Not `unpadded_hidden`: under FSDP2, a forward method within another one would shard the weights at its end.
        return unpadded.padded(self._unpadded(unpadded))
