"""A RETRO training step, and generation with retrieval, against RETRO-pytorch 0.3.9.

Both models have the same width, depth, number of heads, vocabulary, chunk size, cross-attention layers and depth of the
neighbor encoder. Neighbors are random chunks on both sides, so no search is timed.
"""

import argparse
import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from benchmarks import common
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.palm import PaLM
from lightning_align.retrieval.search import Found
from lightning_align.retrieval.tables import Tokens
from lightning_align.retro.decoding import RetrievalDecoder
from lightning_align.retro.model import RETRO, NeighborTokens
from lightning_align.scoring.head import target_logprobs

VOCABULARY, WIDTH, DEPTH, ENCODER_DEPTH, HEADS, DIM_HEAD = 28_996, 256, 4, 2, 8, 64
LENGTH, CHUNK, NEIGHBORS, BATCH = 512, 64, 2, 4
READING = [1, 3]


def ours() -> RETRO:
    """Our model."""
    decoder = PaLM(
        num_tokens=VOCABULARY, dim=WIDTH, depth=DEPTH, heads=HEADS, dim_head=DIM_HEAD, tie_embeddings=False, variant="paper"
    )
    return RETRO(decoder, chunk_size=CHUNK, cross_layers=READING, encoder_depth=ENCODER_DEPTH, heads=HEADS, dim_head=DIM_HEAD)


def peer() -> nn.Module:
    """The peer's model."""
    from benchmarks.common.peer_retro_pytorch import retro_pytorch

    model: nn.Module = retro_pytorch.RETRO(
        num_tokens=VOCABULARY,
        max_seq_len=LENGTH,
        enc_dim=WIDTH,
        enc_depth=ENCODER_DEPTH,
        dec_dim=WIDTH,
        dec_depth=DEPTH,
        dec_cross_attn_layers=tuple(READING),
        heads=HEADS,
        dim_head=DIM_HEAD,
        chunk_size=CHUNK,
    )
    return model


def step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run() -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return run


class RandomRetriever:
    """Returns random chunks."""

    chunk_size, tokenizer_fingerprint = CHUNK, "random"

    def search(self, queries: Sequence[ArrayLike], k: int, exclude: Sequence[Sequence[str]] | None = None) -> Found:
        """See `Retriever`."""
        shape = len(queries), k
        ids = np.random.default_rng(0).integers(4, VOCABULARY, (*shape, 2 * CHUNK))
        ones = np.ones(shape, dtype=bool)
        return Found(np.zeros(shape, np.int64), ones, np.zeros(shape, np.float32), Tokens(ids, np.ones(ids.shape, dtype=bool)))


class PeerGenerator(nn.Module):
    """The part of the peer's wrapper that its `generate` needs. The wrapper itself would chunk and embed a corpus."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.retro, self.chunk_size, self.max_seq_len = model, CHUNK, LENGTH

    def fetch_knn_chunks_fn(self, chunks: Tensor) -> Tensor:
        """Random neighbors with their continuations."""
        return torch.randint(4, VOCABULARY, (*chunks.shape[:-1], NEIGHBORS, 2 * CHUNK))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of training steps")
    parser.add_argument("--generations", type=int, default=1, help="generations of 512 tokens per side")
    arguments = parser.parse_args()
    from benchmarks.common.peer_retro_pytorch import PEER, TrainingWrapper, retro_pytorch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model, other = ours(), peer()
    tokens = torch.randint(4, VOCABULARY, (BATCH, LENGTH + 1))
    found = torch.randint(4, VOCABULARY, (BATCH, LENGTH // CHUNK, NEIGHBORS, 2 * CHUNK))
    neighbors = NeighborTokens(found, torch.ones_like(found, dtype=torch.bool))

    def loss() -> Tensor:
        hidden = model.hidden(tokens[:, :-1], neighbors=neighbors)
        return -target_logprobs(hidden.flatten(0, 1), model.head, tokens[:, 1:].flatten()).mean()

    sides = {"ours": step(model, loss), PEER: step(other, lambda: other(tokens, retrieved=found, return_loss=True))}
    for run in sides.values():
        run()
    peaks = {}
    for name, run in sides.items():
        with common.Memory() as memory:
            run()
        peaks[name] = memory.bytes / common.MIB
    timings = common.alternate(sides, arguments.rounds)
    sizes = {"ours": model, PEER: other}
    common.heading(
        "RETRO: a training step",
        f"Width {WIDTH}, depth {DEPTH}, encoder {ENCODER_DEPTH}, {LENGTH} tokens in chunks of {CHUNK}, {NEIGHBORS} neighbors, "
        f"batch {BATCH}, vocabulary {VOCABULARY}; forward, backward and AdamW in float32, {torch.get_num_threads()} threads, "
        f"{arguments.rounds} alternating rounds.",
    )
    print(
        common.table(
            [
                {
                    "side": name,
                    "parameters, M": f"{sum(p.numel() for p in sizes[name].parameters()) / 1e6:.1f}",
                    "s/step": f"{common.median(t.seconds for t in timings[name]):.3f}",
                    "tokens/s": f"{BATCH * LENGTH / common.median(t.seconds for t in timings[name]):.0f}",
                    "peak memory of a step, MiB": f"{peaks[name]:.0f}",
                    "background load": common.load(timings[name]),
                }
                for name in sides
            ]
        )
    )
    speed = 1 / common.ratio(timings["ours"], timings[PEER])
    print(common.table([common.claim("tokens/s / peer", "≥ 1.5x", f"{speed:.2f}x", speed >= 1.5)]))

    prompt = tokens[:1, :1]
    decoder = RetrievalDecoder(model, RandomRetriever(), num_neighbors=NEIGHBORS)
    config = GenerationConfig(max_new_tokens=LENGTH - 1, top_k=2900)
    generator = PeerGenerator(other)
    with torch.no_grad():
        # The peer would stop at an end-of-sequence token.
        other.to_logits.bias[retro_pytorch.retrieval.EOS_ID] = -1e9  # type: ignore[union-attr, index, operator]

    def peers() -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints at every retrieval
            TrainingWrapper.generate(generator, prompt)

    runs = {"ours": lambda: generate(decoder, prompt.tolist(), config), PEER: peers}
    generations = common.alternate(runs, arguments.generations)
    common.heading(
        "RETRO: generation", f"One prompt of one token to {LENGTH} tokens, a retrieval every {CHUNK}; batch 1, top-k."
    )
    print(
        common.table(
            [
                {
                    "side": name,
                    "s": f"{common.median(t.seconds for t in generations[name]):.2f}",
                    "tokens/s": f"{(LENGTH - 1) / common.median(t.seconds for t in generations[name]):.1f}",
                    "background load": common.load(generations[name]),
                }
                for name in runs
            ]
        )
    )
    faster = 1 / common.ratio(generations["ours"], generations[PEER])
    print(common.table([common.claim("tokens/s / peer", "≥ 20x", f"{faster:.1f}x", faster >= 20)]))


if __name__ == "__main__":
    main()
