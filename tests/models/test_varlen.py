"""Attention over documents without padding: each kernel against a slow float64 version, document by document."""

import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_align.models import varlen
from lightning_align.models.varlen import Segments, VarlenAttention, choose_kernel

CPU = torch.device("cpu")
COMPILED = varlen._compiled_flex
SELF = [([5, 1, 9, 6, 9], True), ([5, 1, 9, 6, 9], False), ([0, 3, 0, 7], True), ([4], True), ([150, 131, 3], True)]
CASES = [(lengths, lengths, causal) for lengths, causal in SELF]
CASES += [([3, 4, 0, 2, 5], [6, 0, 2, 1, 9], False), ([1, 1], [130, 2], False), ([2, 3], [0, 0], False)]
CASES += [([2, 5, 0, 1, 4, 4], [6, 5, 3, 4, 7, 6], True), ([150, 20, 3], [290, 20, 140], True)]
HEADS = [(1, 1), (4, 4), (4, 2), (4, 1)]


def slow(q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int], causal: bool, scale: float) -> Tensor:
    """One document, one head and one query at a time."""
    rows = []
    start_q = start_k = 0
    for num_q, num_k in zip(lengths_q, lengths_k, strict=True):
        for i in range(num_q):
            stop = start_k + (num_k - num_q + i + 1 if causal else num_k)
            heads = []
            for head in range(q.shape[1]):
                shared = head * k.shape[1] // q.shape[1]
                if num_k:
                    weights = (k[start_k:stop, shared] @ q[start_q + i, head] * scale).softmax(0)
                    heads.append(weights @ v[start_k:stop, shared])
                else:
                    heads.append(torch.zeros_like(v[0, 0]) if len(v) else q.new_zeros(q.shape[-1]))
            rows.append(torch.stack(heads))
        start_q, start_k = start_q + num_q, start_k + num_k
    return torch.stack(rows)


