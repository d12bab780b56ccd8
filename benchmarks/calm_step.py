"""A composition beside CALM-pytorch: training step, memory after many steps, and generation.

    python benchmarks/calm_step.py [--vocabulary 32000] [--rounds 5] [--steps 500]

The same wrapped x-transformers models on both sides: anchor width 256, depth 8; augment width 128, depth 8; connections
for every second layer; 8 rows of 256 tokens; forward, backward and Adam. The peer's augment reads a prompt of 64 tokens
and nothing else, so the row to compare is `prefix`; `aligned` does what the peer cannot, its augment reads all 256.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import MIB, Meter, alternate, claim, heading, load, median, ratio, resident, table
from CALM_pytorch import CALM as Peer
from CALM_pytorch import AugmentParams
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper

from lightning_align import CALM, Augment, AugmentInput, ConnectionConfig, GenerationConfig, PaLM, generate
from lightning_align.calm.module import composed_logprobs
from lightning_align.calm.states import StateStore

ROWS, LENGTH, PROMPT = 8, 256, 64


def x_transformer(dim: int, vocabulary: int) -> TransformerWrapper:
    """A model of depth 8 with heads of 64."""
    stack = Decoder(dim=dim, depth=8, heads=dim // 64, rotary_pos_emb=True, attn_flash=True)
    return TransformerWrapper(num_tokens=vocabulary, max_seq_len=512, attn_layers=stack)


def pairs() -> list[list[int]]:
    """What the peer connects with `connect_every_num_layers=2`."""
    return [[1, 1], [3, 3], [5, 5], [7, 7]]


def ours_step(model: CALM, optimizer: torch.optim.Optimizer, tokens: Tensor, inputs: Any) -> None:
    """One training step on all tokens."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    targets = mask.clone()
    targets[:, 0] = False
    logprobs = composed_logprobs(model, {"tokens": tokens, "mask": mask, "targets": targets}, inputs)
    (-logprobs.sums.sum() / logprobs.counts.sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500, help="of the memory test, which uses a vocabulary of 512")
    options = parser.parse_args()
    torch.manual_seed(0)
    vocabulary = options.vocabulary
    tokens = torch.randint(0, vocabulary, (ROWS, LENGTH))
    prompt = tokens[:, :PROMPT].clone()
    anchor, augment = x_transformer(256, vocabulary), x_transformer(128, vocabulary)
    anchor_alone = copy.deepcopy(anchor).requires_grad_(False).eval()
    config = ConnectionConfig(heads=8, dim_head=64)

    def ours(alignment: Any) -> tuple[CALM, torch.optim.Optimizer]:
        spec = Augment(copy.deepcopy(augment), connections=pairs(), alignment=alignment)
        model = CALM(copy.deepcopy(anchor), spec, connection=config)
        return model, torch.optim.Adam(model.connections.parameters(), lr=1e-4)

    peer = Peer(copy.deepcopy(anchor), AugmentParams(model=copy.deepcopy(augment), connect_every_num_layers=2))
    peer_optimizer = torch.optim.Adam(peer.parameters(), lr=1e-4)
    prefix, prefix_optimizer = ours("prefix")
    aligned, aligned_optimizer = ours("aligned")

    def peer_step() -> None:
        peer(tokens, prompt=prompt).backward()
        peer_optimizer.step()
        peer_optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        store = StateStore(Path(folder), "benchmark")
        mask = torch.ones_like(tokens, dtype=torch.bool)

        def stored_step() -> None:
            states = store.fetch(aligned.readers[0], tokens, mask)
            ours_step(aligned, aligned_optimizer, tokens, [AugmentInput(tokens, states=states)])

        def forward() -> None:
            with torch.no_grad():
                anchor_alone(tokens)

        sides = {
            "CALM-pytorch": peer_step,
            "ours, prefix": lambda: ours_step(prefix, prefix_optimizer, tokens, [AugmentInput(prompt)]),
            "ours, aligned": lambda: ours_step(aligned, aligned_optimizer, tokens, [None]),
            "ours, aligned, stored states": stored_step,
            "anchor forward alone": forward,
        }
        for side in sides.values():
            side()
        timings = alternate(sides, options.rounds)
    peer_time = timings["CALM-pytorch"]
    heading("CALM training step", f"{ROWS} x {LENGTH} tokens, vocabulary {vocabulary}, {torch.get_num_threads()} threads.")
    rows = [
        {
            "side": name,
            "s": f"{median(t.seconds for t in times):.3f}",
            "CALM-pytorch over it": f"{ratio(peer_time, times):.2f}",
            "load of others": load(times),
        }
        for name, times in timings.items()
    ]
    print(table(rows))
    claims = []
    for side, required in (("ours, prefix", 1.2), ("ours, aligned", 1.2), ("ours, aligned, stored states", 1.5)):
        measured = ratio(peer_time, timings[side])
        claims.append(claim(f"step, {side}", f"{required} times", f"{measured:.2f} times", measured >= required))
    claims.append(_memory(options.steps, config))
    claims.append(_generation(vocabulary, peer, prompt))
    claims.append(_alone(peer, prefix, tokens))
    print(table(claims))


