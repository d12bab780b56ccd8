"""The decoder of a GPU: steps of one shape on one memory, each captured once and then replayed.

A step of a decoder with few rows consists of many small kernels. Starting them from Python takes longer than the kernels
themselves. A CUDA graph starts all of them at once, if each step runs the same kernels on the same memory. So all keys and
values stay in a static cache (`lightning_align.models.static_cache`), and the column of each row is a tensor. Rows are read in
buckets: the number of rows is rounded up to a power of 2, and the number of columns to a multiple of `WIDTH`. Each bucket is
captured when it is first needed.

On a CPU this brings nothing: there, reading only the columns that are filled is faster.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_align.generation.capture import Captures
from lightning_align.generation.casting import fixed_head
from lightning_align.generation.prefix import Prefix
from lightning_align.models.language_model import Head, HiddenModel, context_length
from lightning_align.runtime.transfer import to_device

WIDTH = 256
"""The number of columns of a bucket is a multiple of this."""
MOST_BUCKETS = 256
"""The largest number of buckets that are compiled."""


def bucket(number: int) -> int:
    """Round a number of rows up to a power of 2."""
    return 1 << (number - 1).bit_length()


def columns_for(number: int) -> int:
    """Round a number of columns up to a multiple of `WIDTH`."""
    return -(-number // WIDTH) * WIDTH


class StaticDecoder:
    """Decoder with a static cache. See `Decoder` for the methods.

    The prompts are padded on the right, where causality alone hides the pads. The logits that `step` returns are overwritten
    by the next step.

    Args:
        model: A model whose caches have a static form.
        prompts: The token ids of each prompt. No prompt may be empty.
        limit: The maximum number of tokens to append to a row.
        copies: The number of rows per prompt.
        device: The device of the model.
        prefix: What all prompts begin with, if the model has read it already.
        wrap: What makes another function of the step, such as a compiled one. Default compiles the step if the model is
            compiled.
    """

    def __init__(
        self,
        model: HiddenModel,
        prompts: list[list[int]],
        *,
        limit: int,
        copies: int,
        device: torch.device,
        prefix: Prefix | None = None,
        wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None = None,
    ) -> None:
        self.model, self.device, self.prompts, self.copies, self.prefix = model, device, prompts, copies, prefix
        self.head: Head = fixed_head(model) or model.head
        self.context = context_length(model)
        self.lengths: list[int] = []
        """The number of tokens of each row, on the host. These are also `columns` on the device."""
        self.rows, self.width = bucket(len(prompts) * copies), columns_for(max(map(len, prompts)) + limit)
        self.cache: Any = None
        self.tokens = torch.zeros(self.rows, dtype=torch.long, device=device)
        self.columns = torch.zeros(self.rows, dtype=torch.long, device=device)
        self.range = torch.arange(self.width, device=device)
        self.captures = Captures(device)
        self._run = (wrap or self._compiled)(self._logits)

    def _compiled(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Compile a step if the layers of the model are compiled."""
        backend = getattr(self.model, "compile_backend", None)
        if backend is None:
            return step
        compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)

        def run(*args: Any) -> Tensor:
            with torch._dynamo.config.patch(recompile_limit=MOST_BUCKETS):
                return compiled(*args)

        return run

    def start(self, copies: int) -> Tensor:
        """Read the prompts."""
        assert copies == self.copies
        return self._read(self.prompts, copies)

    def _read(self, prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        """Read prompts with a usual cache, append `copies` rows of each, and return the logits after them."""
        width, first = max(map(len, prompts)), len(self.lengths)
        past = 0 if self.prefix is None else len(self.prefix.tokens)
        tokens = to_device([[*prompt[past:], *[0] * (width - len(prompt))] for prompt in prompts], self.device)
        lengths = to_device([len(prompt) for prompt in prompts], self.device)
        places = torch.arange(width, device=self.device)
        mask = None
        if getattr(self.model, "needs_mask", False) and len(set(map(len, prompts))) > 1:
            mask = places < lengths[:, None]
        if self.prefix is None:
            cache = self.model.make_cache(len(prompts), width)
        else:
            cache = self.prefix.repeat(torch.zeros(len(prompts), dtype=torch.long, device=self.device), width)
        hidden = self.model.hidden(tokens, mask=mask, positions=places[past:], cache=cache)
        last = hidden[torch.arange(len(prompts), device=self.device), lengths - 1 - past]
        if self.cache is None:
            self.cache = cache.static(self.rows, self.width)
        self.cache.insert(cache, first, copies)
        self.lengths += [len(prompt) for prompt in prompts for _ in range(copies)]
        self.columns[first : len(self.lengths)] = lengths.repeat_interleave(copies, output_size=len(prompts) * copies)
        logits = self.head.logits(last)
        return logits.repeat_interleave(copies, dim=0, output_size=len(logits) * copies)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row."""
        count = len(tokens)
        rows, width = bucket(count), min(columns_for(max(self.lengths) + 1), self.width)
        self.tokens[:count] = tokens
        prepare = getattr(self.cache, "prepare", None)
        if prepare is not None and prepare(self.lengths):
            logits = self._prepared(rows, width)()
        else:
            logits = self.captures.run((rows, width), lambda: self._prepared(rows, width))
        # An ended row may stay in the batch until others finish. It then overwrites its last column, and nobody reads that.
        most = min(self.width, self.context or self.width) - 1
        self.columns[:count].add_(1).clamp_(max=most)
        self.lengths = [min(length + 1, most) for length in self.lengths]
        return logits[:count]

    def _prepared(self, rows: int, width: int) -> Callable[[], Tensor]:
        """Return a step of a bucket, which has no arguments: all it reads is in the same memory each time."""
        tokens, columns, places = self.tokens[:rows], self.columns[:rows], self.range[:width]
        cache, run = self.cache.step(columns, width), self._run
        return lambda: run(tokens, columns, places, cache)

    def _logits(self, tokens: Tensor, columns: Tensor, places: Tensor, cache: Any) -> Tensor:
        mask = (places <= columns[:, None])[:, None, None]
        hidden = self.model.hidden(tokens[:, None], mask=mask, positions=columns[:, None], cache=cache)
        return self.head.logits(hidden[:, -1])

    def select(self, rows: Sequence[int]) -> bool:
        """Move the rows to the front, in the same memory."""
        kept, count = to_device(list(rows), self.device), len(rows)
        self.cache.select(kept, max(self.lengths))
        self.columns[:count] = self.columns.index_select(0, kept)
        self.columns[count:] = 0  # these rows run along up to the end of the bucket, in column 0
        self.lengths = [self.lengths[row] for row in rows]
        return True

    rewinds = False

    def ahead(self, tokens: Tensor) -> Tensor:
        """Not possible: a captured step has one token per row."""
        raise AssertionError("it does not rewind")

    def rewind(self, count: int) -> None:
        """Not possible either."""
        raise AssertionError("it does not rewind")

    @property
    def joins(self) -> bool:
        """Always."""
        return True

    def join(self, prompts: list[list[int]], *, limit: int, copies: int) -> Tensor:
        """Read more prompts into free rows."""
        rows = bucket(len(self.lengths) + len(prompts) * copies)
        width = columns_for(max(map(len, prompts)) + limit)  # the other rows got their columns when they were read
        if rows > self.rows or width > self.width:
            self._resize(max(rows, self.rows), max(width, self.width))
        return self._read(prompts, copies)

    def _resize(self, rows: int, width: int) -> None:
        self.captures = Captures(self.device)  # the graphs read the old memory
        self.cache.resize(rows, width)
        columns = self.columns
        self.rows, self.width = rows, width
        self.tokens = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.columns = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.columns[: len(columns)] = columns
        self.range = torch.arange(width, device=self.device)
