"""The tiles of logits on each type of device."""

import pytest
import torch

from lightning_align.models.language_model import Head
from lightning_align.scoring import head as tiling
from lightning_align.scoring.collisions import _head_collisions
from lightning_align.scoring.head import head_logprobs, tile_bytes, tile_shape, tiles

MIB = 2**20


@pytest.mark.parametrize(
    ("device", "total", "vocabulary", "shape", "number"),
    [
        # 16 MiB are 2048 x 2048 logits.
        ("cpu", 8192, 128_000, (2048, 2048), 4 * 63),
        ("cpu", 8192, 32_000, (2048, 2048), 4 * 16),
        ("cpu", 100, 259, (100, 259), 1),
        ("cpu", 1, 10, (1, 10), 1),
        # 256 MiB are 8192 x 8192.
        ("cuda", 8192, 128_000, (8192, 8192), 16),
        ("cuda", 8192, 32_000, (8192, 8192), 4),
        ("cuda", 16_384, 128_000, (8192, 8192), 32),
        # Fewer rows have room for more columns, and the other way round.
        ("cuda", 1024, 128_000, (1024, 65_536), 2),
        ("cuda", 512, 128_000, (512, 128_000), 1),
        ("cuda", 100_000, 259, (100_000, 259), 1),
        ("cuda", 100_000, 4096, (16_384, 4096), 7),
        ("xpu", 8192, 128_000, (8192, 8192), 16),
        ("mps", 8192, 128_000, (8192, 8192), 16),
    ],
)
def test_tiles_by_hand(device: str, total: int, vocabulary: int, shape: tuple[int, int], number: int) -> None:
    found = tile_shape(total, vocabulary, tile_bytes(device), device=device)
    assert found == shape
    assert len(list(tiles(total, vocabulary, found))) == number
    assert 4 * found[0] * found[1] <= tile_bytes(device)


def test_sizes_by_hand() -> None:
    assert tile_bytes("cpu") == 16 * MIB and tile_bytes("cuda") == tile_bytes("mps") == 256 * MIB


def test_the_shape_of_a_tile_changes_no_log_prob(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (50, 70))
    targets = torch.randint(0, 70, (50,), generator=generator)
    expected = head_logprobs(hidden, weight, None, targets), _head_collisions(hidden, Head(weight, None), torch.float64)
    monkeypatch.setattr(tiling, "tile_shape", lambda *_, device: (7, 11))
    found = head_logprobs(hidden, weight, None, targets), _head_collisions(hidden, Head(weight, None), torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
