"""Embedding of chunks per second, and exact search on the device against the search on the CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import gpu
from lightning_align.models.palm import PaLM
from lightning_align.retrieval.device_search import DeviceSearch
from lightning_align.retrieval.encoders import LMEncoder, in_precision
from lightning_align.retrieval.exact import ExactSearch
from lightning_align.retrieval.neighbors import Forbidden

CHUNK, K = 64, 8
PER_DOCUMENT = 20
"""Chunks of a document."""


class MiniLM(nn.Module):
    """An encoder with the shape of all-MiniLM-L6-v2 and random weights."""

    causal = False

    def __init__(self, *, dry: bool) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        if dry:
            sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        self.bert = BertModel(BertConfig(vocab_size=30522, **sizes), add_pooling_layer=False)

    def hidden(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The final hidden states (B, N, D)."""
        given = torch.ones_like(tokens) if mask is None else mask.long()
        found: Tensor = self.bert(tokens, attention_mask=given).last_hidden_state
        return found


def embedding(session: gpu.Session, name: str, make: Callable[[], nn.Module], precision: str) -> None:
    """Rows: chunks per second by batch size."""
    model = make().to(session.device)
    draw = np.random.default_rng(0)
    for batch in (8,) if session.dry else (64, 512, 4096):
        with session.part(f"{name}, {precision}, batch {batch}", needs=20):
            count = 16 if session.dry else max(4096, 4 * batch)
            chunks = [draw.integers(1, 250, CHUNK) for _ in range(count)]
            encoder = LMEncoder(model, fingerprint=name, batch_size=batch)
            with in_precision(encoder, precision):
                seconds = session.median(lambda: encoder.encode(chunks), rounds=3, warmup=1)  # noqa: B023
            session.add(
                "Embedding of chunks of 64 tokens",
                {
                    "encoder": name,
                    "precision": precision,
                    "batch": batch,
                    "chunks/s": count / seconds,
                    "peak memory, MiB": session.peak_mib(),
                },
            )


def searching(session: gpu.Session, *, spread: float) -> None:
    """Rows: queries per second and equality of the results. Clustered vectors have near neighbors, and some are copies."""
    num, dim, asked = (3000, 16, 300) if session.dry else (1_000_000, 384, 65_536)
    draw = np.random.default_rng(0)
    centers = draw.standard_normal((max(8, num // 200), dim), dtype=np.float32)
    vectors = centers[draw.integers(0, len(centers), num)]
    vectors += spread * draw.standard_normal((num, dim), dtype=np.float32)
    vectors[:: num // 100] = vectors[0]
    vectors = vectors.astype(np.float16).astype(np.float32)
    groups = np.arange(num) // PER_DOCUMENT
    rows = np.arange(asked)
    on_device: Any = DeviceSearch(vectors, groups, device=session.device)

    def search(searcher: Any, count: int) -> Any:
        block = 8192
        found = []
        for start in range(0, count, block):
            part = rows[start : min(start + block, count)]
            found.append(searcher.nearest(vectors[part], K, Forbidden(part - start, groups[part])))
        return found

    seconds = session.median(lambda: search(on_device, asked), rounds=2, warmup=1)
    bound = 2.0 * asked * num * dim / 67e12  # the float32 peak of an H100 or H200
    sample = min(asked, 2048)
    torch.set_num_threads(1 if session.dry else 16)
    cpu = ExactSearch(vectors, groups)
    mine, theirs = search(on_device, sample), search(cpu, sample)
    alone = gpu.Session.median(session, lambda: search(cpu, sample), rounds=1, warmup=0)
    equal = all(np.array_equal(a, b) for one, other in zip(mine, theirs, strict=True) for a, b in zip(one, other, strict=True))
    session.add(
        f"Exact search, k {K}, own document excluded",
        {
            "vectors": num,
            "dimensions": dim,
            "spread within clusters": spread,
            "queries/s on the device": asked / seconds,
            "bound of float32 / time": bound / seconds,
            "queries/s on the CPU": sample / alone,
            "results equal": str(equal),
            "peak memory, MiB": session.peak_mib(),
        },
    )
    if not equal:
        raise AssertionError("the device found other neighbors than the CPU")


def main() -> None:
    """Measure and print."""
    arguments = gpu.parse(gpu.parser(__doc__))
    session = gpu.Session(
        "retrieval",
        "Embedding and exact search",
        "Encoders have random weights. The search on the CPU uses 16 threads, with a part of the queries.",
        arguments,
    )
    dim, depth = (16, 1) if session.dry else (768, 12)
    encoders: dict[str, Callable[[], nn.Module]] = {
        "MiniLM": lambda: MiniLM(dry=session.dry),
        f"PaLM, width {dim}, depth {depth}": lambda: PaLM(num_tokens=256, dim=dim, depth=depth, heads=max(1, dim // 64)),
    }
    for name, make in encoders.items():
        for precision in ("bf16-mixed", "32-true"):
            with session.part(f"{name}, {precision}", needs=30):
                embedding(session, name, make, precision)
    for spread in (1.0, 0.05):
        with session.part(f"exact search, spread {spread}", needs=60):
            searching(session, spread=spread)
    session.finish()


if __name__ == "__main__":
    main()
