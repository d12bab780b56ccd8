"""Masks by hand."""

import torch

from lightning_align.models.attention import attention_mask


def rows(mask: torch.Tensor) -> list[str]:
    assert mask.shape[:2] == (1, 1)
    return ["".join("x" if seen else "." for seen in row) for row in mask[0, 0].tolist()]


def keys(text: str) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in text]])


def test_causality_and_padding() -> None:
    assert rows(attention_mask(keys("xxx"), 3, causal=True)) == ["x..", "xx.", "xxx"]
    assert rows(attention_mask(keys("xxx"), 3, causal=False)) == ["xxx", "xxx", "xxx"]
    # A pad sees itself where it sees nothing else: a softmax over nothing is NaN on some kernels.
    assert rows(attention_mask(keys("..xx"), 4, causal=True)) == ["x...", ".x..", "..x.", "..xx"]
    assert rows(attention_mask(keys("xx."), 3, causal=True)) == ["x..", "xx.", "xxx"]


def test_the_queries_are_the_last_columns() -> None:
    assert rows(attention_mask(keys(".xxxx"), 2, causal=True)) == [".xxx.", ".xxxx"]
    assert rows(attention_mask(keys(".xxxx"), 1, causal=True)) == [".xxxx"]


def test_who_sees_whom_is_taken_as_it_is() -> None:
    table = torch.tensor([[[True, True, False], [True, False, False], [False, False, False]]])
    assert rows(attention_mask(table, 3, causal=False)) == ["xx.", "x..", "..x"]
    assert rows(attention_mask(table, 3, causal=True)) == ["x..", "x..", "..x"]