def reference_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, in any dtype on any device."""
    assert cu_seq_k is not None and cu_seq_q.dtype is cu_seq_k.dtype is torch.int32
    assert query.dtype is key.dtype is value.dtype
    assert int(cu_seq_q[-1]) == len(query) and int(cu_seq_k[-1]) == len(key) == len(value)
    assert enable_gqa or query.shape[1] == key.shape[1]
    lengths_q, lengths_k = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert max(lengths_q) <= max_q and max(lengths_k) <= max_k
    assert all(k or not q for q, k in zip(lengths_q, lengths_k, strict=True)), "flash attention over nothing"
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return slow(query, key, value, lengths_q, lengths_k, window_size == (-1, 0), scale)


def older(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
          is_causal: bool = False, return_aux: Any = None) -> Tensor:  # fmt: skip
    """The signature of torch 2.10, without a scale and with as many heads of keys as of queries."""
    window = (-1, 0) if is_causal else (-1, -1)
    return reference_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window)


def without_heads(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
                  return_aux: Any = None, scale: float | None = None,
                  window_size: tuple[int, int] = (-1, -1)) -> Tensor:  # fmt: skip
    """The signature between torch 2.10 and 2.12."""
    options: dict[str, Any] = {"scale": scale, "window_size": window_size}
    return reference_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)


def inputs(lengths_q: list[int], lengths_k: list[int], heads: tuple[int, int], *, width: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths_q), heads[0]), (sum(lengths_k), heads[1]), (sum(lengths_k), heads[1])]
    return [torch.randn(*shape, width, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def values_and_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    out = function(*tensors)
    weight = torch.arange(out.numel(), dtype=torch.float64).view(out.shape).cos().to(out)
    loss = (out * weight).sum() + 0 * sum(x.sum() for x in tensors)
    return [out, *torch.autograd.grad(loss, tensors)]


@pytest.fixture(autouse=True)
def eager_flex() -> Any:
    """FlexAttention is not compiled, and its backward pass, which a CPU has only then, is allowed."""
    from torch.nn.attention import flex_attention

    with (
        mock.patch.object(varlen, "_compiled_flex", lambda: flex_attention.flex_attention),
        mock.patch.object(flex_attention, "_validate_device", lambda *_: None),
    ):
        yield


def test_the_stand_in_has_the_signature_of_torch() -> None:
    from torch.nn.attention.varlen import varlen_attn

    theirs, ours = (inspect.signature(one).parameters for one in (varlen_attn, reference_varlen_attn))
    assert [(p.name, p.kind, p.default) for p in theirs.values()] == [(p.name, p.kind, p.default) for p in ours.values()]


KERNELS = [("groups", None), ("varlen", reference_varlen_attn), ("varlen", older), ("varlen", without_heads)]
EACH = [(kernel, case, heads) for kernel in KERNELS for case in CASES for heads in HEADS]
# Each is traced, which takes long.
EACH += [(("flex", None), CASES[case], HEADS[heads]) for case, heads in ((2, 2), (4, 3), (5, 1), (6, 0), (9, 1))]


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("kernel", "case", "heads"), EACH)
def test_each_kernel_against_a_slow_version(
    kernel: tuple[Any, Any], case: tuple[list[int], list[int], bool], heads: tuple[int, int]
) -> None:
    lengths_q, lengths_k, causal = case
    if max(lengths_q) > 100 and kernel[0] != "flex":
        # Long ones are for the blocks.
        lengths_q, lengths_k = ([length // 20 for length in each] for each in (lengths_q, lengths_k))
    tensors = inputs(lengths_q, lengths_k, heads)
    expected = values_and_gradients(lambda q, k, v: slow(q, k, v, lengths_q, lengths_k, causal, 0.3), tensors)
    with mock.patch("torch.nn.attention.varlen.varlen_attn", kernel[1]):
        queries = Segments.of_lengths(lengths_q, CPU)
        keys = queries if lengths_q == lengths_k else Segments.of_lengths(lengths_k, CPU)
        attend = VarlenAttention(queries, keys, causal, kernel[0])
        found = values_and_gradients(lambda q, k, v: attend(q, k, v, scale=0.3, dropout=0.0), tensors)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ["groups", "varlen"])
def test_one_head_needs_no_dimension(kernel: Any) -> None:
    q, k, v = inputs([3, 2], [3, 2], (4, 1))
    documents = Segments.of_lengths([3, 2], CPU)
    with mock.patch("torch.nn.attention.varlen.varlen_attn", reference_varlen_attn):
        attend = VarlenAttention(documents, documents, True, kernel)
        out = attend(q, k.squeeze(1), v.squeeze(1), scale=0.5, dropout=0.0)
        torch.testing.assert_close(out, attend(q, k, v, scale=0.5, dropout=0.0))
    assert out.shape == q.shape


def test_the_blocks_of_documents_are_those_of_the_whole_mask() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    for lengths in ([150, 131, 3, 200], [1, 1, 1], [127, 1, 128, 256], [300]):
        for causal in (True, False):
            documents = Segments.of_lengths(lengths, CPU)
            found = varlen._block_mask(documents, documents, causal=causal)
            ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))

            def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor, ids: Tensor = ids, causal: bool = causal) -> Tensor:
                return (ids[q] == ids[k]) & (k <= q) if causal else ids[q] == ids[k]

            total = sum(lengths)
            expected = create_block_mask(visible, None, None, total, total, device="cpu", BLOCK_SIZE=varlen.BLOCK)
            assert torch.equal(found.to_dense(), expected.to_dense())


def test_autocast_gives_every_kernel_one_dtype() -> None:
    def check(*args: Any, **options: Any) -> Tensor:
        assert args[0].dtype is args[1].dtype is args[2].dtype is torch.bfloat16
        return reference_varlen_attn(*args, **options)

    check.__signature__ = inspect.signature(reference_varlen_attn)  # type: ignore[attr-defined]
    q, k, v = (x.float() for x in inputs([3, 2], [3, 2], (2, 1)))
    documents = Segments.of_lengths([3, 2], CPU)
    with mock.patch("torch.nn.attention.varlen.varlen_attn", check), torch.autocast("cpu", torch.bfloat16):
        attend = VarlenAttention(documents, documents, True, "varlen")
        assert attend(q, k, v.bfloat16(), scale=0.5, dropout=0.0).dtype is torch.bfloat16


def test_kernels_are_chosen_by_device_dtype_and_width() -> None:
    cuda, half = torch.device("cuda", 0), torch.bfloat16
    assert choose_kernel(CPU, torch.float32, 64, dropout=0.0) == "groups"
    assert choose_kernel(cuda, half, 64, dropout=0.0) == "groups"  # there is none here
    with (
        mock.patch("torch.accelerator.is_available", lambda: True),
        mock.patch.object(varlen, "_works", lambda kernel, *_: kernel in works),
    ):
        works = ["varlen", "flex"]
        assert choose_kernel(cuda, half, 64, dropout=0.0) == "varlen"
        assert choose_kernel(cuda, torch.float16, 256, dropout=0.0) == "varlen"
        assert choose_kernel(cuda, half, 64, dropout=0.1) == "groups"
        assert choose_kernel(cuda, half, 20, dropout=0.0) == "flex"
        assert choose_kernel(cuda, half, 264, dropout=0.0) == "flex"
        assert choose_kernel(cuda, torch.float32, 64, dropout=0.0) == "flex"
        assert choose_kernel(cuda, torch.float64, 64, dropout=0.0) == "groups"
        assert choose_kernel(torch.device("xpu", 0), half, 64, dropout=0.0) == "flex"
        assert choose_kernel(torch.device("mps", 0), half, 64, dropout=0.0) == "groups"
        works = ["flex"]
        assert choose_kernel(cuda, half, 64, dropout=0.0) == "flex"
        works = []
        assert choose_kernel(cuda, half, 64, dropout=0.0) == "groups"


def test_a_kernel_that_this_torch_lacks_is_not_used() -> None:
    varlen._works.cache_clear()
    assert not varlen._works("varlen", CPU, torch.bfloat16, 8)  # flash attention of CUDA on a CPU
    with torch.inference_mode():  # as in a validation
        assert varlen._works("groups", CPU, torch.bfloat16, 8)
    varlen._works.cache_clear()


def test_dropout_is_on_average_no_change() -> None:
    q, k, v = inputs([6, 4], [6, 4], (2, 1))
    documents = Segments.of_lengths([6, 4], CPU)
    attend = VarlenAttention(documents, documents, causal=True, kernel="groups")
    exact = attend(q, k, v, scale=0.5, dropout=0.0)
    torch.manual_seed(0)
    draws = [attend(q, k, v, scale=0.5, dropout=0.3) for _ in range(500)]
    assert not torch.equal(draws[0], exact)
    # The worst of 80 means is off by 0.05.
    torch.testing.assert_close(torch.stack(draws).mean(0), exact, rtol=0, atol=0.1)


@pytest.mark.parametrize(("keys", "causal"), [([3, 2, 1], False), ([2, 3], True)])
def test_documents_that_do_not_fit_are_refused(keys: list[int], causal: bool) -> None:
    with pytest.raises(ValueError, match="`keys` must have as many documents as `queries`, 2"):
        VarlenAttention(Segments.of_lengths([3, 2], CPU), Segments.of_lengths(keys, CPU), causal, "groups")


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), [("varlen", torch.bfloat16, 0.03), ("flex", torch.float32, 1e-3)])
@pytest.mark.parametrize(("lengths_q", "lengths_k", "causal"), [([150, 0, 131, 3], [150, 0, 131, 3], True), *CASES[5:7]])
def test_kernels_of_a_gpu(
    kernel: Any, dtype: torch.dtype, tolerance: float, lengths_q: list[int], lengths_k: list[int], causal: bool
) -> None:
    device = torch.device("cuda")
    tensors = [x.detach().to(device, dtype).requires_grad_() for x in inputs(lengths_q, lengths_k, (4, 2), width=16)]
    exact = [x.detach().cpu().double().requires_grad_() for x in tensors]
    queries = Segments.of_lengths(lengths_q, device)
    keys = queries if causal else Segments.of_lengths(lengths_k, device)
    expected = values_and_gradients(lambda q, k, v: slow(q, k, v, lengths_q, lengths_k, causal, 0.3), exact)
    attend = VarlenAttention(queries, keys, causal, kernel)
    with mock.patch.object(varlen, "_compiled_flex", COMPILED):
        found = values_and_gradients(lambda q, k, v: attend(q, k, v, scale=0.3, dropout=0.0), tensors)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other.cpu().double(), one, rtol=tolerance, atol=tolerance)


def test_plans_of_lengths_that_vary_may_stand_in_a_compiled_function() -> None:
    """As in `torch.compile(module, dynamic=True)`, where lengths are symbols."""
    torch._dynamo.reset()

    def attended(q: Tensor, k: Tensor, lengths_q: list[int], lengths_k: list[int]) -> Tensor:
        queries, keys = (Segments.of_lengths(lengths, CPU) for lengths in (lengths_q, lengths_k))
        return VarlenAttention(queries, keys, True, "groups")(q, k, k, scale=0.5, dropout=0.0)

    compiled = torch.compile(attended, backend="eager", dynamic=True)
    for lengths_q, lengths_k in (([3, 2, 4], [6, 2, 7]), ([5, 4, 2], [9, 4, 3])):
        q, k = torch.randn(sum(lengths_q), 2, 8), torch.randn(sum(lengths_k), 2, 8)
        result = compiled(q, k, lengths_q, lengths_k)
        assert (result - slow(q, k, k, lengths_q, lengths_k, True, 0.5)).abs().max() < 1e-6
