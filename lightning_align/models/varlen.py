"""Attention over documents of different lengths that stand one after the other, without padding between them.

Three kernels compute the same numbers:

- ``varlen``: `torch.nn.attention.varlen.varlen_attn`, which is flash attention, on CUDA in 16 bits.
- ``flex``: FlexAttention with a block mask of the documents, on CUDA and XPU in other dtypes.
- ``groups``: ``scaled_dot_product_attention`` on any device. Documents of similar length are padded to one length, for
  attention alone. It is the only one that has dropout.

Shapes: ``R`` documents, ``T`` tokens of all of them, ``H`` heads of queries, ``G`` heads of keys and values, width ``K``.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_align.models.sdpa import dot_product_attention
from lightning_align.runtime.transfer import to_device
from lightning_align.runtime.untraced import untraced

Kernel = Literal["varlen", "flex", "groups"]
SIMILAR = 0.7
"""Documents are padded together if they have at least this share of the tokens of the longest."""
BLOCK = 128
"""The number of queries and of keys of a block of the block mask."""
STEP = 128
"""The bound of the lengths is rounded up to a multiple of this, so that a compiled graph fits more batches."""
WIDEST = 256
"""The widest head of flash attention."""


@dataclass
class Segments:
    """The documents of a sequence of T tokens.

    Args:
        lengths: The number of tokens of each document, on the host. It may be 0.
        starts: (R + 1,) int32 index of the first token of each document, and T, on the device of the tokens.
    """

    lengths: Sequence[int]
    starts: Tensor

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device) -> "Segments":
        """Compute the starts on the host and copy them without waiting for the device.

        Args:
            lengths: The number of tokens of each document.
            device: The device of the tokens.
        """
        return cls(list(lengths), to_device(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32), device))

    @property
    def total(self) -> int:
        """The number of tokens T."""
        return sum(self.lengths)

    def spread(self, values: Tensor) -> Tensor:
        """Repeat the value of each document for each of its tokens: (R,) -> (T,). Does not wait for the device."""
        return values.repeat_interleave(self.starts.diff(), output_size=self.total)


def choose_kernel(device: torch.device, dtype: torch.dtype, dim_head: int, *, dropout: float) -> Kernel:
    """Return the fastest kernel that computes attention on a device.

    Args:
        device: The device of the queries.
        dtype: The dtype of the products of queries and keys.
        dim_head: The head width K.
        dropout: The dropout probability.
    """
    if dropout or device.type not in ("cuda", "xpu") or not torch.accelerator.is_available():
        return "groups"
    flash = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and dim_head % 8 == 0 and dim_head <= WIDEST
    if flash and _works("varlen", device, dtype, dim_head):
        return "varlen"
    return "flex" if dtype is not torch.float64 and _works("flex", device, dtype, dim_head) else "groups"


@cache
def _works(kernel: Kernel, device: torch.device, dtype: torch.dtype, dim_head: int) -> bool:
    """Find out by a small call, with gradients, whether this torch has a kernel for a device."""
    try:
        # The first call may come from a validation, which has no gradients.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            x = torch.zeros(3, 1, dim_head, device=device, dtype=dtype, requires_grad=True)
            documents = Segments.of_lengths([1, 2], device)
            attend = VarlenAttention(documents, documents, causal=True, kernel=kernel)
            attend(x, x, x, scale=1.0, dropout=0.0).sum().backward()
    except Exception:  # compilers and kernels raise many types here
        return False
    return True


Flash = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, bool, float], Tensor]
"""(q, k, v, starts of queries, starts of keys, longest of queries, longest of keys, causal, scale) -> output."""


def flash_function() -> Flash:
    """Return `varlen_attn` of this torch, called by its own signature, which has changed between releases.

    Raises:
        ImportError: If this torch has none.
    """
    from torch.nn.attention import varlen

    return _adapted(varlen.varlen_attn)


@cache
def _adapted(function: Callable[..., Any]) -> Flash:
    known = inspect.signature(function).parameters
    has_causal, has_scale, has_heads = (name in known for name in ("is_causal", "scale", "enable_gqa"))

    def flash(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts_q: Tensor,
        starts_k: Tensor,
        longest_q: int,
        longest_k: int,
        causal: bool,
        scale: float,
    ) -> Tensor:
        options: dict[str, Any] = {"is_causal": causal} if has_causal else {"window_size": (-1, 0 if causal else -1)}
        if has_scale:
            options["scale"] = scale
        else:
            q = q * (scale * q.shape[-1] ** 0.5)
        if has_heads:
            options["enable_gqa"] = k.shape[1] != q.shape[1]
        else:
            k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
        out: Tensor = function(q, k, v, starts_q, starts_k, longest_q, longest_k, **options)
        return out

    return flash


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Repeat the heads of keys or values for those of the queries: (T, G, K) -> (T, H, K)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


@dataclass
class VarlenAttention:
    """Attention of documents to documents: queries of the r-th document see the keys of the r-th.

    It is an `Attend`: ``k`` and ``v`` may also be (T, K), with one head. Queries whose document has no keys get 0.

    Args:
        queries: The documents of the queries.
        keys: The documents of the keys, as many as of the queries.
        causal: Whether to hide later tokens from each token. The queries of a document are then its last tokens.
        kernel: What computes it, from `choose_kernel`.
    """

    queries: Segments
    keys: Segments
    causal: bool
    kernel: Kernel
    _chosen: Tensor | None = field(default=None, init=False)
    _plan: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Prepare what all layers share.

        Raises:
            ValueError: If the documents of queries and keys do not fit.
        """
        lengths_q, lengths_k = self.queries.lengths, self.keys.lengths
        shorter = self.causal and any(k < q for q, k in zip(lengths_q, lengths_k, strict=False))
        if len(lengths_q) != len(lengths_k) or shorter:
            raise ValueError(
                f"`keys` must have as many documents as `queries`, {len(lengths_q)}, and none shorter than its queries if "
                f"`causal`, but has {len(lengths_k)}{', some shorter' if shorter else ''}. Pass the same `Segments` for both."
            )
        device = self.queries.starts.device
        if any(q and not k for q, k in zip(lengths_q, lengths_k, strict=True)):
            # A softmax over nothing is NaN. These queries are left out.
            seen = np.asarray(lengths_k) > 0
            self._chosen = to_device(np.flatnonzero(np.repeat(seen, lengths_q)), device)
            self.queries = Segments.of_lengths([q if k else 0 for q, k in zip(lengths_q, lengths_k, strict=True)], device)
        self._empty = not self.queries.total  # kept: a graph that looked at the lengths would be compiled for each batch
        self.longest_q, self.longest_k = (_bound(part.lengths) for part in (self.queries, self.keys))
        if self.kernel == "varlen":
            self._plan = flash_function()
        elif self.kernel == "flex":
            self._plan = _block_mask(self.queries, self.keys, causal=self.causal)
        else:
            self._plan = _groups(self.queries.lengths, self.keys.lengths, device, causal=self.causal)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float) -> Tensor:
        """Compute the attention output: (T, H, K), (T', G, K) or (T', K), the same -> (T, H, K).

        Args:
            q: The queries of all documents.
            k: Their keys.
            v: Their values.
            scale: The factor of the products of queries and keys.
            dropout: The dropout probability. It must be 0, except with the kernel ``groups``.
        """
        assert not dropout or self.kernel == "groups"
        if k.ndim == 2:
            k, v = k.unsqueeze(1), v.unsqueeze(1)
        if self._empty:
            return torch.zeros_like(q) + (q[:0].sum() + k[:0].sum() + v[:0].sum())  # DDP wants a gradient of everything
        if self._chosen is not None:
            out = self._mixed(q.index_select(0, self._chosen), k, v, scale, dropout)
            return out.new_zeros(q.shape).index_copy(0, self._chosen, out)
        return self._mixed(q, k, v, scale, dropout)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
        if self.kernel == "groups":
            return _grouped(q, k, v, self._plan, causal=self.causal, scale=scale, dropout=dropout)
        # Autocast does not know these kernels, which need one dtype.
        device = q.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else v.dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if self.kernel == "varlen":
            starts = self.queries.starts, self.keys.starts
            out: Tensor = self._plan(q, k, v, *starts, self.longest_q, self.longest_k, self.causal, scale)
            return out
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = _flex()(q, k, v, block_mask=self._plan, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.squeeze(0).transpose(0, 1)


def _bound(lengths: Sequence[int]) -> int:
    return -(-max(lengths, default=1) // STEP) * STEP


# -- FlexAttention


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex() -> Any:
    """Return FlexAttention, compiled except within a graph that is being compiled, which contains it."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled_flex()


def _block_mask(queries: Segments, keys: Segments, *, causal: bool) -> Any:
    """Build the block mask of documents from the documents at both ends of each block, without a (T, T) mask."""
    from torch.nn.attention.flex_attention import BlockMask

    of_query, of_key = (_documents_of(part) for part in (queries, keys))
    first_q, last_q, first_k, last_k = (end for ids in (of_query, of_key) for end in _block_ends(ids))
    needed = (first_k[None] <= last_q[:, None]) & (last_k[None] >= first_q[:, None])
    # The last key of each query, counted over all documents: a document ends with the same token in queries and keys.
    places = torch.arange(queries.total, device=needed.device)
    bounds = places + (keys.starts - queries.starts)[1:][of_query.long()]
    if causal:
        starts = torch.arange(0, keys.total, BLOCK, device=needed.device)
        needed = needed & (starts[None] <= _block_ends(bounds)[1][:, None])

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = of_query[query] == of_key[key]
        return same & (key <= bounds[query]) if causal else same

    # The needed blocks of each row come first.
    order = needed.int().argsort(dim=1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        needed.sum(dim=1, dtype=torch.int32)[None, None],
        order[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(queries.total, keys.total),
    )


def _documents_of(segments: Segments) -> Tensor:
    """Return the document of each token, (T,) int32."""
    return segments.spread(torch.arange(len(segments.lengths), dtype=torch.int32, device=segments.starts.device))


def _block_ends(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the documents of the first and the last token of each block, or other values of tokens."""
    return documents[::BLOCK], torch.cat([documents[BLOCK - 1 :: BLOCK], documents[-1:]])[: -(-len(documents) // BLOCK)]


# -- groups of documents of similar length


@dataclass
class _Groups:
    shapes: list[tuple[int, int, int]]
    """The number of documents of each group, and their padded numbers of queries and keys."""
    rests: tuple[int, int, int]
    """0, and the numbers of queries and of keys of documents without a group."""
    where_q: Tensor
    """(T,) the index of each query in the padded documents of all groups."""
    where_k: Tensor
    masks: list[Tensor | None]
    """(documents, 1, 1 or queries, keys) bool of each group, true at visible keys. None if all are, or all up to the query."""


@untraced  # lengths that vary cannot be traced
def _groups(lengths_q: Sequence[int], lengths_k: Sequence[int], device: torch.device, *, causal: bool) -> _Groups:
    order = sorted(range(len(lengths_q)), key=lambda i: (-lengths_q[i], -lengths_k[i]))
    shapes: list[list[int]] = []
    members: list[list[int]] = []
    for i in order:
        q, k = lengths_q[i], lengths_k[i]
        if not q or not k:
            continue
        # A longer document of keys than the first one of its group needs a group of its own. So do documents with a mask.
        apart = causal and bool(shapes) and (q == k) != (shapes[-1][1] == shapes[-1][2])
        if shapes and not apart and q >= SIMILAR * shapes[-1][1] and SIMILAR * shapes[-1][2] <= k <= shapes[-1][2]:
            shapes[-1][0] += 1
            members[-1].append(i)
        else:
            shapes.append([1, q, k])
            members.append([i])
    same = list(lengths_q) == list(lengths_k)
    masks: list[Tensor | None] = []
    for (_, most, longest), documents in zip(shapes, members, strict=True):
        found = np.array([lengths_k[i] for i in documents])
        if causal and most == longest:
            masks.append(None)
            continue
        if causal:
            bounds = np.array([lengths_k[i] - lengths_q[i] for i in documents])[:, None] + np.arange(1, most + 1)
            visible = np.arange(longest) < bounds[..., None]
        else:
            visible = (np.arange(longest) < found[:, None])[:, None]
        masks.append(None if bool(visible.all()) else to_device(visible[:, None], device))
    where_q = _places(lengths_q, shapes, members, 1, device)
    where_k = where_q if same else _places(lengths_k, shapes, members, 2, device)
    loose = [i for i, (q, k) in enumerate(zip(lengths_q, lengths_k, strict=True)) if not q or not k]
    rests = 0, sum(lengths_q[i] for i in loose), sum(lengths_k[i] for i in loose)
    return _Groups([(rows, q, k) for rows, q, k in shapes], rests, where_q, where_k, masks)


def _places(
    lengths: Sequence[int], shapes: list[list[int]], members: list[list[int]], column: int, device: torch.device
) -> Tensor:
    """Return the index of each token in the padded documents of all groups, (T,). Those without a group are at the end."""
    counts = np.asarray(lengths, dtype=np.int64)
    starts, size = np.full(len(counts), -1), 0
    for shape, documents in zip(shapes, members, strict=True):
        for i in documents:
            starts[i] = size
            size += shape[column]
    for i in np.flatnonzero(starts < 0).tolist():
        starts[i] = size
        size += int(counts[i])
    shifts = starts - (counts.cumsum() - counts)
    return to_device(np.arange(int(counts.sum())) + np.repeat(shifts, counts), device)


@untraced  # a graph for each set of shapes would be compiled
def _grouped(q: Tensor, k: Tensor, v: Tensor, plan: _Groups, *, causal: bool, scale: float, dropout: float) -> Tensor:
    parts = zip(
        _padded(q, plan.where_q, plan, 1), _padded(k, plan.where_k, plan, 2), _padded(v, plan.where_k, plan, 2), strict=True
    )
    mixed = []
    for (one_q, one_k, one_v), mask in zip(parts, plan.masks, strict=True):
        one_q, one_k, one_v = (x.transpose(1, 2) for x in (one_q, one_k, one_v))
        heads = one_q.shape[1]
        if one_k.shape[1] == 1:
            # A view with stride 0. `enable_gqa` would be slower on a CPU.
            one_k, one_v = one_k.expand(-1, heads, -1, -1), one_v.expand(-1, heads, -1, -1)
        # The padding is on the right, so causality alone hides it.
        hides, gqa = causal and one_q.shape[2] == one_k.shape[2], one_k.shape[1] != heads
        out = dot_product_attention(
            one_q, one_k, one_v, attn_mask=mask, dropout_p=dropout, is_causal=hides, scale=scale, enable_gqa=gqa
        )
        mixed.append(out.transpose(1, 2).flatten(0, 1))
    return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).index_select(0, plan.where_q)


def _padded(x: Tensor, where: Tensor, plan: _Groups, column: int) -> list[Tensor]:
    """Pad the documents of each group on the right: (T, G, K) -> a (documents, tokens, G, K) per group."""
    sizes = [shape[0] * shape[column] for shape in plan.shapes]
    rest = plan.rests[column]
    padded = x.new_zeros(sum(sizes) + rest, *x.shape[1:]).index_copy(0, where, x)
    padded = padded[: sum(sizes)] if rest else padded
    parts = [padded] if len(sizes) == 1 else padded.split(sizes)
    return [part.unflatten(0, (shape[0], shape[column])) for part, shape in zip(parts, plan.shapes, strict=True)]
