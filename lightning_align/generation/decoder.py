"""Decoders of a batch of rows: with a key-value cache, or with a full forward pass per token."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_align.generation.casting import fixed_head
from lightning_align.generation.packing import few_columns, pack
from lightning_align.generation.prefix import Prefix
from lightning_align.generation.static import StaticDecoder
from lightning_align.models.language_model import Head, HiddenModel, context_length, has_cache, logits_of
from lightning_align.runtime.ranks import is_sharded
from lightning_align.runtime.transfer import to_device

STATIC = ("cuda",)
"""The types of devices whose steps have a fixed shape."""


class Decoder(Protocol):
    """A batch of rows that grow by one token per step."""

    def start(self, copies: int) -> Tensor:
        """Read the prompts, make `copies` rows of each, and return the logits (B * copies, V) after them."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token (B,) to each row and return the logits (B, V) after it."""
        ...

    @property
    def rewinds(self) -> bool:
        """Whether `ahead` and `rewind` are possible."""
        ...

    def ahead(self, tokens: Tensor) -> Tensor:
        """Append tokens (N,) to the only row and return the logits (N, V) after each of them."""
        ...

    def rewind(self, count: int) -> None:
        """Remove the last tokens of the only row."""
        ...

    def select(self, rows: Sequence[int]) -> bool:
        """Keep only these rows, in this order. Return False if the decoder cannot drop rows."""
        ...

    @property
    def joins(self) -> bool:
        """Whether `join` is possible."""
        ...

    def join(self, prompts: list[list[int]], *, limit: int, copies: int) -> Tensor:
        """Read more prompts, append `copies` rows of each, and return the logits (B' * copies, V) after them.

        Args:
            prompts: The token ids of each prompt.
            limit: The maximum number of tokens to append to any row from now on, old or new.
            copies: The number of rows per prompt.
        """
        ...


def make_decoder(
    model: nn.Module,
    prompts: list[list[int]],
    *,
    limit: int,
    copies: int,
    device: torch.device,
    prefix: Prefix | None = None,
) -> Decoder:
    """Build the fastest decoder that the model supports.

    Args:
        model: Any language model.
        prompts: The token ids of each prompt. No prompt may be empty.
        limit: The maximum number of tokens to append to a prompt.
        copies: The number of rows per prompt.
        device: The device of the model.
        prefix: What all prompts begin with, also those that join later, if the model has read it already.
    """
    if not has_cache(model):
        return _PlainDecoder(model, prompts, limit, device)
    if device.type in STATIC and not is_sharded(model) and callable(getattr(model.make_cache(1, 1), "static", None)):
        return StaticDecoder(model, prompts, limit=limit, copies=copies, device=device, prefix=prefix)
    if prefix is not None:
        return _CachedDecoder(model, prompts, limit, device, prefix=prefix)
    cache = model.make_cache(len(prompts), max(map(len, prompts)) + limit)
    if copies > 1 and not hasattr(cache, "select"):
        # This cache cannot repeat rows, so each copy of a prompt is read separately.
        return _CachedDecoder(model, [p for p in prompts for _ in range(copies)], limit, device, repeated=True)
    return _CachedDecoder(model, prompts, limit, device, cache=cache)


