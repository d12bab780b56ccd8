"""RETRO with a decoder without padding: its hidden states and gradients are those of padded rows."""

from typing import Any
from unittest import mock

import pytest
import torch

from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.unpadded import Unpadded
from lightning_align.models.varlen import Segments
from lightning_align.retro.batch import without_last
from tests.calm.test_unpadded import LLAMA
from tests.models.test_varlen import reference_varlen_attn
from tests.retro.toys import tiny_retro, tokens_and_neighbors

CPU = torch.device("cpu")


@pytest.mark.parametrize("kernel", ["groups", "varlen"])
@pytest.mark.parametrize("decoder", ["palm", "llama"])
@pytest.mark.parametrize("lengths", [[17, 9, 3, 12], [3, 2]])
@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize(("counted", "count"), [(True, 2), (True, 0), (False, 2)])
def test_windows_equal_their_padded_rows(
    kernel: str, decoder: str, lengths: list[int], conditioned: bool, counted: bool, count: int
) -> None:
    torch.manual_seed(0)
    given = {"decoder": PretrainedLM(config=LLAMA)} if decoder == "llama" else {}
    model = tiny_retro(dtype=torch.float64, conditioned=conditioned, **given)
    tokens, neighbors = tokens_and_neighbors(len(lengths), max(lengths))
    neighbors = neighbors.first(count)
    counts = neighbors.mask.sum(-1).numpy() if counted else None
    mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    results = []
    choose = lambda *_, dropout: kernel  # noqa: E731
    with (
        mock.patch("lightning_align.models.palm_unpadded.choose_kernel", choose),
        mock.patch("lightning_align.models.pretrained_unpadded.choose_kernel", choose),
        mock.patch("lightning_align.retro.unpadded.choose_kernel", choose),
        mock.patch("torch.nn.attention.varlen.varlen_attn", reference_varlen_attn),
    ):
        assert model.longest_unpadded(CPU) is not None
        unpadded = Unpadded.of(tokens, mask, Segments.of_lengths(lengths, CPU))
        for packed in (False, True):
            model.zero_grad()
            if packed:
                hidden = model.unpadded_hidden(unpadded, neighbors=neighbors, lengths=counts)
            else:
                hidden = unpadded.select(model.hidden(tokens, neighbors=neighbors))
            (hidden * torch.arange(hidden.numel(), dtype=hidden.dtype).view_as(hidden).cos()).sum().backward()
            results.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    expected, found = results
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-11 * max(1.0, float(one.abs().max())))


def test_the_last_column_is_not_read() -> None:
    tokens = torch.arange(8).view(2, 4)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    batch: Any = {"tokens": tokens, "mask": mask, "targets": mask, "lengths": [4, 2]}
    read = without_last(batch)
    assert read["tokens"].tolist() == [[0, 1, 2], [4, 5, 6]] and read["lengths"] == [3, 2]
    assert "lengths" not in without_last({name: batch[name] for name in ("tokens", "mask", "targets")})  # type: ignore[arg-type]
