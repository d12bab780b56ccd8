"""Attention masks against masks written by hand."""

import torch

from lightning_align.models.attention import PaddedAttention, attention_mask


def rows(mask: torch.Tensor) -> list[str]:
    assert mask.shape[:2] == (1, 1)
    return ["".join("x" if seen else "." for seen in row) for row in mask[0, 0].tolist()]


def keys(text: str) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in text]])


def test_causality_and_padding() -> None:
    assert rows(attention_mask(keys("xxx"), 3, causal=True)) == ["x..", "xx.", "xxx"]
    assert rows(attention_mask(keys("xxx"), 3, causal=False)) == ["xxx", "xxx", "xxx"]
    # A pad that sees no other token sees itself, because a softmax over nothing gives NaN in some kernels.
    assert rows(attention_mask(keys("..xx"), 4, causal=True)) == ["x...", ".x..", "..x.", "..xx"]
    assert rows(attention_mask(keys("xx."), 3, causal=True)) == ["x..", "xx.", "xxx"]


def test_the_queries_are_the_last_columns() -> None:
    assert rows(attention_mask(keys(".xxxx"), 2, causal=True)) == [".xxx.", ".xxxx"]
    assert rows(attention_mask(keys(".xxxx"), 1, causal=True)) == [".xxxx"]


def test_a_three_dimensional_mask_is_not_changed() -> None:
    table = torch.tensor([[[True, True, False], [True, False, False], [False, False, False]]])
    assert rows(attention_mask(table, 3, causal=False)) == ["xx.", "x..", "..x"]
    assert rows(attention_mask(table, 3, causal=True)) == ["x..", "x..", "..x"]


def test_a_single_query_gives_the_same_output_as_one_of_many() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    padded = torch.tensor([[False, False, True, True, True], [True] * 5])
    for mask in (None, attention_mask(padded, 5, causal=False)):
        whole = PaddedAttention(causal=False, mask=mask)(q, k, v, scale=0.5, dropout=0.0)
        last = PaddedAttention(causal=False, mask=None if mask is None else mask[:, :, -1:])
        torch.testing.assert_close(last(q[:, -1:], k, v, scale=0.5, dropout=0.0), whole[:, -1:], rtol=1e-5, atol=1e-6)