class _CachedDecoder:
    """Decoder with a key-value cache.

    Prompts are padded on the left, so that every row writes the same column of the cache. A mask hides the pads, and the
    positions of each row start at its first token. A row therefore gives the same logits as if it were decoded alone.
    """

    def __init__(
        self,
        model: HiddenModel,
        prompts: list[list[int]],
        limit: int,
        device: torch.device,
        *,
        cache: Any = None,
        repeated: bool = False,
        head: Head | None = None,
        prefix: Prefix | None = None,
    ) -> None:
        self.model, self.device, self.repeated, self.prefix = model, device, repeated, prefix
        self.stop = max(map(len, prompts))
        # The columns after the prefix of the longest prompt are read in every row. So a shorter prompt reads the end of its
        # prefix again, and no row has a gap.
        new = self.stop - (0 if prefix is None else len(prefix.tokens))
        self.prompts = to_device([[0] * (new - len(p)) + p[-new:] for p in prompts], device)
        starts = to_device([self.stop - len(p) for p in prompts], device)[:, None]
        self._lay_out(starts, self.stop + limit, padded=len(set(map(len, prompts))) > 1)
        if prefix is not None:
            self.cache = prefix.repeat(starts[:, 0], self.stop + limit)
        else:
            self.cache = model.make_cache(len(prompts), self.stop + limit) if cache is None else cache
        self.head = fixed_head(model) if head is None else head
        # The weight itself and not its cast: under autocast nothing is packed.
        self.linear = None if self.head is None else pack(self.head.weight, self.head.bias)

    def _lay_out(self, starts: Tensor, width: int, *, padded: bool) -> None:
        """Compute the positions and the mask of all columns from the first column (B, 1) of each row."""
        columns = torch.arange(width, device=self.device)
        # A row at the end of the context stays in the batch until others finish. Its further tokens are not read.
        last = (context_length(self.model) or width) - 1
        self.starts, self.positions = starts, (columns - starts).clamp(min=0, max=last)
        # Without padding no mask is needed: the cache already hides the future.
        self.exists = columns >= starts if padded else None

    def start(self, copies: int) -> Tensor:
        logits = self._forward(self.prompts, self.stop - self.prompts.shape[1])
        if copies == 1 or self.repeated:
            return logits
        rows = torch.arange(len(logits), device=logits.device).repeat_interleave(copies)
        self._select(rows)
        return logits.index_select(0, rows)

    def step(self, tokens: Tensor) -> Tensor:
        self.stop += 1
        return self._forward(tokens[:, None], self.stop - 1)

    def _forward(self, tokens: Tensor, start: int) -> Tensor:
        return self._logits(self._hidden(tokens, start)[:, -1])

    def _hidden(self, tokens: Tensor, start: int) -> Tensor:
        mask = None if self.exists is None else self.exists[:, : self.stop]
        positions = self.positions[:, start : self.stop]
        return self.model.hidden(tokens, mask=mask, positions=positions, cache=self.cache)

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.head or self.model.head
        return head.logits(hidden) if self.linear is None else head.capped(self.linear(hidden))

    @property
    def rewinds(self) -> bool:
        return self.device.type == "cpu" and callable(getattr(self.cache, "rewind", None)) and not is_sharded(self.model)

    def ahead(self, tokens: Tensor) -> Tensor:
        self.stop += len(tokens)
        with few_columns():
            return self._logits(self._hidden(tokens[None], self.stop - len(tokens))[0])

    def rewind(self, count: int) -> None:
        if count:
            self.stop -= count
            self.cache.rewind(count)

    def select(self, rows: Sequence[int]) -> bool:
        return self._select(to_device(list(rows), self.device))

    def _select(self, rows: Tensor) -> bool:
        if not hasattr(self.cache, "select"):
            return False
        self.cache.select(rows)
        self.starts, self.positions = self.starts.index_select(0, rows), self.positions.index_select(0, rows)
        self.exists = None if self.exists is None else self.exists.index_select(0, rows)
        return True

    @property
    def joins(self) -> bool:
        return callable(getattr(self.cache, "join", None)) and hasattr(self.cache, "select")

    def join(self, prompts: list[list[int]], *, limit: int, copies: int) -> Tensor:
        new = _CachedDecoder(self.model, prompts, 0, self.device, head=self.head, prefix=self.prefix)
        new.linear = self.linear  # its weights are packed already
        logits = new.start(copies)
        # All rows end at the same column, so only the longest row needs its first column.
        columns = max(self.stop - int(self.starts.min()), new.stop)
        self.cache.join(new.cache, columns=columns, capacity=columns + limit)
        starts = torch.cat((self.starts + (columns - self.stop), new.starts + (columns - new.stop)))
        self.stop = columns
        self._lay_out(starts, columns + limit, padded=bool(starts.any()))
        return logits


class _PlainDecoder:
    """Decoder without a cache. Rows are padded on the right, and each step reads all of their tokens again."""

    def __init__(self, model: nn.Module, prompts: list[list[int]], limit: int, device: torch.device) -> None:
        self.model, self.device, self.width = model, device, max(map(len, prompts))
        # At most the context length. A full row stays in the batch until others finish, and its further tokens are not read.
        self.most = min(self.width + limit, context_length(model) or self.width + limit)
        self.tokens = torch.zeros(len(prompts), self.most, dtype=torch.long, device=device)
        for row, prompt in zip(self.tokens, prompts, strict=True):
            row[: len(prompt)] = to_device(prompt, device)
        self.places = to_device([len(prompt) for prompt in prompts], device)

    def start(self, copies: int) -> Tensor:
        logits = self._forward()
        if copies == 1:
            return logits
        rows = torch.arange(len(logits), device=logits.device).repeat_interleave(copies)
        self._select(rows)
        return logits.index_select(0, rows)

    def step(self, tokens: Tensor) -> Tensor:
        self.tokens.scatter_(1, self.places.clamp(max=self.most - 1)[:, None], tokens[:, None])
        self.places, self.width = (self.places + 1).clamp(max=self.most), min(self.width + 1, self.most)
        return self._forward()

    rewinds = False

    def ahead(self, tokens: Tensor) -> Tensor:
        raise AssertionError("it does not rewind")

    def rewind(self, count: int) -> None:
        raise AssertionError("it does not rewind")

    def _forward(self) -> Tensor:
        logits = logits_of(self.model, self.tokens[:, : self.width])
        return logits[torch.arange(len(logits), device=logits.device), self.places - 1]

    def select(self, rows: Sequence[int]) -> bool:
        self._select(to_device(list(rows), self.device))
        return True

    def _select(self, rows: Tensor) -> None:
        self.tokens, self.places = self.tokens.index_select(0, rows), self.places.index_select(0, rows)

    @property
    def joins(self) -> bool:
        return True

    def join(self, prompts: list[list[int]], *, limit: int, copies: int) -> Tensor:
        new = _PlainDecoder(self.model, prompts, 0, self.device)
        logits = new.start(copies)
        self.width = max(int(self.places.max()), new.width)
        self.most = min(self.width + limit, context_length(self.model) or self.width + limit)
        # A negative padding removes columns that no row needs any more.
        old, added = (F.pad(tokens, (0, self.most - tokens.shape[1])) for tokens in (self.tokens, new.tokens))
        self.tokens, self.places = torch.cat((old, added)), torch.cat((self.places, new.places))
        return logits