def _memory(steps: int, config: ConnectionConfig) -> dict[str, str]:
    """What a process holds after many steps, over what it held after five; small models, so that a leak shows."""
    anchor, augment = x_transformer(64, 512), x_transformer(64, 512)
    peer = Peer(copy.deepcopy(anchor), AugmentParams(model=copy.deepcopy(augment), connect_every_num_layers=2))
    spec = Augment(augment, connections=pairs())
    model = CALM(anchor, spec, connection=config)
    optimizer = torch.optim.Adam(model.connections.parameters())
    tokens = torch.randint(0, 512, (2, 64))
    held: dict[str, list[int]] = {}
    sides: dict[str, Any] = {
        "ours": lambda: ours_step(model, optimizer, tokens, [None]),
        "peer": lambda: peer(tokens, prompt=tokens[:, :16]).backward(),
    }
    for name, step in sides.items():
        for number in range(steps):
            step()
            if number in (4, steps - 1):
                held.setdefault(name, []).append(resident())
    growth = {name: (after - before) / MIB for name, (before, after) in held.items()}
    return claim(
        f"memory after {steps} steps over that after 5",
        "no growth",
        f"{growth['ours']:.1f} MiB; CALM-pytorch {growth['peer']:.1f} MiB",
        growth["ours"] < 2,
    )


def _generation(vocabulary: int, peer: nn.Module, prompt: Tensor) -> dict[str, str]:
    """8 prompts of 64 tokens to 256: PaLM models of the same size with caches, and the peer, which has none."""
    sizes: dict[str, Any] = {"num_tokens": vocabulary, "depth": 8, "dim_head": 64}
    anchor, augment = PaLM(dim=256, heads=4, **sizes), PaLM(dim=128, heads=2, **sizes)
    model = CALM(anchor, Augment(augment, connections=pairs()))
    config = GenerationConfig(max_new_tokens=LENGTH - PROMPT, top_p=0.9)
    with Meter() as mine:
        generate(model, prompt.tolist(), config)
    with Meter() as theirs:
        peer.generate(prompt, LENGTH)  # type: ignore[operator]
    count = ROWS * (LENGTH - PROMPT)
    times = theirs.seconds / mine.seconds
    return claim(
        "generation, 64 to 256 tokens",
        "20 times",
        f"{times:.0f} times ({count / mine.seconds:.0f} and {count / theirs.seconds:.0f} tokens/s)",
        times >= 20,
    )


def _alone(peer: Any, model: CALM, tokens: Tensor) -> dict[str, str]:
    """Whether the anchor still works by itself."""
    model.anchor(tokens)
    try:
        peer.anchor_llm(tokens)
        theirs = "works"
    except Exception as error:
        theirs = f"{type(error).__name__}"
    return claim("the anchor alone, after wrapping", "works", f"works; CALM-pytorch: {theirs}", True)


if __name__ == "__main__":
    main()
